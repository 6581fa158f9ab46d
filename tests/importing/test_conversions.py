"""A pair behind another tensor's pair: some of its readers get other codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import QuantType

import qwrap
from qwrap.quant.prepare import stub_at

BRANCHES = (
    "a = Conv<pads=[1,1,1,1]>(x, w1, b1) b = Relu(a) y = Conv<pads=[1,1,1,1]>(b, w2, b2) "
    "c = Transpose<perm=[0,2,3,1]>(b) z = Sigmoid(c) e = MaxPool<kernel_shape=[2,2]>(b) "
    "v = Conv(e, w3, b3) u = Mul(b, b)"
)
SHAPES = dict.fromkeys(("w2", "w3"), (4, 6, 3, 3)) | {"b2": (4,), "b3": (4,)}
SHAPES |= {"w1": (6, 3, 3, 3), "b1": (6,)}
OUTPUTS = "float[N,4,8,8] y, float[N,8,8,6] z, float[N,4,5,5] v, float[N,6,8,8] u"


def config(base: str, weight: str = "int8", **regions: str) -> qwrap.QConfig:
    result = qwrap.QConfig(activation=base, weight=weight, scope="all")
    for name, kind in regions.items():
        result.set(f"/{name}", activation=kind)
    return result


# What each node computes in; /c and /e only move values.
MIXTURES: dict[str, tuple[int, qwrap.QConfig]] = {
    "one reader in 16 bits": (21, config("uint8", y="uint16")),
    "most readers in 16 bits": (21, config("uint8", y="uint16", z="uint16", v="uint16")),
    "two other types": (21, config("uint8", y="uint16", u="int16")),
    "moved in another type": (21, config("uint8", z="uint16", c="uint16", v="uint16", e="uint16")),
    "one of both operands": (21, config("uint8", "int4", u="uint16")),
    "fewer bits": (21, config("uint16", y="uint8", v="uint8")),
    "4 bits": (21, config("uint8", y="int4", z="uint4")),
    "float8": (21, config("uint8", y="float8e4m3fn", v="float8e5m2")),
    "both of 8 bits": (21, config("uint8", y="int8")),
    "com.microsoft": (17, config("uint8", y="uint16", v="int16")),
}


def conversions(plan: qwrap.QuantPlan) -> dict[str, Any]:
    """What a plan says of the types of tensors, in no order."""
    found = {
        key: {c.key: (c.spec.dtype, {*c.consumers}, {*c.outputs}) for c in tensor.conversions}
        for key, tensor in plan.tensors.items()
    }
    types = {key: (t.spec.dtype, t.source) for key, t in plan.tensors.items()}
    roles = {key: (n.role, n.dtype) for key, n in plan.nodes.items()}
    return {"conversions": found, "types": types, "roles": roles, "biases": plan.biases}


def same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        # sums of float32 products in another order; a code next to a tie may move by one
        assert np.abs(mine - other).max() <= 2e-6 * np.abs(other).max()


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.filterwarnings("ignore::qwrap.QwrapWarning")  # types that have no kernels
def test_a_mixed_model_comes_back_as_it_was(
    small: Any, imported: Any, quantized: Callable[..., Any], name: str
) -> None:
    opset, wanted = MIXTURES[name]
    made = quantized(small.build(BRANCHES, SHAPES, outputs=OUTPUTS, opset=opset), config=wanted)
    model = imported.load(made.path)
    assert [*made.model.plan.conversions()]
    if "Max" in {node.op_type for node in model.graph.nodes.values()}:
        # What keeps operators apart from their pairs is in the file, and reads these for them.
        assert model.plan.scales().keys() == made.model.plan.scales().keys()
    else:
        assert conversions(model.plan) == conversions(made.model.plan)
    assert not model.plan.notes
    x = made.batches[0]
    assert all(map(np.array_equal, imported.run(model, x), imported.run(made.model, x)))
    with qwrap.exact(model), qwrap.exact(made.model):
        assert all(map(np.array_equal, imported.run(model, x), imported.run(made.model, x)))


@pytest.mark.parametrize("way", ["lsq", "lsq+"])
@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.filterwarnings("ignore::qwrap.QwrapWarning")
def test_trained_scales_of_conversions_are_written_back(
    small: Any, imported: Any, quantized: Callable[..., Any], name: str, way: str
) -> None:
    opset, wanted = MIXTURES[name]
    made = quantized(small.build(BRANCHES, SHAPES, outputs=OUTPUTS, opset=opset), config=wanted)
    model = imported.load(made.path, config=imported.learning(way))
    scales = model.plan.scales()
    before = {key: stub_at(model, model.plan.point_of(key)).scale for key in scales}
    for batch in made.batches:
        imported.train(model, batch)
    after = {key: stub_at(model, model.plan.point_of(key)).scale for key in scales}
    assert all(not torch.equal(before[key], after[key]) for key in scales)
    trained = made.path.with_suffix(".trained.onnx")
    qwrap.export(model, trained)
    report = qwrap.verify(model, trained, made.batches, progress=False)
    for tensor in (*report.specification.tensors, *report.deployed.tensors):
        # Sums of products in another order: of 16 bits, which have no kernel, a tie falls elsewhere
        allowed = 0.005 * tensor.elements if tensor.dtype.endswith("16") else 0
        assert tensor.worst_step <= 1
        assert tensor.differing <= allowed
    again = qwrap.load(trained, config=imported.learning(way))
    assert conversions(again.plan) == conversions(model.plan)
    assert all(
        map(
            np.array_equal, imported.run(again.eval(), x := made.batches[0]), imported.run(model, x)
        )
    )


# --- onnxruntime's own tool ----------------------------------------------------------------------

TO_16 = {"quant_type": QuantType.QUInt16}
SCENARIOS: dict[str, tuple[str, dict[str, Any], set[tuple[str, int]], set[int]]] = {
    "1: all readers": ("float[N,4,8,8] y, float[N,6,8,8] u", TO_16, {("/y", 0), ("/u", 0)}, set()),
    "2: some readers": (
        "float[N,4,8,8] y, float[N,6,8,8] u",
        TO_16 | {"recv_nodes": {"/y"}},
        {("/y", 0)},
        set(),
    ),
    "3: all readers, and an output": (
        "float[N,4,8,8] y, float[N,6,8,8] u, float[N,6,8,8] b",
        TO_16,
        {("/y", 0), ("/u", 0)},
        {2},
    ),
    "4: some readers, and not the output": (
        "float[N,4,8,8] y, float[N,6,8,8] u, float[N,6,8,8] b",
        TO_16 | {"recv_nodes": {"/y"}},
        {("/y", 0)},
        set(),
    ),
    "5: the output alone": ("float[N,6,8,8] b", TO_16, set(), {0}),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_conversions_by_onnxruntime_s_tool(
    small: Any, imported: Any, by_onnxruntime: Callable[..., Path], name: str
) -> None:
    outputs, convert, consumers, indices = SCENARIOS[name]
    nodes = "a = Conv<pads=[1,1,1,1]>(x, w1, b1) b = Mul(a, a) "
    if "y" in outputs:
        nodes += "y = Conv<pads=[1,1,1,1]>(b, w2, b2) u = Sigmoid(b)"
    shapes = {k: v for k, v in SHAPES.items() if k in nodes}
    overrides = {"b": [{"quant_type": QuantType.QUInt8, "convert": convert}]}
    if ("/y", 0) in consumers:
        overrides["y"] = [TO_16]
    path = by_onnxruntime(
        small.build(nodes, shapes, outputs=outputs, opset=21),
        extra_options={"TensorQuantOverrides": overrides},
    )
    model = imported.load(path, config=imported.learning())
    (found,) = model.plan.tensors["b"].conversions
    assert ({*found.consumers}, {*found.outputs}) == (consumers, indices)
    assert (found.key, str(found.spec.dtype)) == ("b_convert", "uint16")
    assert "Identity" not in {node.op_type for node in model.plan.nodes.values()}
    assert not model.plan.notes
    if consumers:
        assert model.plan.biases["/y", 2].activation == "b_convert"
    comes_back(small, imported, model, path)


def comes_back(
    small: Any, imported: Any, model: qwrap.WrappedModel, path: Path, *shape: int
) -> None:
    """What it computes is in the file, before training and after it."""
    x = small.batches(1, shape or (2, 3, 8, 8))[0]
    same(imported.run(model, x), imported.literal(path, x))
    before = {key: stub_at(model, model.plan.point_of(key)).scale for key in model.plan.scales()}
    for _ in range(3):  # steps are of one size: an even number could end where it began
        imported.train(model, x)
    for key, scale in before.items():
        assert not torch.equal(stub_at(model, model.plan.point_of(key)).scale, scale)
    trained = path.with_suffix(".trained.onnx")
    qwrap.export(model, trained)
    same(imported.run(model, x), imported.literal(trained, x))


# --- other files ---------------------------------------------------------------------------------

X = "xc = QuantizeLinear(x, xs, xz) xd = DequantizeLinear(xc, xs, xz) "
V = "vc = QuantizeLinear(xd, vs, vz) vd = DequantizeLinear(vc, vs, vz) "
CONSTANTS = {
    "xs": np.float32(0.03),
    "xz": np.uint8(120),
    "vs": np.float32(0.05),
    "vz": np.int8(3),
    "us": np.float32(0.001),
    "uz": np.uint16(30000),
    "ps": np.array([0.01, 0.02, 0.03], np.float32),
    "pz": np.array([0, 5, 100], np.int8),
    "fs": np.float32(0.02),
    "fz": np.array(0, ml_dtypes.float8_e4m3fn),
    "shape": np.array([-1, 3, 64]),
    "zero": np.float32(0),
    "four": np.int64(2),
    "yes": np.bool_(True),
}
# name -> nodes, outputs, tensor -> conversion -> its consumers and outputs; other sources
FILES: dict[str, tuple[str, str, dict[str, dict[str, tuple[set[Any], set[int]]]], set[str]]] = {
    "two conversions": (
        X + V + "uc = QuantizeLinear(xd, us, uz) ud = DequantizeLinear(uc, us, uz) "
        "a = Relu(xd) b = Sigmoid(vd) c = Tanh(ud) d = Add(a, b) y = Add(d, c)",
        "float[N,3,8,8] y",
        {"x": {"x_convert_int8": ({("/b", 0)}, set()), "x_convert_uint16": ({("/c", 0)}, set())}},
        set(),
    ),
    "two of one type": (
        X + V + "uc = QuantizeLinear(xd, xs, vz) ud = DequantizeLinear(uc, xs, vz) "
        "b = Sigmoid(vd) c = Tanh(ud) y = Add(b, c)",
        "float[N,3,8,8] y",
        {"x": {"x_convert_int8": ({("/b", 0)}, set()), "x_convert_int8_": ({("/c", 0)}, set())}},
        set(),
    ),
    "the same type and another scale": (
        X + "vc = QuantizeLinear(xd, vs, xz) vd = DequantizeLinear(vc, vs, xz) y = Relu(vd)",
        "float[N,3,8,8] y",
        {"x": {"x_convert": ({("/y", 0)}, set())}},
        set(),
    ),
    "the same once more is no conversion": (
        X + "vc = QuantizeLinear(xd, xs, xz) vd = DequantizeLinear(vc, xs, xz) y = Relu(vd)",
        "float[N,3,8,8] y",
        {},
        set(),
    ),
    "a conversion once more is none": (
        X + V + "uc = QuantizeLinear(vd, vs, vz) ud = DequantizeLinear(uc, vs, vz) "
        "a = Relu(ud) b = Sigmoid(vd) y = Add(a, b)",
        "float[N,3,8,8] y",
        {"x": {"x_convert": ({("/a", 0), ("/b", 0)}, set())}},
        set(),
    ),
    "codes of a conversion are moved": (
        X + "vc = QuantizeLinear(xd, vs, vz) r = Reshape(vc, shape) t = Transpose<perm=[0,2,1]>(r) "
        "td = DequantizeLinear(t, vs, vz) vd = DequantizeLinear(vc, vs, vz) "
        "y = Relu(td) z = Sigmoid(vd) q = Relu(xd)",
        "float[N,64,3] y, float[N,3,8,8] z, float[N,3,8,8] q",
        {"x": {"x_convert": ({("/r", 0), ("/z", 0)}, set())}},
        set(),
    ),
    "moved between pairs of a conversion": (
        X + V + "t = Transpose(vd) tc = QuantizeLinear(t, vs, vz) td = DequantizeLinear(tc, vs, vz)"
        " uc = QuantizeLinear(td, us, uz) ud = DequantizeLinear(uc, us, uz) y = Relu(ud) "
        "z = Sigmoid(td)",
        "float[8,8,3,N] y, float[8,8,3,N] z",
        {
            "x": {"x_convert": ({("/t", 0)}, set())},
            "t": {"t_convert": ({("/y", 0)}, set())},
        },
        set(),
    ),
    "one for each channel": (
        X + "vc = QuantizeLinear<axis=1>(xd, ps, pz) vd = DequantizeLinear<axis=1>(vc, ps, pz) "
        "y = Relu(vd) z = Sigmoid(xd)",
        "float[N,3,8,8] y, float[N,3,8,8] z",
        {"x": {"x_convert": ({("/y", 0)}, set())}},
        set(),
    ),
    "of what has one for each channel": (
        "xc = QuantizeLinear<axis=1>(x, ps, pz) xd = DequantizeLinear<axis=1>(xc, ps, pz) "
        + V
        + "y = Relu(vd)",
        "float[N,3,8,8] y",
        {"x": {"x_convert": ({("/y", 0)}, set())}},
        set(),
    ),
    "float8": (
        X + "vc = QuantizeLinear(xd, fs, fz) vd = DequantizeLinear(vc, fs, fz) y = Relu(vd)",
        "float[N,3,8,8] y",
        {"x": {"x_convert": ({("/y", 0)}, set())}},
        set(),
    ),
    "tensor and conversion are outputs": (
        "a = Sigmoid(x) ac = QuantizeLinear(a, xs, xz) y = DequantizeLinear(ac, xs, xz) "
        "ad = DequantizeLinear(ac, xs, xz) vc = QuantizeLinear(ad, vs, vz) "
        "z = DequantizeLinear(vc, vs, vz)",
        "float[N,3,8,8] y, float[N,3,8,8] z",
        {"y": {"y_convert": ({("/z", 0)}, set())}},
        set(),
    ),
    "a conversion is an output, and read": (
        "a = Sigmoid(x) ac = QuantizeLinear(a, xs, xz) ad = DequantizeLinear(ac, xs, xz) "
        "vc = QuantizeLinear(ad, vs, vz) y = DequantizeLinear(vc, vs, vz) z = Tanh(y) q = Relu(ad)",
        "float[N,3,8,8] y, float[N,3,8,8] z, float[N,3,8,8] q",
        {"y": {"y_convert": ({("/z", 0)}, {0})}},
        set(),
    ),
    "two pairs on one tensor of floats are no conversion": (
        X + "vc = QuantizeLinear(x, vs, vz) vd = DequantizeLinear(vc, vs, vz) "
        "a = Relu(xd) b = Sigmoid(vd) y = Add(a, b)",
        "float[N,3,8,8] y",
        {},
        {"xd", "vd"},
    ),
    "inside of branches": (
        X + "s = ReduceSum<keepdims=0>(xd) t = Greater(s, zero) y = If(t) <then_branch = n1 () => "
        "(float[N,3,8,8] o) { vc = QuantizeLinear(xd, vs, vz) o = DequantizeLinear(vc, vs, vz) }, "
        "else_branch = n2 () => (float[N,3,8,8] p) { wc = QuantizeLinear(xd, vs, vz) "
        "wd = DequantizeLinear(wc, vs, vz) p = Relu(wd) }>",
        "float[N,3,8,8] y",
        {"x": {"x_convert": (None, set())}},
        set(),
    ),
    "inside of a loop, and what it starts with": (
        X + V + "y = Loop(four, yes, vd) <body = n (int64 i, bool c, float[N,3,8,8] h) => "
        "(bool d, float[N,3,8,8] k) { d = Identity(c) uc = QuantizeLinear(xd, us, uz) "
        "ud = DequantizeLinear(uc, us, uz) g = Add(h, ud) gc = QuantizeLinear(g, xs, xz) "
        "gd = DequantizeLinear(gc, xs, xz) kc = QuantizeLinear(gd, vs, vz) "
        "k = DequantizeLinear(kc, vs, vz) }>",
        "float[N,3,8,8] y",
        {"x": {"x_convert_int8": (None, set()), "x_convert_uint16": (None, set())}},
        set(),
    ),
}


def file_of(small: Any, folder: Path, name: str) -> Path:
    nodes, outputs, _, _ = FILES[name]
    read = {word.strip(",()>") for word in nodes.replace("(", " ").split()}
    constants = {key: np.asarray(value) for key, value in CONSTANTS.items() if key in read}
    onnx.save(small.build(nodes, constants, outputs=outputs, opset=21), folder / "made.onnx")
    return folder / "made.onnx"


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_conversions_is_simulated_trained_and_comes_back(
    small: Any, imported: Any, tmp_path: Path, name: str
) -> None:
    _, _, expected, others = FILES[name]
    path = file_of(small, tmp_path, name)
    model = imported.load(path, config=imported.learning())
    assert not model.plan.notes
    found = {
        key: {c.key: ({*c.consumers}, {*c.outputs}) for c in tensor.conversions}
        for key, tensor in model.plan.tensors.items()
        if tensor.conversions and key in expected
    }
    for key, made in expected.items():
        for convert, (consumers, indices) in made.items():
            assert found[key][convert][1] == indices
            assert consumers is None or found[key][convert][0] == consumers
    assert found.keys() == expected.keys()
    assert others <= set(model.plan.sources())
    comes_back(small, imported, model, path)


def test_a_conversion_of_a_conversion_is_taken_for_a_copy(
    small: Any, imported: Any, tmp_path: Path
) -> None:
    nodes = (
        X
        + V
        + (
            "uc = QuantizeLinear(vd, us, uz) ud = DequantizeLinear(uc, us, uz) y = Relu(ud) "
            "z = Sigmoid(vd)"
        )
    )
    constants = {k: np.asarray(v) for k, v in CONSTANTS.items() if k[0] in "xvu" and len(k) == 2}
    path = tmp_path / "made.onnx"
    outputs = "float[N,3,8,8] y, float[N,3,8,8] z"
    onnx.save(small.build(nodes, constants, outputs=outputs, opset=21), path)
    model = imported.load(path, config=imported.learning())
    (note,) = model.plan.notes
    assert (
        "'/uc' converts what was converted already: it is taken for the quantization of a" in note
    )
    assert set(model.plan.scales()) == {"x", "x_convert", "ud"}
    comes_back(small, imported, model, path)


def test_codes_are_compared_before_and_behind_a_conversion_that_has_the_name_of_the_tensor(
    small: Any, tmp_path: Path
) -> None:
    path = file_of(small, tmp_path, "a conversion is an output, and read")
    model = qwrap.load(path).eval()
    report = qwrap.verify(model, path, small.batches(), isolated=True, progress=False)
    found = [(t.name, t.dtype, t.differing) for t in report.specification.tensors]
    assert found == [("y", "uint8", 0), ("y_convert", "int8", 0)]
    assert all(output.max_abs_difference < 1e-6 for output in report.specification.outputs)
    assert not report.skipped
