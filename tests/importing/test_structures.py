"""Graphs as other tools write them, and as none should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import qwrap
from qwrap.model.points import ValuePoint

I8, U8 = np.int8, np.uint8


def codes(*shape: int, dtype: type = I8, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(-100, 100, shape).astype(dtype)


def numbers(*shape: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.3, shape).astype(np.float32)


def f32(*values: float) -> np.ndarray:
    return np.array(values if len(values) > 1 else values[0], np.float32)


XS = {"xs": f32(0.03), "xz": U8(120)}
YS = {"ys": f32(0.05), "yz": U8(130)}
X = "xc = QuantizeLinear(x, xs, xz) xd = DequantizeLinear(xc, xs, xz) "
WEIGHT = {"wc": codes(4, 3, 3, 3), "ws": f32(0.004)}
W = "wd = DequantizeLinear(wc, ws) "
# name -> nodes, constants, outputs, sources of scales, notes
STRUCTURES: dict[str, tuple[str, dict[str, Any], str, set[str]]] = {
    "missing zero points": (
        "xc = QuantizeLinear(x, xs) xd = DequantizeLinear(xc, xs) " + W + "y = Conv(xd, wd)",
        {"xs": f32(0.01), **WEIGHT},
        "float[N,4,6,6] y",
        {"x"},
    ),
    "scales of shape [1], axis counted from the end": (
        X + "wd = DequantizeLinear<axis=-4>(wc, ws, wz) y = Conv(xd, wd)",
        {
            "xs": np.array([0.03], np.float32),
            "xz": np.array([120], U8),
            "wc": codes(4, 3, 3, 3),
            "ws": f32(0.004, 0.01, 0.02, 0.003),
            "wz": np.zeros(4, I8),
        },
        "float[N,4,6,6] y",
        {"x"},
    ),
    "scales in Constant nodes": (
        "s = Constant<value_float=0.03>() z = Constant<value=int8 {-3}>() "
        "xc = QuantizeLinear(x, s, z) xd = DequantizeLinear(xc, s, z) y = Relu(xd)",
        {},
        "float[N,3,8,8] y",
        {"x"},
    ),
    "one DequantizeLinear for each reader": (
        "xc = QuantizeLinear(x, xs, xz) xd = DequantizeLinear(xc, xs, xz) "
        "xe = DequantizeLinear(xc, xs, xz) a = Relu(xd) b = Sigmoid(xe) y = Add(a, b)",
        XS,
        "float[N,3,8,8] y",
        {"x"},
    ),
    "a pair for each reader": (
        "xc = QuantizeLinear(x, xs, xz) xd = DequantizeLinear(xc, xs, xz) "
        "xe = QuantizeLinear(x, xs, xz) xf = DequantizeLinear(xe, xs, xz) "
        "a = Relu(xd) b = Sigmoid(xf) y = Add(a, b)",
        XS,
        "float[N,3,8,8] y",
        {"x"},
    ),
    "a pair for each reader, with scales of their own": (
        "xc = QuantizeLinear(x, xs, xz) xd = DequantizeLinear(xc, xs, xz) "
        "xe = QuantizeLinear(x, ys, yz) xf = DequantizeLinear(xe, ys, yz) "
        "a = Relu(xd) b = Sigmoid(xf) y = Add(a, b)",
        XS | YS,
        "float[N,3,8,8] y",
        {"xd", "xf"},
    ),
    "one reader takes floats": (
        X + "a = Relu(xd) y = Add(a, x)",
        XS,
        "float[N,3,8,8] y",
        {"xd"},
    ),
    "codes are moved": (
        "xc = QuantizeLinear(x, xs, xz) p = MaxPool<kernel_shape=[2,2]>(xc) "
        "t = Transpose<perm=[0,2,3,1]>(p) td = DequantizeLinear(t, xs, xz) "
        "xd = DequantizeLinear(xc, xs, xz) y = Relu(td) z = Sigmoid(xd)",
        XS,
        "float[N,7,7,3] y, float[N,3,8,8] z",
        {"x"},
    ),
    "codes are padded with what stands for 0": (
        "xc = QuantizeLinear(x, xs, xz) p = Pad(xc, pads, xz) "
        "pd = DequantizeLinear(p, xs, xz) y = Relu(pd)",
        {**XS, "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
        "float[N,3,10,10] y",
        {"x"},
    ),
    "weights are stored as floats": (
        X + "wq = QuantizeLinear<axis=0>(w, ws, wz) wd = DequantizeLinear<axis=0>(wq, ws, wz) "
        "y = Conv(xd, wd, b)",
        {
            **XS,
            "w": numbers(4, 3, 3, 3),
            "ws": f32(0.004, 0.01, 0.02, 0.003),
            "wz": np.zeros(4, I8),
            "b": numbers(4),
        },
        "float[N,4,6,6] y",
        {"x"},
    ),
    "a weight is moved before it is used": (
        "a = GlobalAveragePool(x) f = Flatten(a) fc = QuantizeLinear(f, xs, xz) "
        "fd = DequantizeLinear(fc, xs, xz) wd = DequantizeLinear<axis=0>(wc, ws) "
        "t = Transpose(wd) y = MatMul(fd, t)",
        {**XS, "wc": codes(5, 3), "ws": f32(0.004, 0.01, 0.02, 0.003, 0.1)},
        "float[N,5] y",
        {"f"},
    ),
    "a weight passes an Identity": (
        X + W + "t = Identity(wd) y = Conv(xd, t)",
        {**XS, **WEIGHT},
        "float[N,4,6,6] y",
        {"x"},
    ),
    "a weight and its scale are shared": (
        X + W + "a = Conv<pads=[1,1,1,1]>(xd, wd) b = Conv<pads=[1,1,1,1]>(xd, wd, c) "
        "y = Add(a, b)",
        {**XS, "wc": codes(3, 3, 3, 3), "ws": f32(0.004), "c": numbers(3)},
        "float[N,3,8,8] y",
        {"x"},
    ),
    "other types for some readers": (
        X + "a = Relu(xd) v = QuantizeLinear(xd, vs, vz) vd = DequantizeLinear(v, vs, vz) "
        "b = Sigmoid(vd) y = Add(a, b)",
        {**XS, "vs": f32(0.05), "vz": I8(3)},
        "float[N,3,8,8] y",
        {"x"},
    ),
    "graph outputs come out of pairs": (
        X + "a = Relu(xd) ac = QuantizeLinear(a, ys, yz) y = DequantizeLinear(ac, ys, yz) "
        "z = DequantizeLinear(ac, ys, yz)",
        XS | YS,
        "float[N,3,8,8] y, float[N,3,8,8] z",
        {"x", "y"},
    ),
    "the graph input goes straight to an output": (
        "xc = QuantizeLinear(x, xs, xz) y = DequantizeLinear(xc, xs, xz)",
        XS,
        "float[N,3,8,8] y",
        {"x"},
    ),
    "a scale for each channel of an activation": (
        "xc = QuantizeLinear<axis=1>(x, xs, xz) xd = DequantizeLinear<axis=1>(xc, xs, xz) "
        "y = Relu(xd)",
        {"xs": f32(0.01, 0.02, 0.03), "xz": np.array([0, 100, 200], U8)},
        "float[N,3,8,8] y",
        {"x"},
    ),
    "one scale in the file for several tensors": (
        X + "a = Sigmoid(xd) ac = QuantizeLinear(a, xs, xz) ad = DequantizeLinear(ac, xs, xz) "
        "wd = DequantizeLinear(wc, xs) b = Conv<pads=[1,1,1,1]>(ad, wd) y = Mul(b, xs)",
        {**XS, "wc": codes(3, 3, 3, 3)},
        "float[N,3,8,8] y",
        {"x", "a"},
    ),
    "moved between pairs of one scale": (
        X + "t = Transpose(xd) tc = QuantizeLinear(t, xs, xz) td = DequantizeLinear(tc, xs, xz) "
        "y = Relu(td)",
        XS,
        "float[8,8,3,N] y",
        {"x"},
    ),
}


def made(small: Any, folder: Path, name: str, opset: int = 13) -> Path:
    nodes, constants, outputs, _ = STRUCTURES[name]
    model = small.build(nodes, constants, outputs=outputs, opset=opset)
    onnx.checker.check_model(model)
    path = folder / "made.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_is_simulated_trained_and_comes_back(
    small: Any, imported: Any, tmp_path: Path, name: str
) -> None:
    path = made(small, tmp_path, name)
    model = imported.load(path, config=imported.learning())
    assert not model.plan.notes
    assert set(model.plan.sources()) == STRUCTURES[name][3]
    x = small.batches(1)[0]
    compare(imported.run(model, x), imported.literal(path, x))
    imported.train(model, x)
    trained = path.with_suffix(".trained.onnx")
    qwrap.export(model, trained)
    assert trained.read_bytes() != path.read_bytes()
    compare(imported.run(model, x), imported.literal(trained, x))


@pytest.mark.parametrize("name", STRUCTURES)
def test_codes_are_compared_where_they_are_made(small: Any, tmp_path: Path, name: str) -> None:
    path = made(small, tmp_path, name)
    model = qwrap.load(path)
    report = qwrap.verify(model, path, small.batches(), progress=False)
    assert report.specification.differing == 0
    tensors, names = model.plan.tensors, [tensor.name for tensor in report.specification.tensors]
    compared = {tensors[name].source if name in tensors else name for name in names}
    assert compared == set(model.plan.scales())


@pytest.mark.parametrize("name", STRUCTURES)
def test_learned_zero_points_come_back(
    small: Any, imported: Any, tmp_path: Path, name: str
) -> None:
    path = made(small, tmp_path, name)
    model = qwrap.load(path, config=imported.learning("lsq+"))
    x = small.batches(1)[0]
    for _ in range(3):
        imported.train(model, x)
    trained = path.with_suffix(".trained.onnx")
    qwrap.export(model, trained)
    compare(imported.run(model, x), imported.literal(trained, x))


def test_a_zero_point_that_was_left_out_is_written_once_it_is_learned(
    small: Any, imported: Any, tmp_path: Path
) -> None:
    path = made(small, tmp_path, "missing zero points")
    model = qwrap.load(path, config=imported.learning("lsq+"))
    with torch.no_grad():
        model.tap(ValuePoint("x")).shift.fill_(0.2)
    qwrap.export(model, path.with_suffix(".trained.onnx"))
    graph = onnx.load(path.with_suffix(".trained.onnx")).graph
    (added,) = [t for t in graph.initializer if t.name not in STRUCTURES["missing zero points"][1]]
    assert numpy_helper.to_array(added) == np.array(51, U8)  # a fifth of the 255 steps
    assert [list(n.input)[2:] for n in graph.node] == [[added.name], [added.name], [], []]


# --- what stays ----------------------------------------------------------------------------------

STAYING: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "codes go to an integer operator": (
        "xc = QuantizeLinear(x, xs, xz) i = ConvInteger(xc, wc, xz) y = Cast<to=1>(i)",
        {**XS, "wc": codes(4, 3, 3, 3)},
        "float[N,4,6,6] y",
        "xc' stays as it is: ConvInteger '/i' computes with its codes",
    ),
    "codes are a graph output": (
        X + "y = Identity(xc)",
        XS,
        "uint8[N,3,8,8] y, float[N,3,8,8] xd",
        "xc' stays as it is: its codes are a graph output",
    ),
    "the scale is computed": (
        "xs = ReduceMax<keepdims=0>(x) xc = QuantizeLinear(x, xs) y = DequantizeLinear(xc, xs)",
        {},
        "float[N,3,8,8] y",
        "xc' stays as it is: its scale is computed while the model runs",
    ),
    "codes are computed": (
        "xc, s, z = DynamicQuantizeLinear(x) y = DequantizeLinear(xc, s, z)",
        {},
        "float[N,3,8,8] y",
        "y' stays as it is: its codes are computed",
    ),
    "codes mean something else behind": (
        "xc = QuantizeLinear(x, xs, xz) y = DequantizeLinear(xc, ys, yz)",
        XS | YS,
        "float[N,3,8,8] y",
        "xc' stays as it is: DequantizeLinear '/y' gives its codes another meaning",
    ),
    "a bias of another scale": (
        X + W + "bd = DequantizeLinear(bc, bs) y = Conv(xd, wd, bd)",
        {**XS, **WEIGHT, "bc": codes(4, dtype=np.int32), "bs": f32(0.001)},
        "float[N,4,6,6] y",
        "bd' stays as it is: its scale is not that of its activation times that of its weight",
    ),
    "a scale of zero": (
        X + "wd = DequantizeLinear<axis=0>(wc, ws) y = Conv(xd, wd)",
        {**XS, "wc": codes(4, 3, 3, 3), "ws": f32(0.0, 0.01, 0.02, 0.003)},
        "float[N,4,6,6] y",
        "wd' stays as it is: a scale of it is not a positive number",
    ),
    "a constant makes an output": (
        X + W + "y = Relu(xd)",
        {**XS, **WEIGHT},
        "float[N,3,8,8] y, float[4,3,3,3] wd",
        "wd' stays as it is: it makes a graph output of a constant",
    ),
    "a constant is quantized twice": (
        X + W + "v = QuantizeLinear(wd, ws) vd = DequantizeLinear(v, ws) y = Conv(xd, vd)",
        {**XS, **WEIGHT},
        "float[N,4,6,6] y",
        "v' stays as it is: it quantizes a constant that is stored as codes",
    ),
}


@pytest.mark.ort(358)
@pytest.mark.parametrize("name", STAYING)
def test_what_cannot_be_a_stub_is_computed_as_it_stands_and_told(
    small: Any, imported: Any, tmp_path: Path, name: str
) -> None:
    nodes, constants, outputs, note = STAYING[name]
    path = tmp_path / "made.onnx"
    onnx.save(small.build(nodes, constants, outputs=outputs), path)
    model = imported.load(path)
    x = small.batches(1)[0]
    compare(imported.run(model, x), imported.literal(path, x))
    if isinstance(model.plan, qwrap.QuantPlan):
        assert [line for line in model.plan.notes if note in line]
    else:
        assert not name.startswith("a ")  # nothing else is quantized there


def test_pairs_inside_of_branches_are_imported(small: Any, imported: Any, tmp_path: Path) -> None:
    nodes = X + (
        "s = ReduceSum<keepdims=0>(x) t = Greater(s, zero) y = If(t) <then_branch = yes () => "
        "(float[N,3,8,8] o) { b = Relu(xd) c = QuantizeLinear(b, ys, yz) "
        "o = DequantizeLinear(c, ys, yz) }, else_branch = no () => (float[N,3,8,8] p) { "
        "d = QuantizeLinear(x, ys, yz) p = DequantizeLinear(d, ys, yz) }>"
    )
    path = tmp_path / "made.onnx"
    onnx.save(small.build(nodes, {**XS, **YS, "zero": f32(0)}), path)
    model = imported.load(path)
    assert not model.plan.notes
    assert len(model.plan.sources()) == 3
    for x in small.batches(1)[0], -np.abs(small.batches(1)[0]):
        compare(imported.run(model, x), imported.literal(path, x))


def compare(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        # sums of float32 products in another order; outputs here are not quantized again
        assert np.abs(mine - other).max() <= 2e-6 * np.abs(other).max()
