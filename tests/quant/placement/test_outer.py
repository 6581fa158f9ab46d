"""First and last layers at 8 bits between layers of fewer."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

import qwrap
from qwrap.config import QuantSpec
from qwrap.quant.placement.outer import at_8_bits

RESNET = """
    c1 = Conv<pads=[1,1,1,1]>(x, w1, b1) r1 = Relu(c1)
    c2 = Conv<pads=[1,1,1,1], strides=[2,2]>(r1, w2, b2) r2 = Relu(c2)
    c3 = Conv<pads=[1,1,1,1]>(r2, w3, b3)
    c4 = Conv<strides=[2,2]>(r1, w4, b4)
    s = Add(c3, c4) r3 = Relu(s)
    g = GlobalAveragePool(r3) f = Flatten(g) y = Gemm<transB=1>(f, w5, b5)
"""
WEIGHTS = {
    "w1": (8, 3, 3, 3), "w2": (8, 8, 3, 3), "w3": (8, 8, 3, 3), "w4": (8, 8, 1, 1), "w5": (5, 8),
    "b1": (8,), "b2": (8,), "b3": (8,), "b4": (8,), "b5": (5,),
}  # fmt: skip


def resnet(small):
    return small.build(RESNET, WEIGHTS, outputs="float[N,5] y", opset=21)


def config(activation="uint4", weight="int4", **settings):
    return qwrap.QConfig(activation=activation, weight=weight, first_last_8bit=True, **settings)


def prepared(source, asked):
    model = qwrap.load(source)
    return model, qwrap.prepare(model, asked)


def activations(plan):
    return {key: str(tensor.spec.dtype) for key, tensor in plan.tensors.items()}


def weights(plan):
    return {constant.value: constant.spec for constant in plan.constants.values()}


def test_a_resnet_has_8_bits_at_its_ends(small) -> None:
    _, plan = prepared(resnet(small), config())
    assert activations(plan) == {
        "x": "uint8", "r1": "uint4", "r2": "uint4", "c3": "uint4", "c4": "uint4", "r3": "uint4",
        "g": "uint8", "f": "uint8",
    }  # fmt: skip
    types = {name: str(spec.dtype) for name, spec in weights(plan).items()}
    assert types == {"w1": "int8", "w2": "int4", "w3": "int4", "w4": "int4", "w5": "int8"}
    assert "note:      first and last layers, at 8 bits: /c1, /y" in plan.summary()
    assert weights(plan)["w1"] == QuantSpec(dtype="int8", axis=0, narrow_range=True)


def test_without_it_all_have_what_was_asked(small) -> None:
    asked = config()
    asked.first_last_8bit = False
    _, plan = prepared(resnet(small), asked)
    assert set(activations(plan).values()) == {"uint4"}
    assert {str(spec.dtype) for spec in weights(plan).values()} == {"int4"}


@pytest.mark.parametrize(("activation", "weight"), [("uint8", "int8"), ("uint16", "int16")])
def test_types_of_8_bits_and_more_stay(small, activation, weight) -> None:
    _, plan = prepared(resnet(small), config(activation, weight))
    _, other = prepared(resnet(small), qwrap.QConfig(activation=activation, weight=weight))
    assert plan.to_dict() == other.to_dict()


def test_tensors_of_one_scale_agree_and_every_layer_reads_one_type(small) -> None:
    nodes = """
        t = Transpose<perm=[0,2,1]>(x) a = MatMul(t, w1)
        r = Reshape(a, shape) b = MatMul(r, w2)
        p = Transpose<perm=[0,2,1]>(b) q = Transpose<perm=[0,2,1]>(p) y = MatMul(q, w3)
        z = Transpose<perm=[0,2,1]>(b)
    """
    made = {"w1": (6, 6), "w2": (6, 6), "w3": (6, 4), "shape": np.array([0, -1, 6])}
    source = small.build(nodes, made, "float[N,6,6] x", "float[N,6,4] y, float[N,6,6] z", 21)
    _, plan = prepared(source, config())
    sources = {plan.tensors[key].source for key in plan.tensors}
    assert sources == {"t", "a", "b"}
    found = activations(plan)
    assert all(found[key] == found[tensor.source] for key, tensor in plan.tensors.items())
    assert (found["t"], found["a"], found["b"]) == ("uint8", "uint4", "uint8")


def test_a_table_in_front_and_an_activation_behind_have_8_bits(small) -> None:
    nodes = """
        t = Gather(table, x) a = MatMul(t, w1) b = MatMul(a, w2)
        p = Unsqueeze(b, axis) c = Conv(p, w3) d = Clip(c, low, high) y = Flatten(d)
    """
    made = {
        "table": (2**14, 6), "w1": (6, 6), "w2": (6, 8), "w3": (4, 1, 1, 1),
        "axis": np.array([1]), "low": np.array(-1.0), "high": np.array(1.0),
    }  # fmt: skip
    source = small.build(nodes, made, "int64[N,5] x", "float[N,160] y", 21)
    _, plan = prepared(source, config())
    types = {name: str(spec.dtype) for name, spec in weights(plan).items()}
    assert types == {"table": "uint8", "w1": "int8", "w2": "int4", "w3": "int8"}
    assert activations(plan) == {
        "t": "uint8", "a": "uint4", "b": "uint8", "p": "uint8", "d": "uint8",
    }  # fmt: skip


def test_an_input_that_comes_in_later_makes_no_layer_a_first_one(small) -> None:
    """As the mask of an attention does in every block."""
    nodes = "a = MatMul(x, w1) b = Add(a, mask) c = MatMul(b, w2) d = MatMul(c, w3) y = Relu(d)"
    made = {"w1": (6, 6), "w2": (6, 6), "w3": (6, 6)}
    inputs = "float[N,6] x, float[N,6] mask"
    source = small.build(nodes, made, inputs, "float[N,6] y", 21)
    _, plan = prepared(source, config(scope="kernels"))
    types = {name: str(spec.dtype) for name, spec in weights(plan).items()}
    assert types == {"w1": "int8", "w2": "int4", "w3": "int8"}


def test_an_output_on_the_way_makes_no_layer_a_last_one(small) -> None:
    """As the cache of a decoder does in every block."""
    nodes = "a = MatMul(x, w1) b = MatMul(a, w2) c = MatMul(b, w3)"
    source = small.build(
        nodes, {"w1": (6, 6), "w2": (6, 6), "w3": (6, 6)}, "float[N,6] x",
        "float[N,6] b, float[N,6] c", 21,
    )  # fmt: skip
    _, plan = prepared(source, config())
    assert str(weights(plan)["w2"].dtype) == "int4"


def test_layers_in_a_branch_count(small) -> None:
    nodes = """
        c = Conv(x, w1)
        y = If(flag) <
            then_branch = then () => (float[N,8,8,8] p) { p = Conv(c, w2) },
            else_branch = other () => (float[N,8,8,8] q) { q = Identity(c) }
        >
        z = Conv(y, w3)
    """
    made = {"w1": (8, 3, 1, 1), "w2": (8, 8, 1, 1), "w3": (4, 8, 1, 1)}
    source = small.build(nodes, made, "float[N,3,8,8] x, bool flag", "float[N,4,8,8] z", 21)
    _, plan = prepared(source, config())
    types = {name: str(spec.dtype) for name, spec in weights(plan).items()}
    assert types == {"w1": "int8", "w2": "int4", "w3": "int8"}


def test_weights_alone_have_8_bits_at_the_ends_too(small) -> None:
    _, plan = prepared(resnet(small), config(None))
    types = {name: str(spec.dtype) for name, spec in weights(plan).items()}
    assert types["w1"] == types["w5"] == "int8"
    assert {types["w2"], types["w3"], types["w4"]} == {"int4"}


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [("int4", "int8"), ("uint2", "uint8"), ("int5", "int8"), ("float4e2m1", "float8e4m3fn")],
)
def test_a_narrow_type_becomes_one_of_8_bits_of_its_kind(narrow, wide) -> None:
    spec = QuantSpec(dtype=narrow, axis=1, block_size=16, scale_type="float16")
    assert at_8_bits(spec) == QuantSpec(
        dtype=wide, axis=1, block_size=16, scale_type="float16", symmetric=spec.symmetric
    )


# --- all the way ---------------------------------------------------------------------------------

LOW_BITS = [("uint8", "int4"), ("uint4", "int4"), ("uint8", "int2"), ("int4", "int4")]


def calibrated(small, activation, weight):
    model = qwrap.load(resnet(small))
    qwrap.prepare(model, config(activation, weight))
    qwrap.calibrate(model, small.batches(4), progress=False)
    return model


def train(model, batches, steps=60):
    torch.manual_seed(0)
    targets = [torch.randn(2, 5) for _ in batches]
    optimizer = torch.optim.Adam(qwrap.param_groups(model, lr=3e-3, scale_lr=1e-3))
    losses = []
    model.train()
    for step in range(steps):
        x, y = batches[step % len(batches)], targets[step % len(batches)]
        optimizer.zero_grad()
        loss = (model(torch.from_numpy(x)) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize(("activation", "weight"), LOW_BITS)
def test_low_bits_train_export_and_verify(small, tmp_path, activation, weight) -> None:
    model, batches = calibrated(small, activation, weight), small.batches(4)
    losses = train(model, batches)
    assert np.mean(losses[-8:]) < 0.7 * np.mean(losses[:8])
    path = tmp_path / "low.onnx"
    qwrap.export(model, path)
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    report = qwrap.verify(model, path, batches, progress=False)
    assert report.passed(), report


def test_the_file_holds_codes_of_both_widths(small, quantized) -> None:
    made = quantized(resnet(small), config=config("uint4", "int4"))
    types = {t.name: numpy_helper.to_array(t).dtype.name for t in made.file().graph.initializer}
    assert types["w1_quantized"] == types["w5_quantized"] == "int8"
    assert types["w2_quantized"] == "int4"
    assert types["x_zero_point"] == types["g_zero_point"] == "uint8"
    assert types["r1_zero_point"] == "uint4"


SYMMETRIC = QuantSpec(dtype="int4")


@pytest.mark.parametrize("activation", ["uint8", "uint4", SYMMETRIC])
@pytest.mark.parametrize(
    "nodes",
    [
        "a = Conv(x, w1) b = Relu(a) c = Conv(b, w2) d = Relu(c) e = Conv(d, w3) y = Relu(e)",
        "a = Conv(x, w1) b = Conv(a, w2) c = Add(a, b) d = Conv(c, w3) y = Clip(d, low, high)",
        "a = Conv(x, w1) b = Conv(a, w2) c = Concat<axis=1>(x, b) y = Conv(c, w4)",
    ],
)
def test_every_end_verifies(small, quantized, nodes, activation) -> None:
    made = {
        "w1": (3, 3, 1, 1), "w2": (3, 3, 1, 1), "w3": (4, 3, 1, 1), "w4": (4, 6, 1, 1),
        "low": np.array(0.0), "high": np.array(1.0),
    }  # fmt: skip
    source = small.build(nodes, {k: v for k, v in made.items() if k in nodes}, opset=21)
    assert quantized(source, config=config(activation)).verify().passed()


@pytest.mark.parametrize("activation", ["uint8", "uint4"])
def test_a_bias_behind_the_first_and_last_product_verifies(small, quantized, activation) -> None:
    nodes = """
        a = MatMul(x, w1) a1 = Add(a, b1) b = MatMul(a1, w2) b0 = Add(b, b2)
        c = MatMul(b0, w3) y = Add(c, b3)
    """
    made = {"w1": (6, 6), "w2": (6, 6), "w3": (6, 6), "b1": (6,), "b2": (6,), "b3": (6,)}
    source = small.build(nodes, made, "float[4,6] x", "float[4,6] y", 21)
    batches = small.batches(3, (4, 6))
    made = quantized(source, batches, config(activation, scope="kernels"))
    report = made.verify()
    assert report.passed(), report
    assert made.operators()["QGemm"] == 1  # the last product with its bias
