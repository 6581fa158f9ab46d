"""Pairs that onnxruntime takes over what only moves, to the layers there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qwrap
from qwrap.importing.propagate import MOVERS

MOVES = {
    "Identity": "m = Identity({})",
    "MaxPool": "m = MaxPool<kernel_shape=[2,2]>({})",
    "Reshape": "m = Reshape({}, shape)",
    "Slice": "m = Slice({}, starts, ends)",
    "Squeeze": "u = Unsqueeze({}, axes) m = Squeeze(u, axes)",
    "Transpose": "m = Transpose<perm=[0,1,3,2]>({})",
    "Unsqueeze": "u = Unsqueeze({}, axes) v = Transpose<perm=[0,1,2,4,3]>(u) m = Squeeze(v, axes)",
    "Resize": 'm = Resize<mode="nearest">({},,twice)',
    "Gather": "m = Gather<axis=2>({}, chosen)",
    "DepthToSpace": "m = DepthToSpace<blocksize=1>({})",
}
PAIR = "{0}c = QuantizeLinear({0}, {1}s, {1}z) {0}d = DequantizeLinear({0}c, {1}s, {1}z) "
LAYER = "wd = DequantizeLinear(w, ws) bd = DequantizeLinear(b, bs) l = Conv({}, wd, bd) "
FORWARD = PAIR.format("x", "x") + "{} " + LAYER.format("m") + PAIR.format("l", "y")
BACKWARD = PAIR.format("x", "x") + LAYER.format("xd") + "{} " + PAIR.format("m", "y")


def build(small: Any, folder: Path, text: str, op_type: str) -> Path:
    moved = {FORWARD: "xd", BACKWARD: "l"}[text]
    output = "ld" if text == FORWARD else "md"
    nodes = text.format(MOVES[op_type].format(moved)).replace(output, "y")
    rng = np.random.default_rng(4)
    xs, ws = np.float32(0.03), np.float32(0.004)
    every = {
        "xs": np.array(xs),
        "xz": np.uint8(120),
        "ys": np.float32(0.05),
        "yz": np.uint8(130),
        "ws": np.array(ws),
        "bs": np.array(xs * ws),
        "chosen": np.array([3, 1, 2]),
        "w": rng.integers(-100, 100, (3, 3, 3, 3)).astype(np.int8),
        "b": rng.integers(-999, 999, 3).astype(np.int32),
        "shape": np.array([0, 0, -1, 1]),
        "axes": np.array([2]),
        "starts": np.zeros(2, np.int64),
        "ends": np.array([2, 3]),
        "twice": np.array([1, 1, 2, 2], np.float32),
    }
    if op_type == "Reshape":
        every["shape"] = np.array([0, 0, 4, -1])
    read = {
        name
        for node in onnx.parser.parse_graph(f"g () => () {{{nodes}}}").node
        for name in node.input
    }
    constants = {name: np.asarray(array) for name, array in every.items() if name in read}
    path = folder / "made.onnx"
    onnx.save(small.build(nodes, constants, "float[2,3,8,8] x", "float[A,B,C,D] y"), path)
    return path


@pytest.mark.parametrize("text", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("op_type", MOVES)
def test_a_layer_has_an_integer_kernel_where_onnxruntime_gives_it_one(
    small: Any, imported: Any, tmp_path: Path, text: str, op_type: str
) -> None:
    path = build(small, tmp_path, text, op_type)
    model = imported.load(path)
    assert not model.plan.notes
    small.session(path, path.with_suffix(".optimised.onnx"))
    kernels = small.operators(onnx.load(path.with_suffix(".optimised.onnx")).graph)
    fused = kernels["QLinearConv"] == 1
    assert (model.plan.nodes["/l"].role == "integer") == fused == (op_type in MOVERS)
    report = qwrap.verify(model, path, small.batches(), progress=False)
    assert report.specification.worst_step <= 1  # float sums, where nothing fuses
    assert report.deployed.differing == 0 if fused else report.deployed.worst_step <= 1
