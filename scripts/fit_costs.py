"""Measure kernels of onnxruntime here and fit the rates of qwrap/quant/placement/cost.py.

    python scripts/fit_costs.py --output measurements.csv

Prints the table of rates to paste, with the median and the worst relative error of each row.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from kernel_cases import cases
from kernel_models import Case, build
from kernel_times import NodeTime, node_times
from onnx import TensorProto, helper, shape_inference

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwrap.quant.placement.cost import Rate, Work, float_work, integer_work

Sample = tuple[Work, float]
_BORDERS = {
    "QuantizeLinear": "quantize",
    "DequantizeLinear": "dequantize",
    "ReorderInput": "float layout",
    "ReorderOutput": "float layout",
}


def measure(case: Case) -> list[Sample]:
    """Time the kernels of one case, conversions around them included."""
    models = [build(case, quantized=q).SerializeToString() for q in (False, True)]
    rng = np.random.default_rng(0)
    shapes = case.data_shapes
    inputs = {f"x{i}": rng.normal(size=s).astype(np.float32) for i, s in enumerate(shapes)}
    about = (case.op_type, shapes, output_shape(models[0]), case.weight, case.group, case.window)
    in_float, in_integers = node_times(models, inputs)
    samples = _borders(case, in_float + in_integers)
    for work, times, integer in (
        (float_work(*about), in_float, False),
        (integer_work(*about), in_integers, True),
    ):
        kernel = None if work is None else _kernel(case, times, integer)
        if work is not None and kernel is not None:
            samples.append((work, kernel.nanoseconds))
    return samples


def _kernel(case: Case, times: list[NodeTime], integer: bool) -> NodeTime | None:
    """The node that runs the operator of ``case``; None, and a line on stderr, if it was lost."""
    if case.op_type in ("MaxPool", "Transpose"):  # one name for floats and codes
        names = {case.op_type, f"Nhwc{case.op_type}"}
    elif integer:
        names = {f"QLinear{case.op_type}", f"{case.op_type}IntegerToFloat"}
    else:
        names = {case.op_type, f"Fused{case.op_type}"}
    hits = [t for t in times if t.op_type in names and not t.name.startswith("y")]
    if len(hits) != 1:
        print(f"# {case} ran as {[(t.name, t.op_type) for t in times]}", file=sys.stderr)
        return None
    return hits[0]


def _borders(case: Case, times: list[NodeTime]) -> list[Sample]:
    found = []
    for t in times:
        kernel = _BORDERS.get(t.op_type)
        if t.op_type == "Transpose" and case.op_type == "Conv":
            kernel = "integer layout"
        if kernel is not None and t.output:
            found.append((Work(kernel, written=math.prod(t.output)), t.nanoseconds))
    return found


def output_shape(model: bytes) -> tuple[int, ...]:
    """Return the shape of the first output in the layout of the file."""
    graph = shape_inference.infer_shapes(onnx.load_from_string(model)).graph
    return tuple(d.dim_value for d in graph.output[0].type.tensor_type.shape.dim)


def fit(samples: list[Sample]) -> Rate:
    """Least squares on the relative error, no coefficient below zero.

    With four coefficients the best subset can be found by trying all.
    """
    table = np.array([(1, w.macs, w.gathered, w.written) for w, _ in samples], float)
    times = np.array([t for _, t in samples])
    relative = table / times[:, None]
    best, least = np.zeros(4), math.inf
    for count in range(1, 5):
        for columns in itertools.combinations(range(4), count):
            solved = np.linalg.lstsq(relative[:, columns], np.ones(len(times)), rcond=None)[0]
            error = float(((relative[:, columns] @ solved - 1) ** 2).sum())
            if (solved >= 0).all() and error < least * 0.999:
                best, least = np.zeros(4), error
                best[list(columns)] = solved
    return Rate(*(float(f"{value:.3g}") for value in best))


def profiler_overhead(length: int = 200) -> float:
    """Nanoseconds that profiling adds to a node, found on a chain of operators on one number."""
    names = [f"v{i}" for i in range(length + 1)]
    nodes = [helper.make_node("Neg", [a], [b], b) for a, b in itertools.pairwise(names)]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in (names[0], names[-1])]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    inputs = {names[0]: np.ones(1, np.float32)}
    profiled = statistics.median(t.nanoseconds for t in node_times([model], inputs)[0])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options)
    best = math.inf
    for _ in range(300):
        start = time.perf_counter_ns()
        session.run(None, inputs)
        best = min(best, time.perf_counter_ns() - start)
    return profiled - best / length


def main() -> None:
    """Measure, fit, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="CSV file for the measurements")
    parser.add_argument("--only", help="operator type: measure its cases alone")
    args = parser.parse_args()
    rows: dict[str, list[Sample]] = defaultdict(list)
    overhead = profiler_overhead()
    print(f"# profiling: {overhead:.0f} ns per node")
    for case in cases():
        if args.only in (None, case.op_type):
            for work, nanoseconds in measure(case):
                rows[work.kernel].append((work, max(nanoseconds - overhead, 100.0)))
    for kernel, samples in sorted(rows.items()):
        rate = fit(samples)
        errors = [abs(rate.cost(w) / t - 1) for w, t in samples]
        numbers = f"{rate.fixed:g}, {rate.mac:g}, {rate.gather:g}, {rate.write:g}"
        quality = f"# {len(samples)}: {np.median(errors):.0%}, {max(errors):.0%}"
        print(f'    "{kernel}": Rate({numbers}),  {quality}')
    if args.output is not None:
        write(args.output, rows)


def write(path: Path, rows: dict[str, list[Sample]]) -> None:
    """Write one line per measurement."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["kernel", "macs", "gathered", "written", "nanoseconds"])
        for samples in rows.values():
            writer.writerows([w.kernel, w.macs, w.gathered, w.written, t] for w, t in samples)


if __name__ == "__main__":
    main()
