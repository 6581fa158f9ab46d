"""Time the packing and rounding of weights beside onnxruntime.quantization's, in one process.

``python scripts/bench_nbits.py`` prints, for each task, the shortest of some interleaved runs of
both, on one thread, and their ratio.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
import onnxruntime.quantization.matmul_bnb4_quantizer as incumbent_bnb4
import onnxruntime.quantization.matmul_nbits_quantizer as incumbent
import torch
from onnx import helper
from onnxruntime.quantization.neural_compressor import weight_only as incumbent_compressor
from onnxruntime.quantization.quant_utils import pack_bytes_to_4bit as incumbent_pack

import qwrap.ort.matmul_bnb4_quantizer as bnb4
import qwrap.ort.matmul_nbits_quantizer as nbits
from qwrap.nbits.packing import pack
from qwrap.ort.neural_compressor import weight_only as compressor

Task = Callable[[], object]


def best(ours: Task, theirs: Task, rounds: int) -> tuple[float, float]:
    """Return the shortest run of each, in seconds; they take turns."""
    found = [float("inf")] * 2
    for _ in range(rounds):
        for i, task in enumerate((ours, theirs)):
            start = time.perf_counter()
            task()
            found[i] = min(found[i], time.perf_counter() - start)
    return found[0], found[1]


def layer(size: int) -> onnx.ModelProto:
    """One product with a constant ``[size, size]``."""
    weight = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    ends = [helper.make_tensor_value_info(name, 1, ["B", size]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")],
        "layer",
        ends[:1],
        ends[1:],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def processed(module: object, name: str, model: onnx.ModelProto, **settings: object) -> None:
    """Quantize a copy of ``model``."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    getattr(module, name)(copy, **settings).process()


def tasks(size: int) -> dict[str, tuple[Task, Task]]:
    """What is timed: of ours, then of theirs."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, 1_000_000).astype(np.uint8)
    raw, weight = codes.tobytes(), rng.normal(size=(size, size)).astype(np.float32)
    model = layer(size)
    found: dict[str, tuple[Task, Task]] = {
        "pack 1e6 values of 4 bits": (partial(pack, codes, 4), partial(incumbent_pack, raw))
    }
    for bits in (2, 4, 8):
        for form in ("QOperator", "QDQ") if bits == 4 else ("QOperator",):
            both = [
                partial(
                    processed,
                    module,
                    "MatMulNBitsQuantizer",
                    model,
                    bits=bits,
                    quant_format=module.QuantFormat[form],
                )
                for module in (nbits, incumbent)
            ]
            found[f"layer {size}x{size}, {bits} bits, {form}"] = (both[0], both[1])
    both = [
        partial(processed, m, "MatMulBnb4Quantizer", model, quant_type=1, block_size=64)
        for m in (bnb4, incumbent_bnb4)
    ]
    found[f"layer {size}x{size}, NF4"] = (both[0], both[1])
    both = [
        partial(m.DefaultWeightOnlyQuantizer.quantize_ndarray, weight, 1, 32, False)
        for m in (nbits, incumbent)
    ]
    found[f"table {size}x{size}, blocks of 32"] = (both[0], both[1])
    both = [
        partial(m.quant_tensor, weight, 4, 32, "asym", "uint")
        for m in (compressor, incumbent_compressor)
    ]
    found[f"RTN groups of {size}x{size}"] = (both[0], both[1])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    print(f"{'task':40} {'qwrap':>10} {'incumbent':>10} {'faster':>8}")
    for name, (ours, theirs) in tasks(arguments.size).items():
        a, b = best(ours, theirs, arguments.rounds)
        print(f"{name:40} {a * 1e3:8.1f}ms {b * 1e3:8.1f}ms {b / a:7.1f}x")


if __name__ == "__main__":
    main()
