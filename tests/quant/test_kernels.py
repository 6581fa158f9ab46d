"""The kernels give onnxruntime's own codes; each session is checked to hold the fused operator."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from qwrap.dtypes import INT8, UINT8, UINT16, QuantType
from qwrap.errors import ConfigError
from qwrap.quant import kernels
from qwrap.quant.kernels import Grid

NUMPY = {UINT8: np.uint8, INT8: np.int8}


def grid(scale: float, zero_point: int = 128, dtype: QuantType = UINT8) -> Grid:
    return Grid(torch.tensor([scale]), zero_point, dtype)


def on_grid(g: Grid, shape: Sequence[int], seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(g.low, g.high + 1, tuple(shape), generator=rng)
    return codes.float() * g.scale


@dataclass
class QdqGraph:
    """Builds DequantizeLinear -> operator -> QuantizeLinear and runs it, optimized."""

    opset: int = 21
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, value: np.ndarray) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def parameters(self, g: Grid) -> tuple[str, str]:
        scale = self.constant(np.float32(g.scale.item()))
        return scale, self.constant(np.array(g.zero_point, NUMPY[g.dtype]))

    def activation(self, g: Grid, shape: Sequence[int]) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return self.quantized(name, g)

    def quantized(self, name: str, g: Grid) -> str:
        codes = self.node("QuantizeLinear", name, *self.parameters(g))
        return self.node("DequantizeLinear", codes, *self.parameters(g))

    def weight(self, codes: Tensor, scale: Tensor, axis: int = 0) -> str:
        zeros = np.zeros(scale.shape, codes.numpy().dtype)
        constants = (self.constant(v) for v in (codes.numpy(), scale.numpy(), zeros))
        return self.node("DequantizeLinear", *constants, axis=axis)

    def run(self, result: str, y: Grid | None, inputs: Sequence[Tensor], fused: str) -> Tensor:
        """Return the output, quantized to ``y`` if given."""
        output = self.quantized(result, y) if y else result
        info = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "g", self.inputs, [info], self.initializers)
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        feeds = {f"x{i}": x.numpy() for i, x in enumerate(inputs)}
        return torch.from_numpy(run_optimized(model, feeds, fused))


def run_optimized(model: onnx.ModelProto, inputs: dict[str, np.ndarray], fused: str) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # a file optimized for this machine is what is wanted here
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        optimized = onnx.load(options.optimized_model_filepath)
    assert fused in {n.op_type for n in optimized.graph.node}
    return session.run(None, inputs)[0]


def run_single(
    op: str,
    grids: Sequence[Grid],
    values: Sequence[Tensor],
    y: Grid | None,
    fused: str,
    *,
    opset: int = 21,
    constants: Callable[[QdqGraph], list[str]] = lambda _: [],
    **attributes: object,
) -> Tensor:
    """Run one operator on activations, followed by what ``constants`` adds to the graph."""
    graph = QdqGraph(opset)
    inputs = [graph.activation(g, v.shape) for g, v in zip(grids, values, strict=True)]
    result = graph.node(op, *inputs, *constants(graph), **attributes)
    return graph.run(result, y, values, fused)


def differing(ours: Tensor, theirs: Tensor) -> int:
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    return int((ours != theirs).sum())


def random_codes(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed)).to(
        torch.int8
    )


CONVS = {
    "plain": ((8, 6, 3, 3), {}),
    "strided": ((8, 6, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "asymmetric": ((8, 6, 3, 3), {"strides": [2, 2], "pads": [0, 1, 1, 0]}),
    "dilated": ((8, 6, 3, 3), {"dilations": [2, 1], "pads": [2, 1, 2, 1]}),
    "same_upper": ((8, 6, 3, 2), {"strides": [2, 1], "auto_pad": "SAME_UPPER"}),
    "same_lower": ((8, 6, 3, 2), {"strides": [2, 1], "auto_pad": "SAME_LOWER"}),
    "depthwise": ((6, 1, 3, 3), {"group": 6, "pads": [1, 1, 1, 1]}),
    "grouped": ((8, 3, 3, 3), {"group": 2}),
    "1d": ((8, 6, 3), {"pads": [1, 0]}),
    "3d": ((8, 6, 2, 2, 2), {}),
    "long_1d": ((4, 2, 3000), {"pads": [1500, 1499]}),
    "long": ((4, 600, 3, 3), {}),
    "long_grouped": ((4, 600, 3, 3), {"group": 2}),
}
FORMATS = {
    "u8s8": grid(0.03, 117),
    "u8_from_0": grid(0.03, 0),
    "s8s8": grid(0.03, -5, INT8),
}


def conv_case(
    shape: Sequence[int], x: Grid, y: Grid, scale: Tensor, bias: Tensor | None, **attributes: object
) -> tuple[Tensor, Tensor]:
    """Return our and onnxruntime's output of one Conv."""
    weight = random_codes(*shape)
    image = on_grid(x, (2, shape[1] * attributes.get("group", 1), *[11, 10, 7][: len(shape) - 2]))
    kernel = kernels.qlinear_conv(x, weight, scale, bias, y, **attributes)

    def constants(graph: QdqGraph) -> list[str]:
        names = [graph.weight(weight, scale)]
        return names + ([graph.weight(bias, x.scale * scale)] if bias is not None else [])

    theirs = run_single("Conv", [x], [image], y, "QLinearConv", constants=constants, **attributes)
    return kernel(image), theirs


