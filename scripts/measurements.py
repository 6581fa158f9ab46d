"""What is measured on an ONNX file in onnxruntime on CPU: latency and what optimisation leaves."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
from shared_models import Inputs

_BURST = 0.05  # seconds one session runs before the next takes over


def session(
    path: str | Path, threads: int = 1, optimized: Path | None = None
) -> onnxruntime.InferenceSession:
    """A CPU session with all optimisations; ``optimized`` receives the optimised graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that spin after a run would take the core from the next session in line.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def operators_left(path: str | Path) -> Counter[str]:
    """Operator counts, subgraphs included, after onnxruntime's optimisation."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session(path, optimized=optimized)
        return Counter(
            node.op_type for node in _nodes(onnx.load(optimized, load_external_data=False).graph)
        )


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in [*attribute.graphs, attribute.g]:
                yield from _nodes(subgraph)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Time of one run, and its ratio to the first file measured beside it.

    Attributes:
        seconds: median over the rounds.
        ratio: median over the rounds of the ratio within a round.
        fastest_ratio: between the fastest bursts of all rounds. Other work on the machine slows
            files unequally; where this differs much from ``ratio``, measure again at rest.
    """

    seconds: float
    ratio: float
    fastest_ratio: float


def latency(
    files: Mapping[str, str | Path], inputs: Inputs, threads: int, rounds: int
) -> dict[str, Latency]:
    """Time every file; each round runs every session for a moment, so that drift meets them all."""
    sessions = {key: session(path, threads) for key, path in files.items()}
    counts = {key: _runs_in_a_burst(run, inputs) for key, run in sessions.items()}
    times: dict[str, list[float]] = {key: [] for key in files}
    for _ in range(rounds):
        for key, run in sessions.items():
            times[key].append(_burst(run, inputs, counts[key]))
    first = times[next(iter(files))]
    return {key: _summary(own, first) for key, own in times.items()}


def _summary(own: Sequence[float], first: Sequence[float]) -> Latency:
    return Latency(
        seconds=statistics.median(own),
        ratio=statistics.median(a / b for a, b in zip(own, first, strict=True)),
        fastest_ratio=min(own) / min(first),
    )


def _runs_in_a_burst(run: onnxruntime.InferenceSession, inputs: Inputs) -> int:
    return max(3, math.ceil(_BURST / _burst(run, inputs, 3)))


def _burst(run: onnxruntime.InferenceSession, inputs: Inputs, count: int) -> float:
    run.run(None, inputs)  # caches still hold the previous session's weights
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run.run(None, inputs)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
