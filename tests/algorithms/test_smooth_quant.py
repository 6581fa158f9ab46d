"""SmoothQuant: the function stays, outliers go, and 8 bits lose what was predicted less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import qwrap
from qwrap.algorithms.smooth_quant import ALPHAS
from qwrap.errors import ConfigError, InputError

pytestmark = pytest.mark.ort(76, 77, 78)

Array = np.ndarray[Any, Any]
FOLDED = {  # operators before the product(s) -> the weights they take
    "LayerNormalization": ("h = LayerNormalization(x, g, b)", {"g": (32,), "b": (32,)}),
    "LayerNormalization without bias": ("h = LayerNormalization(x, g)", {"g": (32,)}),
    "its parts": ("c = Mul(x, g) h = Add(c, b)", {"g": (32,), "b": (32,)}),
    "MatMul": ("h = MatMul(x, p)", {"p": (32, 32)}),
    "Relu": ("c = MatMul(x, p) d = Add(b, c) h = Relu(d)", {"p": (32, 32), "b": (32,)}),
    "gate": ("c = MatMul(x, p) s = Sigmoid(x) h = Mul(s, c)", {"p": (32, 32)}),
    "Div": ("h = Div(x, g)", {"g": (32,)}),
    "Sub": ("c = MatMul(x, p) h = Sub(c, b)", {"p": (32, 32), "b": (1,)}),
}
KEPT = {  # where nothing can be divided but by a Mul
    "input": ("h = Identity(x)", {}),
    "Sigmoid": ("h = Sigmoid(x)", {}),
    "one number": ("h = Mul(x, half)", {"half": np.array(0.5, np.float32)}),
    "Gelu": ("e = Erf(x) f = Add(e, one) c = Mul(x, f) h = Mul(c, half)",
             {"one": np.array(1, np.float32), "half": np.array(0.5, np.float32)}),
    "read twice": ("h = Mul(x, g) z2 = Sigmoid(h)", {"g": (32,)}),
    "square": ("c = MatMul(x, p) h = Mul(c, c)", {"p": (32, 32)}),
}  # fmt: skip
PRODUCTS = "y = MatMul(h, w) z = MatMul(h, v)"


def run(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> list[Array]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: list[Array] = session.run(None, dict(inputs))
    return found


def outliers(shape: tuple[int, ...], seed: int = 0, axis: int = -1) -> Array:
    """Normal values, one channel in 16 a hundred times as large."""
    x = np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)
    np.moveaxis(x, axis, 0)[::16] *= 100
    return x


def assert_same_function(model: onnx.ModelProto, smooth: qwrap.Smoothed, x: Array) -> None:
    for before, after in zip(run(model, {"x": x}), run(smooth.model, {"x": x}), strict=True):
        # Products of float32 are rounded in another place: to 1e-5 of the largest.
        assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


def dense(small: Any, before: str, weights: Mapping[str, Any]) -> onnx.ModelProto:
    stored = {**weights, "w": (32, 8), "v": (32, 5)}
    outputs = "float[N,S,8] y, float[N,S,5] z"
    if "z2" in before:
        outputs += ", float[N,S,32] z2"
    model: onnx.ModelProto = small.build(
        f"{before} {PRODUCTS}", stored, "float[N,S,32] x", outputs, opset=17
    )
    return model


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, "auto"])
@pytest.mark.parametrize("name", FOLDED)
def test_what_makes_the_input_is_divided_where_that_can_be(
    small: Any, name: str, alpha: float
) -> None:
    model = dense(small, *FOLDED[name])
    batches = [outliers((2, 5, 32), seed) for seed in range(3)]
    smooth = qwrap.smooth_quant(model, batches, alpha=alpha)
    first = ["x_smooth_mul"] if "p" in FOLDED[name][1] else []  # the input of the model itself
    assert list(smooth.inserted) == first
    names = [n.name for n in smooth.model.graph.node if n.name not in first]
    assert names == [n.name for n in model.graph.node]
    assert_same_function(model, smooth, outliers((3, 7, 32), 9))
    unfolded = qwrap.smooth_quant(model, batches, alpha=alpha, fold=False)
    assert len(unfolded.inserted) == (2 if "p" in FOLDED[name][1] else 1)
    assert_same_function(model, unfolded, outliers((3, 7, 32), 9))


@pytest.mark.ort(8)
@pytest.mark.parametrize("name", KEPT)
def test_else_a_mul_divides_it_whose_name_is_told(small: Any, name: str) -> None:
    model = dense(small, *KEPT[name])
    smooth = qwrap.smooth_quant(model, [outliers((2, 5, 32))])
    assert smooth.inserted[-1:] == ("h_smooth_mul",)
    (mul,) = [n for n in smooth.model.graph.node if n.name == "h_smooth_mul"]
    assert (*mul.input, *mul.output) == ("h", "h_smooth_scale", "h_smooth_output")
    readers = [n.name for n in smooth.model.graph.node if mul.output[0] in n.input]
    assert readers == ["/y", "/z"]
    onnx.checker.check_model(smooth.model, full_check=True)
    assert_same_function(model, smooth, outliers((3, 7, 32), 9))


CONVS = {
    "plain": ("Conv<pads=[1,1,1,1]>", (6, 16, 3, 3)),
    "strided groups": ("Conv<group=2,strides=[2,2]>", (6, 8, 3, 3)),
    "depthwise": ("Conv<group=16>", (16, 1, 3, 3)),
}


@pytest.mark.parametrize("alpha", [0.5, "auto"])
@pytest.mark.parametrize("before", ["Conv", "BatchNormalization", "MaxPool", "Sigmoid"])
@pytest.mark.parametrize("name", CONVS)
def test_channels_of_images_are_divided_too(
    small: Any, name: str, before: str, alpha: float
) -> None:
    (conv, shape), side = CONVS[name], {f"{k}_": (16,) for k in "sbm"}
    side["v_"] = np.linspace(0.5, 2, 16, dtype=np.float32)
    first = {
        "Conv": "h = Conv(x, p, q)",
        "BatchNormalization": "h = BatchNormalization(x, s_, b_, m_, v_)",
        "MaxPool": "c = Conv(x, p, q) d = Relu(c) h = MaxPool<kernel_shape=[2,2]>(d)",
        "Sigmoid": "h = Sigmoid(x)",
    }[before]
    stored = {"p": (16, 16, 1, 1), "q": (16,), "w": shape, "k": (shape[0],), **side}
    used = {key: value for key, value in stored.items() if key in f"{first} w k".replace(",", " ")}
    model = small.build(f"{first} y = {conv}(h, w, k)", used, "float[N,16,9,9] x")
    model = onnx.shape_inference.infer_shapes(model)
    smooth = qwrap.smooth_quant(model, [outliers((2, 16, 9, 9), axis=1)], alpha=alpha)
    divided = {"Conv": "x", "MaxPool": "x", "Sigmoid": "h"}
    assert smooth.inserted == tuple(f"{v}_smooth_mul" for k, v in divided.items() if k == before)
    assert_same_function(model, smooth, outliers((3, 16, 9, 9), 9, axis=1))


@pytest.mark.parametrize("alpha", [0.5, "auto"])
@pytest.mark.parametrize("attributes", ["transB=1", "transA=1", "alpha=0.5,beta=2.0"])
def test_all_forms_of_gemm_keep_their_function(small: Any, attributes: str, alpha: float) -> None:
    weights = {"p": (32, 32), "q": (32,), "w": (6, 32) if "transB" in attributes else (32, 6)}
    nodes = f"h = Gemm<beta=0.5>(x, p, q) y = Gemm<{attributes}>(h, w)"
    model = small.build(nodes, weights, "float[32,32] x", "float[32,6] y")
    smooth = qwrap.smooth_quant(model, [outliers((32, 32))], alpha=alpha)
    # Rows of the first product become channels of the second with transA: none can be divided.
    folded = "transA" not in attributes
    assert smooth.inserted == ("x_smooth_mul",) + (() if folded else ("h_smooth_mul",))
    assert_same_function(model, smooth, outliers((32, 32), 3))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_the_divisor_is_the_formula_of_the_paper(small: Any, alpha: float) -> None:
    model = dense(small, *KEPT["input"])
    x = outliers((4, 5, 32))
    smooth = qwrap.smooth_quant(model, [x[:2], x[2:]], alpha=alpha)
    arrays = {t.name: numpy_helper.to_array(t) for t in smooth.model.graph.initializer}
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    largest = np.maximum(np.abs(weights["w"]).max(1), np.abs(weights["v"]).max(1))
    scale = np.abs(x).max((0, 1)) ** alpha / largest ** (1 - alpha)
    np.testing.assert_allclose(arrays["h_smooth_scale"], 1 / scale, rtol=1e-5)
    np.testing.assert_allclose(arrays["w"], weights["w"] * scale[:, None], rtol=1e-5)
    np.testing.assert_allclose(arrays["v"], weights["v"] * scale[:, None], rtol=1e-5)


def product_error(model: onnx.ModelProto, x: Array, *, weights: bool) -> float:
    """Mean square error of the product with 8 bits for its input, and perhaps for its weights."""
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    given = x.astype(np.float64) * arrays.get("x_smooth_scale", 1.0)
    step = (given.max() - given.min()) / 255
    w = arrays["w"].astype(np.float64)
    steps = 2 * np.abs(w).max(0) / 255  # symmetric, one for each output
    rounded = np.rint(w / steps) * steps if weights else w
    return float(np.square(np.rint(given / step) * step @ rounded - given @ w).mean())


def one_outlier(channels: int = 256, size: float = 20.0) -> tuple[onnx.ModelProto, Array]:
    """Channels and weights within [-1, 1] that reach both, and one channel that is ``size`` x."""
    rng = np.random.default_rng(0)
    w = rng.uniform(-1, 1, (channels, 64)).astype(np.float32)
    x = rng.uniform(-1, 1, (4096, channels)).astype(np.float32)
    w[::2, 0], w[1::2, 0], x[0], x[1] = 1, -1, 1, -1
    x[:, 7] *= size
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "/y")
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", 1, ["N", channels])],
        [helper.make_tensor_value_info("y", 1, ["N", 64])],
        [numpy_helper.from_array(w, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), x


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
def test_eight_bits_lose_less_by_the_predicted_amount(alpha: float) -> None:
    # The step of the input falls by size / size**(1 - alpha), the weights of one channel rise by
    # size**alpha: noise of even power in all channels is weighted with the sum of their squares.
    model, x = one_outlier()
    smooth = qwrap.smooth_quant(model, [x], alpha=alpha)
    fall = product_error(model, x, weights=False)
    fall /= product_error(smooth.model, x, weights=False)
    weights = np.square(numpy_helper.to_array(model.graph.initializer[0]).astype(np.float64))
    scale = np.ones(256)
    scale[7] = 20**alpha
    risen = (weights * np.square(scale)[:, None]).sum() / weights.sum()
    assert fall == pytest.approx(20 ** (2 * alpha) / risen, rel=0.05)


@pytest.mark.parametrize("size", [5.0, 20.0, 1000.0])
def test_auto_shares_so_that_eight_bits_lose_least(size: float) -> None:
    model, x = one_outlier(size=size)
    smooth = qwrap.smooth_quant(model, [x[:2048], x[2048:]], alpha="auto")
    assert smooth.alpha["x"] in ALPHAS
    errors = [
        product_error(qwrap.smooth_quant(model, [x], alpha=alpha).model, x, weights=True)
        for alpha in ALPHAS
    ]
    # It judges by 512 rows, with one code more or less.
    assert product_error(smooth.model, x, weights=True) < 1.03 * min(errors)
    assert max(errors) > 1.1 * min(errors)


def test_channels_that_are_nothing_and_weights_that_are_nothing_do_no_harm(small: Any) -> None:
    w = np.random.default_rng(1).normal(0, 1, (32, 8)).astype(np.float32)
    w[3], w[4] = 0, 0
    model = small.build("y = MatMul(x, w)", {"w": w}, "float[N,32] x", "float[N,8] y")
    x = outliers((50, 32), 1)
    x[:, 4:6], x[:, 3] = 0, 1e4
    smooth = qwrap.smooth_quant(model, [x])
    assert_same_function(model, smooth, x)
    scale = 1 / numpy_helper.to_array(smooth.model.graph.initializer[-1])
    # Weights below 1e-5 of the largest count as that.
    assert scale[3] == pytest.approx((1e4 / (1e-5 * np.abs(w).max())) ** 0.5, rel=1e-4)
    assert scale[5] == 1
    nothing = small.build(
        "y = MatMul(x, w)", {"w": np.zeros((32, 8), np.float32)}, "float[N,32] x", "float[N,8] y"
    )
    assert_same_function(nothing, qwrap.smooth_quant(nothing, [x]), x)


def test_a_weight_that_other_nodes_read_as_well_is_copied(small: Any) -> None:
    nodes = "h = Relu(x) y = MatMul(h, w) z = MatMul(x, w) u = Mul(w, w)"
    model = small.build(
        nodes, {"w": (32, 32)}, "float[N,32] x", "float[N,32] y, float[N,32] z, float[32,32] u"
    )
    before = model.SerializeToString()
    smooth = qwrap.smooth_quant(model, [outliers((9, 32))])
    assert model.SerializeToString() == before
    assert_same_function(model, smooth, outliers((9, 32), 4))


def test_products_in_bodies_are_smoothed_where_they_are(small: Any) -> None:
    nodes = """
        y, z = Loop(three, , x) <body = inner (int64 i, bool go, float[N,32] s)
            => (bool on, float[N,32] t, float[N,32] u)
            { on = Identity(go) a = MatMul(s, w) t = Tanh(a) u = MatMul(x, w) }>
    """
    weights = {"three": np.array(3), "w": (32, 32)}
    model = small.build(nodes, weights, "float[N,32] x", "float[N,32] y, float[M,N,32] z")
    smooth = qwrap.smooth_quant(model, [outliers((5, 32))])
    assert sorted(smooth.inserted) == ["s_smooth_mul", "x_smooth_mul"]
    onnx.checker.check_model(smooth.model, full_check=True)
    assert_same_function(model, smooth, outliers((6, 32), 2))


@pytest.mark.parametrize("alpha", [0.5, "auto"])
def test_weights_may_be_constant_nodes(alpha: float) -> None:
    w = np.random.default_rng(0).normal(0, 1, (32, 8)).astype(np.float32)
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(w)),
        helper.make_node("MatMul", ["x", "w"], ["y"], "/y"),
    ]
    ends = [helper.make_tensor_value_info(name, 1, ["N", n]) for name, n in (("x", 32), ("y", 8))]
    graph = helper.make_graph(nodes, "constant", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    smooth = qwrap.smooth_quant(model, [outliers((40, 32))], alpha=alpha)
    assert smooth.inserted == ("x_smooth_mul",)
    assert_same_function(model, smooth, outliers((40, 32), 5))


def test_other_operators_are_left_alone(small: Any) -> None:
    model = small.build(
        "a = Gemm(x, p) y = MatMul(a, w)",
        {"p": (32, 32), "w": (32, 8)},
        "float[N,32] x",
        "float[N,8] y",
    )
    smooth = qwrap.smooth_quant(model, [outliers((5, 32))], op_types=("MatMul",))
    assert smooth.inserted == ()
    assert list(smooth.alpha) == ["a"]
    assert_same_function(model, smooth, outliers((6, 32), 2))


def test_data_in_files_comes_into_the_new_model(small: Any, tmp_path: Any) -> None:
    model = dense(small, *FOLDED["MatMul"])
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    original = onnx.load(tmp_path / "m.onnx")
    smooth = qwrap.smooth_quant(tmp_path / "m.onnx", [outliers((2, 5, 32))])
    assert not any(t.external_data for t in smooth.model.graph.initializer)
    assert_same_function(original, smooth, outliers((3, 7, 32), 9))


def test_it_refuses_what_it_cannot_work_with(small: Any) -> None:
    model = dense(small, *KEPT["input"])
    x = outliers((2, 5, 32))
    with pytest.raises(ConfigError, match=r"alpha=1.5: give a number from 0 to 1"):
        qwrap.smooth_quant(model, [x], alpha=1.5)
    with pytest.raises(ConfigError, match="choose from"):
        qwrap.smooth_quant(model, [x], op_types=("Mul",))
    with pytest.raises(InputError, match="no batches"):
        qwrap.smooth_quant(model, [])
    huge = dense(small, "h = Mul(x, g)", {"g": np.full(32, 3e38, np.float32)})
    with pytest.raises(InputError, match="tensor 'h': values are NaN or infinite"):
        qwrap.smooth_quant(huge, [x])