def channel_scales(channels: int) -> Tensor:
    return torch.rand(channels, generator=torch.Generator().manual_seed(3)) * 0.01 + 0.002


def random_bias(channels: int, largest: int = 30000) -> Tensor:
    rng = torch.Generator().manual_seed(2)
    return torch.randint(-largest, largest, (channels,), generator=rng, dtype=torch.int32)


@pytest.mark.parametrize("x", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("case", CONVS)
def test_conv_gives_the_codes_of_onnxruntime(case: str, x: Grid) -> None:
    shape, attributes = CONVS[case]
    y = grid(0.7 if "long" not in case else 5.0, 100 if x.dtype is UINT8 else -3, x.dtype)
    scale, bias = channel_scales(shape[0]), random_bias(shape[0])
    assert differing(*conv_case(shape, x, y, scale, bias, **attributes)) == 0


@pytest.mark.parametrize("bias", [None, random_bias(8), random_bias(8, 2**30)])
def test_conv_ties_round_to_even_with_any_bias(bias: Tensor | None) -> None:
    # scales of powers of two: the multiplier is 2^-9, so one accumulator in 2^9 is a tie
    scale = torch.full((8,), 2.0**-6)
    y = grid(2.0**-2 if bias is None or bias.abs().max() < 2**20 else 2.0**14)
    assert differing(*conv_case((8, 6, 3, 3), grid(2.0**-5), y, scale, bias)) == 0


@pytest.mark.parametrize("zero_point", [0, 128, 200])
def test_conv_takes_uint8_weights_with_a_zero_point(zero_point: int) -> None:
    x, y, scale = grid(0.03, 117), grid(1.5), channel_scales(8)
    codes = random_codes(8, 6, 3, 3).int() + 128
    image = on_grid(x, (1, 6, 9, 9))

    def constants(g: QdqGraph) -> list[str]:
        zeros = np.full(8, zero_point, np.uint8)
        values = (codes.numpy().astype(np.uint8), scale.numpy(), zeros)
        return [g.node("DequantizeLinear", *(g.constant(v) for v in values), axis=0)]

    theirs = run_single("Conv", [x], [image], y, "QLinearConv", constants=constants)
    kernel = kernels.qlinear_conv(x, codes - zero_point, scale, None, y)
    assert differing(kernel(image), theirs) == 0


def test_conv_absorbs_relu_through_the_output_grid() -> None:
    x, y = grid(0.03, 117), grid(0.7, 0)
    weight, scale = random_codes(8, 6, 3, 3), channel_scales(8)
    image = on_grid(x, (1, 6, 9, 9))
    graph = QdqGraph()
    conv = graph.node("Conv", graph.activation(x, image.shape), graph.weight(weight, scale))
    theirs = graph.run(graph.node("Relu", conv), y, [image], "QLinearConv")
    ours = kernels.qlinear_conv(x, weight, scale, None, y)(image)
    assert ours.min() == 0
    assert differing(ours, theirs) == 0


@pytest.mark.parametrize("quantized", [True, False], ids=["codes", "float"])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("k", [40, 5000])
def test_gemm_gives_the_values_of_onnxruntime(k: int, trans_b: int, quantized: bool) -> None:
    x, y = grid(0.03, 117), grid(0.01 * k**0.5) if quantized else None
    weight = random_codes(16, k) if trans_b else random_codes(k, 16)
    scale, bias, rows = channel_scales(16), random_bias(16), on_grid(x, (20, k))
    kernel = kernels.qgemm(x, weight, scale, bias, y, transB=trans_b)

    def constants(g: QdqGraph) -> list[str]:
        return [g.weight(weight, scale, 1 - trans_b), g.weight(bias, x.scale * scale)]

    theirs = run_single("Gemm", [x], [rows], y, "QGemm", constants=constants, transB=trans_b)
    assert differing(kernel(rows), theirs) == 0


def test_gemm_transposes_its_activation() -> None:
    x, y = grid(0.03, 117), grid(1.0)
    weight, scale, columns = random_codes(40, 16), channel_scales(16), on_grid(x, (40, 20))
    theirs = run_single(
        "Gemm",
        [x],
        [columns],
        y,
        "QGemm",
        constants=lambda g: [g.weight(weight, scale, 1)],
        transA=1,
    )
    kernel = kernels.qgemm(x, weight, scale, None, y, transA=1)
    assert differing(kernel(columns), theirs) == 0


@pytest.mark.parametrize("y", [grid(2.0, 90), None], ids=["QLinearMatMul", "MatMulIntegerToFloat"])
@pytest.mark.parametrize("x", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("rows", "weights"), [((2, 7, 600), (600, 16)), ((2, 7, 30), (2, 30, 9))])
def test_matmul_by_weights_gives_the_values_of_onnxruntime(
    rows: tuple[int, ...], weights: tuple[int, ...], x: Grid, y: Grid | None
) -> None:
    y = y and grid(2.0, -4 if x.dtype is INT8 else 90, x.dtype)
    weight, scale, a = random_codes(*weights), channel_scales(weights[-1]), on_grid(x, rows)
    if len(weights) == 3:
        scale = scale[:1]
    theirs = run_single(
        "MatMul",
        [x],
        [a],
        y,
        "QLinearMatMul" if y else "MatMulIntegerToFloat",
        constants=lambda g: [
            g.weight(weight, scale if len(weights) == 2 else scale[0], len(weights) - 1)
        ],
    )
    assert differing(kernels.qlinear_matmul(x, weight, scale, y)(a), theirs) == 0


@pytest.mark.parametrize("y", [grid(0.2, 90), None], ids=["QLinearMatMul", "MatMulIntegerToFloat"])
@pytest.mark.parametrize("k", [16, 700])
def test_matmul_of_activations_gives_the_values_of_onnxruntime(k: int, y: Grid | None) -> None:
    a, b = grid(0.03, 117), grid(0.02, 0)
    left, right = on_grid(a, (2, 3, 7, k)), on_grid(b, (2, 3, k, 5), seed=1)
    fused = "QLinearMatMul" if y else "MatMulIntegerToFloat"
    theirs = run_single("MatMul", [a, b], [left, right], y, fused)
    assert differing(kernels.ActivationMatMul(a, b, y)(left, right), theirs) == 0


SCALES = [(0.03, 0.02, 0.05), (0.5, 0.5, 0.5), (0.5, 0.25, 1.0), (0.1, 0.2, 0.2), (0.013, 0.9, 0.7)]
SHAPES = {
    "same": ((256, 256), (256, 256)),
    "row": ((256, 256), (256,)),
    "column": ((1, 8, 30, 30), (8, 1, 1)),
    "first_column": ((8, 1, 1), (1, 8, 30, 30)),
    "scalar": ((70, 70), ()),
}


@pytest.mark.parametrize("dtype", [UINT8, INT8], ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_add_and_mul_give_the_codes_of_onnxruntime(
    op: str, scales: Sequence[float], shapes: Sequence[Sequence[int]], dtype: QuantType
) -> None:
    zero_points = (117, 3, 90) if dtype is UINT8 else (-7, 100, 5)
    a, b, y = (grid(s, z, dtype) for s, z in zip(scales, zero_points, strict=True))
    left, right = (
        on_grid(g, s, seed=i) for i, (g, s) in enumerate(zip((a, b), shapes, strict=True))
    )
    kernel = kernels.qlinear_add(a, b, y) if op == "Add" else kernels.QLinearMul(a, b, y)
    theirs = run_single(op, [a, b], [left, right], y, f"QLinear{op}")
    assert differing(kernel(left, right), theirs) == 0


def all_codes(g: Grid) -> Tensor:
    return g.table().reshape(1, 4, 8, 8)


@pytest.mark.parametrize("dtype", [UINT8, INT8], ids=str)
@pytest.mark.parametrize("scale", [0.01, 0.03, 0.0625, 0.1])
@pytest.mark.parametrize("op", ["Sigmoid", "LeakyRelu"])
def test_tabulated_functions_give_the_codes_of_onnxruntime(
    op: str, scale: float, dtype: QuantType
) -> None:
    zero = 128 + dtype.qmin
    x, y = grid(scale, zero, dtype), grid(1 / 256 if op == "Sigmoid" else scale / 2, zero, dtype)
    attributes = {"alpha": 0.25} if op == "LeakyRelu" else {}
    make = kernels.qlinear_sigmoid if op == "Sigmoid" else kernels.qlinear_leaky_relu
    theirs = run_single(op, [x], [all_codes(x)], y, f"QLinear{op}", **attributes)
    assert differing(make(x, y, **attributes)(all_codes(x)), theirs) == 0


@pytest.mark.parametrize(
    ("axis", "opset", "length", "scale", "y"),
    [
        (-1, 21, 32, 0.1, grid(1 / 256, 0)),
        (-1, 21, 1000, 0.05, grid(1 / 256, 0)),
        (1, 21, 5, 0.03, grid(1 / 256, 0)),
        (1, 12, 8, 0.03, grid(1 / 256, 0)),
        (-1, 21, 32, 0.1, grid(1 / 255, 3)),
        (-1, 21, 32, 0.0001, grid(1 / 8000, 0)),
        (-1, 21, 3, 0.1, grid(1 / 256, -128, INT8)),
    ],
)
def test_softmax_gives_the_codes_of_onnxruntime(
    axis: int, opset: int, length: int, scale: float, y: Grid
) -> None:
    x = grid(scale, 60 + y.dtype.qmin, y.dtype)
    values = on_grid(x, (20, 5, length))
    kernel = kernels.QLinearSoftmax(x, y, axis, flatten=opset < 13)
    theirs = run_single("Softmax", [x], [values], y, "QLinearSoftmax", opset=opset, axis=axis)
    assert differing(kernel(values), theirs) == 0


POOLS = {
    "plain": {"kernel_shape": [2, 2], "strides": [2, 2]},
    "padded": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
    "count_include_pad": {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "count_include_pad": 1},
    "ceil": {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    "ceil_padded": {"kernel_shape": [3, 3], "strides": [2, 3], "pads": [1] * 4, "ceil_mode": 1},
    "same_upper": {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    "same_lower": {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"},
    "1d": {"kernel_shape": [3]},
    "3d": {"kernel_shape": [2, 3, 2]},
}


@pytest.mark.parametrize("scales", [(0.03, 0.03), (0.03, 0.02), (0.5, 0.25)])
@pytest.mark.parametrize("dtype", [UINT8, INT8], ids=str)
@pytest.mark.parametrize("case", POOLS)
def test_average_pool_gives_the_codes_of_onnxruntime(
    case: str, dtype: QuantType, scales: Sequence[float]
) -> None:
    attributes = POOLS[case]
    x, y = (grid(s, z + dtype.qmin, dtype) for s, z in zip(scales, (117, 40), strict=True))
    image = on_grid(x, (2, 5, *[12, 13, 6][: len(attributes["kernel_shape"])]))
    theirs = run_single("AveragePool", [x], [image], y, "QLinearAveragePool", **attributes)
    assert differing(kernels.QLinearAveragePool(y=y, **attributes)(image), theirs) == 0


@pytest.mark.parametrize("scales", [(0.03, 0.02), (0.5, 0.5), (0.5, 0.25)])
@pytest.mark.parametrize("dtype", [UINT8, INT8], ids=str)
@pytest.mark.parametrize("size", [(7, 7), (8, 8), (31, 1)])
def test_global_average_pool_gives_the_codes_of_onnxruntime(
    size: tuple[int, int], dtype: QuantType, scales: Sequence[float]
) -> None:
    x, y = (grid(s, z + dtype.qmin, dtype) for s, z in zip(scales, (117, 127), strict=True))
    image = on_grid(x, (4, 500, *size))
    theirs = run_single("GlobalAveragePool", [x], [image], y, "QLinearGlobalAveragePool")
    assert differing(kernels.QLinearGlobalAveragePool(x, y)(image), theirs) == 0


@pytest.mark.parametrize("dtype", [UINT8, INT8], ids=str)
def test_concat_requantizes_what_lies_on_other_grids(dtype: QuantType) -> None:
    a, b, y = (grid(s, z + dtype.qmin, dtype) for s, z in ((0.5, 7), (0.03, 128), (0.25, 99)))
    values = [all_codes(a), all_codes(b)]
    theirs = run_single("Concat", [a, b], values, y, "QLinearConcat", axis=1)
    assert differing(kernels.QLinearConcat(y, 1)(*values), theirs) == 0


def test_where_requantizes_what_lies_on_other_grids() -> None:
    a, b, y = grid(0.5, 7), grid(0.03), grid(0.25, 99)
    left, right = all_codes(a), all_codes(b)
    condition = left > right
    graph = QdqGraph()
    inputs = [graph.activation(a, left.shape), graph.activation(b, left.shape)]
    result = graph.node("Where", graph.constant(condition.numpy()), *inputs)
    theirs = graph.run(result, y, [left, right], "QLinearWhere")
    assert differing(kernels.QLinearWhere(y)(condition, left, right), theirs) == 0


def test_a_chain_of_kernels_ends_in_the_bits_of_onnxruntime() -> None:
    x, h, s, p, y = grid(0.03, 117), grid(0.6, 0), grid(0.7, 40), grid(0.2, 0), grid(0.9)
    w1, w2, w3 = random_codes(8, 8, 3, 3), random_codes(16, 8, 1, 1), random_codes(16, 10)
    scale8, scale16, scale10 = (channel_scales(n) for n in (8, 16, 10))
    image = on_grid(x, (2, 8, 12, 12))
    graph = QdqGraph()
    inputs = graph.activation(x, image.shape)
    conv = graph.node("Conv", inputs, graph.weight(w1, scale8), pads=[1, 1, 1, 1])
    hidden = graph.quantized(graph.node("Relu", conv), h)
    total = graph.quantized(graph.node("Add", hidden, inputs), s)
    conv = graph.node("Conv", total, graph.weight(w2, scale16))
    wide = graph.quantized(graph.node("Relu", conv), h)
    pooled = graph.quantized(graph.node("GlobalAveragePool", wide), p)
    flat = graph.quantized(graph.node("Flatten", pooled), p)
    theirs = graph.run(graph.node("Gemm", flat, graph.weight(w3, scale10, 1)), y, [image], "QGemm")

    hidden = kernels.qlinear_conv(x, w1, scale8, None, h, pads=[1, 1, 1, 1])(image)
    total = kernels.qlinear_add(h, x, s)(hidden, image)
    wide = kernels.qlinear_conv(s, w2, scale16, None, h)(total)
    pooled = kernels.QLinearGlobalAveragePool(h, p)(wide)
    ours = kernels.qgemm(p, w3, scale10, None, y)(pooled.flatten(1))
    assert ours.unique().numel() > 5
    assert differing(ours, theirs) == 0


def test_empty_batches_stay_empty() -> None:
    g = grid(0.1)
    for kernel in (
        kernels.qlinear_conv(g, random_codes(4, 3, 3, 3), torch.ones(1), None, g),
        kernels.QLinearAveragePool(y=g, kernel_shape=(2, 2)),
        kernels.QLinearGlobalAveragePool(g, g),
        kernels.QLinearSoftmax(g, g),
        kernels.qlinear_sigmoid(g, g),
    ):
        assert kernel(torch.empty(0, 3, 8, 8)).shape[0] == 0


def test_a_conv_too_long_for_float32_is_cut_into_exact_parts() -> None:
    kernel = kernels.qlinear_conv(
        grid(0.03, 0), torch.full((1, 600, 3, 3), 127), torch.ones(1), None, grid(1.0)
    )
    # 600 * 9 * 127 * 255 / 2^24 = 10.4
    assert len(kernel.weights) == 11


def test_a_kernel_too_long_for_float32_is_computed_in_float64() -> None:
    weight = torch.full((1, 2, 600), 127)  # one channel alone reaches 600 * 127 * 255 > 2^24
    kernel = kernels.qlinear_conv(grid(0.03, 0), weight, torch.ones(1), None, grid(1.0))
    assert [w.dtype for w in kernel.weights] == [torch.float64]


def test_grids_of_16_bit_are_refused() -> None:
    with pytest.raises(ConfigError, match="8-bit activations; got uint16"):
        Grid(torch.ones(1), 0, UINT16)


def test_a_zero_point_outside_the_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="zero point 128 is outside int8"):
        Grid(torch.ones(1), 128, INT8)
