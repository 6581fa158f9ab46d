"""How long files take in onnxruntime on CPU, as a whole and kernel by kernel."""

from __future__ import annotations

import bisect
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from qwrap.errors import InputError, ModelError
from qwrap.verify.session import FATAL, NO_FUSION, RUNTIME_ERRORS

Feed = Mapping[str, npt.NDArray[Any]]
BURST = 0.03  # seconds that one session runs before the next takes over
FEWEST = 3  # runs in a burst
FASTEST = 0.1  # share of the runs that counts: other work on the machine only ever adds
FEWEST_PROFILED = 20  # runs
FAST = 0.25  # share of the profiled runs of each kernel that counts
MOST_EVENTS = 40_000  # of kernels in one profile; onnxruntime keeps a million at most
OPEN = 1 << 30  # bytes of files that are open at a time
MICROSECOND = 1e-6


@dataclass(frozen=True, slots=True)
class Kernel:
    """A node of the graph as onnxruntime runs it.

    Attributes:
        name: of the node.
        op_type: its operator.
        seconds: how long it takes, without those inside of it.
        inputs: names of the tensors it reads, constants left out.
        outputs: names of the tensors it makes.
        inner: whether it is inside another one: in a branch or a loop.
    """

    name: str
    op_type: str
    seconds: float
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    inner: bool = False


def latencies(
    paths: Sequence[Path],
    feed: Feed,
    threads: int,
    rounds: int,
    step: Callable[[], object] = lambda: None,
) -> list[float]:
    """Return seconds of one run of each file, the mean of the fastest tenth of the runs.

    Files are timed in turns, each for a moment, so that drift of the machine meets them all. With
    one thread it is processor time, which passes only while this thread runs: at rest it is that
    of the wall clock, and with other work on the machine it stays nearer to it.

    Args:
        paths: of the files.
        feed: graph input -> array.
        threads: of one operator; 0 for as many as onnxruntime takes by default.
        rounds: turns.
        step: called after each turn of each file.

    Raises:
        ModelError: onnxruntime refuses a file.
        InputError: it cannot run it on these inputs.
    """
    found: list[float] = []
    for some in _fitting(paths):
        sessions = [opened(path, threads) for path in some]
        clock = _clock(threads)
        counts = [_runs_in_a_burst(session, feed) for session in sessions]
        times: list[list[float]] = [[] for _ in sessions]
        for _ in range(rounds):
            for session, count, own in zip(sessions, counts, times, strict=True):
                own.extend(_burst(session, feed, count, clock))
                step()
        found += [_of_the_fastest(own) for own in times]
    return found


def opened(
    path: Path, threads: int, profile: Path | None = None, optimised: Path | None = None
) -> onnxruntime.InferenceSession:
    """Return a session on a file with all optimisations, or as many as it can be opened with.

    Raises:
        ModelError: onnxruntime refuses the file.
    """
    try:
        return _session(path, threads, profile, optimised, {})
    except RUNTIME_ERRORS as error:
        try:  # integer kernels that the optimiser makes for types they do not take
            return _session(path, threads, profile, optimised, {NO_FUSION: "1"})
        except RUNTIME_ERRORS:
            raise ModelError(f"{path.name}: onnxruntime refuses the file: {error}") from error


def kernels_of(path: Path, feed: Feed, threads: int, folder: Path, seconds: float) -> list[Kernel]:
    """Return the kernels that run a file, in order, with the time that each takes.

    Args:
        path: of the file.
        feed: graph input -> array.
        threads: as in ``latencies``.
        folder: for files of a moment.
        seconds: how long to run it, about.

    Raises:
        ModelError: onnxruntime refuses the file.
        InputError: it cannot run it on these inputs.
    """
    optimised = folder / "optimised.onnx"
    session = opened(path, threads, folder / "profile", optimised)
    once = max(min(_burst(session, feed, FEWEST)), MICROSECOND)
    graph = onnx.load(optimised, load_external_data=False).graph
    most = MOST_EVENTS // max(1, len(graph.node))
    count = max(FEWEST_PROFILED, min(most, int(seconds / once)))
    for _ in range(count):
        _run(session, feed)
    profile = Path(session.end_profiling())
    times = _read(json.loads(profile.read_text(encoding="utf-8")))
    profile.unlink()
    return _in_graph(graph, times)


