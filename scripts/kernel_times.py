"""How long every node of a model takes, from onnxruntime's profiler."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

_WARM_UP = 3
_RUNS = 10  # of one model before the next takes over


@dataclass(frozen=True)
class NodeTime:
    """A node of the optimised graph: its operator, nanoseconds, shapes in and out."""

    name: str
    op_type: str
    nanoseconds: float
    inputs: list[tuple[int, ...]]
    output: tuple[int, ...]


def node_times(
    models: Sequence[str | bytes | os.PathLike[str]],
    inputs: Mapping[str, np.ndarray],
    seconds: float = 0.2,
    runs: int = 40,
) -> list[list[NodeTime]]:
    """Profile ``models`` in turns on one thread, for ``seconds`` each and ``runs`` runs at least.

    A node's time is the mean of its fastest quarter: other work on the machine only ever adds.
    """
    with tempfile.TemporaryDirectory() as folder:
        sessions = [_session(m, f"{folder}/{i}") for i, m in enumerate(models)]
        end = time.monotonic() + seconds * len(models)
        done = 0
        while done < runs or time.monotonic() < end:
            for session in sessions:
                for _ in range(_RUNS):
                    session.run(None, inputs)
            done += _RUNS
        return [_read(Path(s.end_profiling())) for s in sessions]


def _session(model: str | bytes | os.PathLike[str], prefix: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = prefix
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _read(path: Path) -> list[NodeTime]:
    events = json.loads(path.read_text(encoding="utf-8"))
    durations: dict[str, list[float]] = defaultdict(list)
    about: dict[str, dict[str, object]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            durations[event["name"]].append(event["dur"])
            about[event["name"]] = event["args"]
    return [_summary(name, values, about[name]) for name, values in durations.items()]


def _summary(name: str, values: list[float], args: dict[str, object]) -> NodeTime:
    fastest = sorted(values[_WARM_UP:])[: max(1, len(values) // 4)]
    shapes = [_shape(s) for s in args["input_type_shape"]]  # type: ignore[attr-defined]
    outputs = [_shape(s) for s in args["output_type_shape"]]  # type: ignore[attr-defined]
    microseconds = statistics.fmean(fastest) + 0.5  # the profiler cuts off the fraction
    return NodeTime(
        name.removesuffix("_kernel_time"),
        str(args["op_name"]),
        microseconds * 1000,
        shapes,
        outputs[0] if outputs else (),
    )


def _shape(typed: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    return tuple(next(iter(typed.values()), ()))
