"""Measure what loading costs: seconds, and resident memory before the first forward.

python scripts/bench_load.py model.onnx …
python scripts/bench_load.py --size 2048       # a made model of that many MiB outside its file
python scripts/bench_load.py --nodes 20000     # a made chain of that many nodes
python scripts/bench_load.py --growth 5000 20000    # made graphs of all kinds, of so many nodes
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from made_graphs import GRAPHS
from onnx import TensorProto, helper, numpy_helper

MIB = 2**20


def main() -> None:
    """Load each model in a process of its own, so that one does not warm another up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--size", type=int, help="MiB of weights outside the file")
    parser.add_argument("--nodes", type=int, help="length of a chain of nodes in nested scopes")
    parser.add_argument("--growth", nargs="+", type=int, help="numbers of nodes")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.models[0])
        return
    if options.growth:
        growth(options.growth)
        return
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        if options.size:
            options.models.append(large(made / f"{options.size}MiB.onnx", options.size))
        if options.nodes:
            options.models.append(chain(made / f"{options.nodes}nodes.onnx", options.nodes))
        print(f"{'model':32} {'s':>7} {'MiB':>8} {'MiB peak':>9}", flush=True)
        for path in options.models:
            subprocess.run([sys.executable, __file__, "--one", path], check=True)


def growth(sizes: list[int]) -> None:
    """Print the seconds that graphs of each kind take at each size, the best of three."""
    import qwrap

    qwrap.load(tiny())
    print(f"{'graph':16}", *(f"{size:>8}" for size in sizes), flush=True)
    for make in GRAPHS:
        seconds = [min(timed(qwrap.load, make(size)) for _ in range(3)) for size in sizes]
        print(f"{make.__name__:16}", *(f"{s:8.2f}" for s in seconds), flush=True)


def timed(run: Callable[[onnx.ModelProto], object], model: onnx.ModelProto) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    run(model)
    return time.perf_counter() - start


def measure(path: Path) -> None:
    """Print seconds and growth of resident memory of one load."""
    import qwrap

    qwrap.load(tiny())  # imports that happen on first use are no cost of the model
    before = resident("VmRSS")
    start = time.perf_counter()
    model = qwrap.load(path)
    seconds = time.perf_counter() - start
    grown, peak = resident("VmRSS") - before, resident("VmHWM") - before
    print(f"{path.name:32} {seconds:7.2f} {grown / MIB:8.1f} {peak / MIB:9.1f}")
    assert model is not None


def resident(kind: str) -> int:
    """Return resident bytes of this process now (VmRSS) or at most (VmHWM); Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{kind}:"))
    return int(line.split()[1]) * 1024


def model_of(nodes: list[onnx.NodeProto], weights: list[TensorProto]) -> onnx.ModelProto:
    """Return a model from float32 ``x`` [1, 1024] to ``y``."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1024])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "made", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def tiny() -> onnx.ModelProto:
    """Return a model that uses what every model uses."""
    weight = numpy_helper.from_array(np.ones((1024, 4), np.float32), "w")
    return model_of([helper.make_node("MatMul", ["x", "w"], ["y"], "/fc/MatMul")], [weight])


def large(path: Path, size: int) -> Path:
    """Make a chain of products by 16 MiB matrices whose data is a hole in a file."""
    nodes, weights, last, each = [], [], "x", 16
    for i in range(0, size, 2 * each):
        for name, rows, columns in ((f"up{i}", 1024, 4096), (f"down{i}", 4096, 1024)):
            weight = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[rows, columns])
            weight.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", f"{path.name}.data"),
                ("offset", str(len(weights) * each * MIB)),
                ("length", str(each * MIB)),
            ):
                weight.external_data.add(key=key, value=value)
            weights.append(weight)
            nodes.append(helper.make_node("MatMul", [last, name], [f"t{name}"], f"/{i}/{name}"))
            last = f"t{name}"
    nodes[-1].output[0] = "y"
    path.write_bytes(model_of(nodes, weights).SerializeToString())
    with path.with_name(f"{path.name}.data").open("wb") as file:
        file.truncate(len(weights) * each * MIB)
    return path


def chain(path: Path, count: int) -> Path:
    """Make a chain of nodes in scopes of four levels, one in ten with a weight of its own."""
    nodes, weights, last = [], [], "x"
    for i in range(count):
        scope = f"/a{i // 1000}/b{i // 100}/c{i // 10}"
        output = "y" if i == count - 1 else f"t{i}"
        if i % 10 == 0:
            weights.append(numpy_helper.from_array(np.ones(1024, np.float32), f"w{i}"))
            nodes.append(helper.make_node("Add", [last, f"w{i}"], [output], f"{scope}/Add"))
        else:
            nodes.append(helper.make_node("Relu", [last], [output], f"{scope}/Relu{i}"))
        last = output
    path.write_bytes(model_of(nodes, weights).SerializeToString())
    return path


if __name__ == "__main__":
    main()