# --- sessions ------------------------------------------------------------------------------------


def _session(
    path: Path,
    threads: int,
    profile: Path | None,
    optimised: Path | None,
    entries: Mapping[str, str],
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = FATAL
    # Threads that spin after a run would take the core from the next session in line.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{optimised.name}.data"
        )
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _fitting(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield the paths in portions that can be open at once."""
    portion: list[Path] = []
    size = 0
    for path in paths:
        own = sum(p.stat().st_size for p in (path, Path(f"{path}.data")) if p.exists())
        if portion and size + own > OPEN:
            yield portion
            portion, size = [], 0
        portion.append(path)
        size += own
    if portion:
        yield portion


def _run(session: onnxruntime.InferenceSession, feed: Feed) -> None:
    try:
        session.run(None, dict(feed))
    except RUNTIME_ERRORS as error:
        shapes = {name: list(np.shape(array)) for name, array in feed.items()}
        raise InputError(f"onnxruntime fails on inputs of shape {shapes}: {error}") from error


def _runs_in_a_burst(session: onnxruntime.InferenceSession, feed: Feed) -> int:
    once = statistics.median(_burst(session, feed, FEWEST))
    return max(FEWEST, int(BURST / max(once, MICROSECOND)))


def _burst(
    session: onnxruntime.InferenceSession,
    feed: Feed,
    count: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    _run(session, feed)  # caches still hold the weights of the session before
    given, times = dict(feed), []
    for _ in range(count):
        start = clock()
        session.run(None, given)
        times.append(clock() - start)
    return times


def _clock(threads: int) -> Callable[[], float]:
    """Return what tells the seconds that a run takes: of its thread, if it has only one."""
    fine = time.get_clock_info("thread_time").resolution <= MICROSECOND
    return time.thread_time if threads == 1 and fine else time.perf_counter


def _of_the_fastest(times: Sequence[float]) -> float:
    count = max(1, int(len(times) * FASTEST))
    return statistics.fmean(sorted(times)[:count])


# --- profiles ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Time:
    op_type: str
    seconds: float
    inner: bool


def _read(events: Sequence[Mapping[str, Any]]) -> dict[str, _Time]:
    """Return the time of each node in a run, by name: of its fastest runs, without its insides."""
    starts = [e["ts"] for e in events if e["name"] == "model_run"]
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    kernels.sort(key=lambda e: (e["ts"], -e["dur"]))
    runs: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    about: dict[str, tuple[str, bool]] = {}
    around: list[tuple[int, str]] = []  # end and name of the kernels that the present one is in
    for event in kernels:
        start, name = event["ts"], event["name"].removesuffix("_kernel_time")
        run = bisect.bisect_right(starts, start)
        while around and around[-1][0] <= start:
            around.pop()
        inner = bool(around) and _holds(about[around[-1][1]][0])
        took = event["dur"] + 0.5  # the profiler cuts off the fraction of a microsecond
        runs[name][run] += took
        if inner:
            runs[around[-1][1]][run] -= took
        about[name] = event["args"]["op_name"], inner
        around.append((start + event["dur"], name))
    return {
        name: _Time(about[name][0], _fast(list(times.values())) * MICROSECOND, about[name][1])
        for name, times in runs.items()
    }


def _fast(times: Sequence[float]) -> float:
    """Return the mean of the fastest runs: other work on the machine only ever adds."""
    count = max(1, int(len(times) * FAST))
    return max(statistics.fmean(sorted(times)[:count]), 0.0)


def _holds(op_type: str) -> bool:
    return op_type in ("If", "Loop", "Scan")


def _in_graph(graph: onnx.GraphProto, times: Mapping[str, _Time]) -> list[Kernel]:
    """Return kernels with the names of their tensors, which profiles do not have."""
    nodes = {node.name: node for node in _nodes(graph)}
    constants = {name for part in _graphs(graph) for name in (t.name for t in part.initializer)}
    found = []
    for name, taken in times.items():
        node = nodes.get(name)
        inputs = () if node is None else tuple(i for i in node.input if i and i not in constants)
        outputs = () if node is None else tuple(o for o in node.output if o)
        found.append(Kernel(name, taken.op_type, taken.seconds, inputs, outputs, taken.inner))
    return found


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _graphs(inner)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for part in _graphs(graph):
        yield from part.node
