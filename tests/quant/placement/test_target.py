"""Every row of the target against the graph that the installed onnxruntime really runs."""

import numpy as np
import pytest

import qwrap
from qwrap.quant.placement.target import ORT_CPU

# Operators between two convolutions: what they become, and what else they need.
CONV_IN = "p = Conv(x, wi) a = Relu(p) "
CONV_OUT = " y = Conv(b, wo)"
CASES = {
    "Add": ("b = Add(a, a)", {}, "QLinearAdd"),
    "Add constant": ("b = Add(a, c)", {"c": (1, 6, 1, 1)}, "QLinearAdd"),
    "Mul": ("b = Mul(a, a)", {}, "QLinearMul"),
    "Mul constant": ("b = Mul(c, a)", {"c": (6, 1, 8)}, "QLinearMul"),
    "AveragePool": (
        "b = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(a)",
        {},
        "QLinearAveragePool",
    ),
    "GlobalAveragePool": ("b = GlobalAveragePool(a)", {}, "QLinearGlobalAveragePool"),
    "Sigmoid": ("b = Sigmoid(a)", {}, "QLinearSigmoid"),
    "LeakyRelu": ("b = LeakyRelu<alpha=0.2>(a)", {}, "QLinearLeakyRelu"),
    "Softmax": ("b = Softmax<axis=1>(a)", {}, "QLinearSoftmax"),
    "Concat": (
        "m = Conv(x, wm) k = Concat<axis=1>(a, m) b = Conv(k, wk)",
        {"wm": (2, 3, 1, 1), "wk": (6, 8, 1, 1)},
        "QLinearConcat",
    ),
    "Where": ("g = Greater(x0, z) b = Where(g, a, p)", {"z": np.zeros((), np.float32)}, None),
}
MOVING = {
    "DepthToSpace": (
        "d = DepthToSpace<blocksize=2>(a) b = Conv(d, wd)",
        {"wi": (8, 3, 1, 1), "wd": (6, 2, 1, 1)},
    ),
    "Flatten": ("f = Flatten(a) b = Gemm(f, wg)", {"wg": (384, 20)}),
    "Gather": ("b = Gather<axis=2>(a, i)", {"i": np.array([3, 1, 1, 0])}),
    "Identity": ("b = Identity(a)", {}),
    "MaxPool": ("b = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)", {}),
    "Reshape": ("b = Reshape(a, s)", {"s": np.array([0, 6, 16, 4])}),
    "Slice": (
        "b = Slice(a, s, e, i)",
        {k: np.array([v]) for k, v in (("s", 1), ("e", 7), ("i", 2))},
    ),
    "Tile": ("b = Tile(a, s)", {"s": np.array([1, 1, 2, 1])}),
    "Transpose": ("b = Transpose<perm=[0,1,3,2]>(a)", {}),
    "Expand": (
        "g = MaxPool<kernel_shape=[8,8]>(a) b = Expand(g, s)",
        {"s": np.array([1, 6, 4, 4])},
    ),
    "Resize": ('b = Resize<mode="nearest">(a, , s)', {"s": np.array([1, 1, 2, 2], np.float32)}),
    "Squeeze and Unsqueeze": ("u = Unsqueeze(a, i) b = Squeeze(u, i)", {"i": np.array([1])}),
    "Split": ("b1, b2 = Split<axis=1>(a) b = Conv(b1, wb)", {"wb": (6, 3, 1, 1)}),
    "GatherElements": ("b = GatherElements<axis=3>(a, i)", {"i": np.zeros((2, 6, 8, 3), np.int64)}),
}


def model_of(small, nodes, weights, middle=CONV_OUT):
    stored = {"wi": (6, 3, 1, 1), "wo": (4, 6, 1, 1), **weights}
    if "b = Gemm" in nodes:
        middle, output = " y = Gemm(b, wy)", "float[N,M] y"
        stored["wy"] = (20, 16)
    else:
        output = "float[N,M,H,W] y"
    text = (CONV_IN + nodes + middle).replace("x0", "x")
    used = {k: v for k, v in stored.items() if k in text}
    return small.build(text, used, outputs=output)


def check_exact(result) -> None:
    report = result.verify()
    assert report.deployed.differing == 0
    assert report.deployed.elements > 0
    # Float operators differ in the order of summation: 1e-7 relative, a tie in 1e-5 of the codes.
    assert report.specification.differing <= 1e-3 * report.specification.elements
    assert report.specification.worst_step <= 1


@pytest.mark.parametrize("name", [n for n in CASES if n != "Where"])
def test_an_elementwise_operator_runs_in_its_integer_kernel(small, quantized, name: str) -> None:
    nodes, weights, kernel = CASES[name]
    result = quantized(model_of(small, nodes, weights))
    found = result.operators()
    assert found[kernel] == 1, result.model.plan.summary()
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 1), found
    check_exact(result)


def test_where_runs_in_its_integer_kernel(small, quantized) -> None:
    nodes = "a = Conv(x, w1) c = Conv(x, w2) g = Greater(x, z) s = Slice(g, o, e, o) "
    nodes += "b = Where(s, a, c) y = Conv(b, w3)"
    weights = {"w1": (6, 3, 1, 1), "w2": (6, 3, 1, 1), "w3": (4, 6, 1, 1)}
    weights |= {"z": np.zeros((), np.float32), "o": np.array([1]), "e": np.array([2])}
    result = quantized(small.build(nodes, weights))
    found = result.operators()
    assert found["QLinearWhere"] == 1, result.model.plan.summary()
    check_exact(result)


