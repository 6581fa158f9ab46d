"""Quantize the weights of a model that is larger than memory should have to be.

``python scripts/large_model.py --gigabytes 3`` makes a model of as many layers as that takes, with
external data that is a hole in a file, quantizes it to 4 bits and prints the peak of resident
memory beside the size of the model.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

import qwrap

WIDTH = 2048
MIB = 1 << 20


def make(path: Path, layers: int, width: int = WIDTH) -> int:
    """Write a chain of products of zeros; return the bytes of its weights."""
    size = 4 * width * width
    nodes = [
        helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"], name=f"layer{i}")
        for i in range(layers)
    ]
    weights = []
    for i in range(layers):
        tensor = TensorProto(name=f"w{i}", dims=[width, width], data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights"), ("offset", i * size), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        weights.append(tensor)
    ends = [helper.make_tensor_value_info(name, 1, ["B", width]) for name in ("h0", f"h{layers}")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with (path.parent / "weights").open("wb") as file:
        file.truncate(layers * size)  # a hole: it reads as zeros
    onnx.save(model, path)
    return layers * size


def quantize(source: Path, target: Path, **settings: str | int) -> dict[str, float]:
    """Quantize in a process of its own; return its seconds and the rise of its peak, in bytes."""
    command = [sys.executable, __file__, "--run", str(source), str(target), json.dumps(settings)]
    here = {**os.environ, "PYTHONPATH": str(Path(qwrap.__file__).parents[1])}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=here)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def _run(source: str, target: str, settings: str) -> None:

    import qwrap

    torch.set_num_threads(1)
    start, before = time.perf_counter(), _peak()
    qwrap.quantize_weights(source, target, **json.loads(settings))
    print(json.dumps({"seconds": time.perf_counter() - start, "bytes": _peak() - before}))


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Measure a model of the size that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--form", default="operator")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        _run(*arguments.run)
        return
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "large.onnx", Path(folder) / "large.int4.onnx"
        layers = round(arguments.gigabytes * 1e9 / (4 * WIDTH * WIDTH))
        size = make(source, layers)
        found = quantize(source, target, form=arguments.form)
        written = sum(p.stat().st_size for p in (target, target.with_name(f"{target.name}.data")))
        print(
            f"{layers} layers, {size / MIB:.0f} MiB -> {written / MIB:.0f} MiB in "
            f"{found['seconds']:.1f} s; peak memory rose by {found['bytes'] / MIB:.0f} MiB, "
            f"one layer has {4 * WIDTH * WIDTH / MIB:.0f} MiB"
        )


if __name__ == "__main__":
    main()