@pytest.mark.parametrize("name", MOVING)
def test_a_moving_operator_runs_on_integers(small, quantized, name: str) -> None:
    nodes, weights = MOVING[name]
    result = quantized(model_of(small, nodes, weights))
    found = result.operators()
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, found["QGemm"] < 1), found
    assert found["Conv"] + found["Gemm"] + found["FusedConv"] == 0
    roles = {n.role for n in result.model.plan.nodes.values()}
    assert roles <= {"integer", "moves", "absorbed"}, result.model.plan.summary()
    check_exact(result)


def test_the_cases_cover_the_target() -> None:
    assert {name.split()[0] for name in CASES} == ORT_CPU.elementwise
    names = {part for name in MOVING for part in name.split(" and ")}
    assert names == ORT_CPU.moving


MATRIX = {
    "Conv": ("y = Conv<group=3>(x, w, b)", {"w": (6, 1, 3, 3), "b": (6,)}, "QLinearConv"),
    "Conv without bias": ("y = Conv(x, w)", {"w": (6, 3, 3, 3)}, "QLinearConv"),
    "Conv strided and dilated": (
        "y = Conv<strides=[2,1], dilations=[1,2], pads=[1,0,2,1]>(x, w, b)",
        {"w": (6, 3, 3, 3), "b": (6,)},
        "QLinearConv",
    ),
}


@pytest.mark.parametrize("name", MATRIX)
def test_a_convolution_runs_in_its_integer_kernel(small, quantized, name: str) -> None:
    nodes, weights, kernel = MATRIX[name]
    result = quantized(small.build(nodes, weights))
    found = result.operators()
    assert (found[kernel], found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 1, 1)
    check_exact(result)


@pytest.mark.parametrize("attributes", ["", "<transB=1>", "<transA=1>"])
@pytest.mark.parametrize("bias", [None, (20,), (1,)])
def test_gemm_runs_in_its_integer_kernel(small, quantized, attributes: str, bias) -> None:
    weights = {"w": (20, 12) if "transB" in attributes else (12, 20)}
    nodes = f"y = Gemm{attributes}(x, w{', b' if bias else ''})"
    inputs = "float[12,5] x" if "transA" in attributes else "float[N,12] x"
    shape = (12, 5) if "transA" in attributes else (5, 12)
    source = small.build(
        nodes, weights | ({"b": bias} if bias else {}), inputs=inputs, outputs="float[N,20] y"
    )
    result = quantized(source, small.batches(shape=shape))
    found = result.operators()
    assert (found["QGemm"], found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 1, 0), found
    check_exact(result)


def test_matmul_writes_float_where_floats_read_it(small, quantized) -> None:
    source = small.build("y = MatMul(x, w)", {"w": (12, 20)}, "float[N,S,12] x", "float[N,S,20] y")
    result = quantized(source, small.batches(shape=(2, 5, 12)))
    found = result.operators()
    assert found["MatMulIntegerToFloat"] == 1
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 0)
    check_exact(result)


def test_chained_matmuls_stay_in_integers(small, quantized) -> None:
    source = small.build(
        "a = MatMul(x, w) b = Relu(a) y = MatMul(b, v)",
        {"w": (12, 20), "v": (20, 16)},
        "float[N,S,12] x",
        "float[N,S,16] y",
    )
    result = quantized(source, small.batches(shape=(2, 5, 12)))
    found = result.operators()
    assert (found["QLinearMatMul"], found["MatMulIntegerToFloat"]) == (1, 1), found
    check_exact(result)


CLIPS = [(0.0, 6.0), (-1.0, 1.0), (0.0, 3.7), (-0.3, 0.9), (-2.0, 0.0)]


@pytest.mark.parametrize(("low", "high"), CLIPS)
@pytest.mark.parametrize("activation", ["uint8", "int8"])
def test_a_clip_is_absorbed(small, quantized, low: float, high: float, activation: str) -> None:
    nodes = "a = Conv(x, w1) b = Clip(a, lo, hi) y = Conv(b, w2)"
    weights = {"w1": (6, 3, 3, 3), "w2": (4, 6, 3, 3)}
    ends = {"lo": np.array(low, np.float32), "hi": np.array(high, np.float32)}
    config = qwrap.QConfig(scope="kernels", activation=activation, method="minmax")
    result = quantized(small.build(nodes, weights | ends), config=config)
    found = result.operators()
    assert (found["QLinearConv"], found["Clip"]) == (2, 0), found
    check_exact(result)


def test_a_clip_that_leaves_out_zero_stays_float(small, quantized) -> None:
    nodes = "a = Conv(x, w1) b = Clip(a, lo, hi) y = Conv(b, w2)"
    ends = {"lo": np.array(0.5, np.float32), "hi": np.array(1, np.float32)}
    result = quantized(small.build(nodes, {"w1": (6, 3, 3, 3), "w2": (4, 6, 3, 3)} | ends))
    found = result.operators()
    assert (found["QLinearConv"], found["Clip"]) == (2, 1), found
    assert result.model.plan.nodes["/b"].role == "float"
    check_exact(result)


@pytest.mark.parametrize("opset", [10, 11, 13, 18])
def test_a_zero_pad_folds_into_the_convolution(small, quantized, opset: int) -> None:
    weights = {"w": (6, 3, 3, 3), "v": (4, 6, 3, 3)}
    pad = "Pad<pads=[0,0,1,2,0,0,2,1]>(a)" if opset < 11 else "Pad(a, p)"
    weights |= {} if opset < 11 else {"p": np.array([0, 0, 1, 2, 0, 0, 2, 1])}
    result = quantized(
        small.build(f"a = Conv(x, w) b = {pad} y = Conv(b, v)", weights, opset=opset)
    )
    found = result.operators()
    assert (found["QLinearConv"], found["Pad"]) == (2, 0), found
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 1)
    check_exact(result)
