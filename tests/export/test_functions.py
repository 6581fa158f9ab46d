"""Model functions against the simulation, in onnxruntime without and with all optimisations."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor

import qwrap
from qwrap.config import QuantSpec
from qwrap.dtypes import QuantType, codebook_type, quant_type
from qwrap.export.functions import DOMAIN, dequantizer, fake_quantizer
from qwrap.numerics import QParams, dequantize, fake_quantize, quantize

LEVELS = onnxruntime.GraphOptimizationLevel
MODES = [LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_ALL]
LOG2 = codebook_type("log2", [0, *(2.0**-k for k in range(7)), *(-(2.0**-k) for k in range(7))])
RANDOM = np.random.default_rng(5).normal(size=200)
WIDE = codebook_type("wide", [0, *RANDOM])
ODD_SIZES = [
    codebook_type(f"book{n}", [0, *RANDOM[: n - 1]]) for n in (2, 3, 16, 31, 32, 33, 64, 65, 128)
]
INTEGERS = [quant_type(n) for n in ("int3", "uint3", "int5", "uint7", "int12", "uint15")]
TYPES = [*INTEGERS, LOG2, WIDE, *ODD_SIZES]
OPSETS = [11, 13, 15, 18, 21, 23]


def hostile_values(scale: Tensor, dtype: QuantType) -> Tensor:
    """Return ties, their neighbours, ends, and what is far beyond them."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.tensor(dtype.middles or np.arange(-20.5, 20, 0.5), dtype=torch.float32)
    ties = numbers[:, None] * scale.flatten()
    up, down = (torch.nextafter(ties, torch.tensor(e)) for e in (torch.inf, -torch.inf))
    spread = torch.randn(2000, generator=generator) * scale.max() * dtype.qmax / 2
    beyond = torch.tensor([torch.inf, -torch.inf, 3e38, -3e38, torch.nan, 0.0, 1e-40])
    return torch.cat([ties.flatten(), up.flatten(), down.flatten(), spread, beyond])


def model_of(
    nodes: Sequence[onnx.NodeProto],
    initializers: dict[str, np.ndarray],
    function: ir.Function,
    x: np.ndarray,
    opset: int = 13,
) -> onnx.ModelProto:
    kind, shape = helper.np_dtype_to_tensor_dtype(x.dtype), [f"d{i}" for i in range(x.ndim)]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, shape)],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(
        graph,
        functions=[ir.to_proto(function)],
        opset_imports=imports,
        ir_version=10 if opset >= 21 else 8,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def in_onnxruntime(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    results = []
    for mode in MODES:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = mode
        options.intra_op_num_threads = 1
        made = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        results.append(made.run(None, feed)[0])
    return results


def call(function: ir.Function, x: str = "x", y: str = "y") -> onnx.NodeProto:
    names = [x, *(v.name for v in function.inputs[1:])]
    return helper.make_node(function.name, names, [y], domain=DOMAIN)


def qparams_of(dtype: QuantType, scale: Tensor) -> dict[str, np.ndarray]:
    zeros = torch.full_like(scale, 0 if dtype.signed or dtype.codebook else 2, dtype=torch.int32)
    found = {"scale": scale.numpy()}
    return found if dtype.codebook else found | {"zero_point": zeros.numpy()}


def simulated(x: Tensor, dtype: QuantType, qparams: dict[str, np.ndarray], axis: int | None):
    flat = {name: torch.from_numpy(array).flatten() for name, array in qparams.items()}
    zeros = flat.get("zero_point", torch.zeros_like(flat["scale"], dtype=torch.int32))
    spec = QuantSpec(dtype=dtype, symmetric=False, axis=axis)
    return fake_quantize(x, flat["scale"], zeros, spec)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale", [0.037, 1.0, 2.0**-62, 1e30])
def test_the_function_computes_what_the_simulation_does(dtype: QuantType, scale: float) -> None:
    qparams = qparams_of(dtype, torch.tensor(scale))
    x = hostile_values(torch.tensor(scale), dtype)
    function = fake_quantizer(dtype, ir.DataType.FLOAT, 13, "FakeQuantize")
    model = model_of([call(function)], qparams, function, x.numpy())
    expected = simulated(x, dtype, qparams, None).numpy()
    for found in in_onnxruntime(model, {"x": x.numpy()}):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(qwrap.load(model)(x).detach(), expected)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtype", [INTEGERS[0], LOG2, WIDE], ids=str)
def test_it_does_so_at_every_opset_per_axis(dtype: QuantType, opset: int) -> None:
    scale = torch.tensor([0.037, 1.0, 0.3])
    qparams = qparams_of(dtype, scale.reshape(3, 1))
    x = hostile_values(scale, dtype).expand(2, 3, -1).contiguous()
    function = fake_quantizer(dtype, ir.DataType.FLOAT, opset, "FakeQuantize")
    model = model_of([call(function)], qparams, function, x.numpy(), opset)
    expected = simulated(x, dtype, qparams, 1).numpy()
    for found in in_onnxruntime(model, {"x": x.numpy()}):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(qwrap.load(model)(x).detach(), expected)


@pytest.mark.parametrize("dtype", [INTEGERS[0], INTEGERS[1], LOG2], ids=str)
def test_half_precision_is_computed_in_float32(dtype: QuantType) -> None:
    qparams = qparams_of(dtype, torch.tensor(0.037))
    x = hostile_values(torch.tensor(0.037), dtype).to(torch.float16)
    kind = ir.DataType.FLOAT16
    function = fake_quantizer(dtype, kind, 13, "FakeQuantize")
    model = model_of([call(function)], qparams, function, x.numpy())
    for found in in_onnxruntime(model, {"x": x.numpy()}):
        np.testing.assert_array_equal(found, simulated(x, dtype, qparams, None).numpy())


@pytest.mark.parametrize("dtype", [INTEGERS[0], LOG2, WIDE], ids=str)
def test_a_matmul_on_either_side_takes_no_scale_over(dtype: QuantType) -> None:
    # onnxruntime makes MatMul -> Div(scale), and Mul(scale) -> MatMul, one FusedMatMul.
    x = hostile_values(torch.tensor(0.3), dtype)
    x = x[x.isfinite() & (x.abs() < 1e30)].reshape(-1, 1)
    identity = np.ones((1, 1), dtype=np.float32)
    function = fake_quantizer(dtype, ir.DataType.FLOAT, 13, "FakeQuantize")
    nodes = [
        helper.make_node("MatMul", ["x", "one"], ["a"]),
        call(function, "a", "b"),
        helper.make_node("MatMul", ["b", "one"], ["y"]),
    ]
    qparams = qparams_of(dtype, torch.tensor(0.3))
    model = model_of(nodes, {**qparams, "one": identity}, function, x.numpy())
    for found in in_onnxruntime(model, {"x": x.numpy()}):
        np.testing.assert_array_equal(found, simulated(x, dtype, qparams, None).numpy())


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtype", [LOG2, WIDE], ids=str)
def test_stored_indices_become_levels_times_scale(dtype: QuantType, opset: int) -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(5, generator=torch.Generator().manual_seed(1)) + 0.1
    qparams = QParams(scale, torch.zeros(5, dtype=torch.int32), 0)
    codes = quantize(weight, qparams, QuantSpec(dtype=dtype, axis=0))
    function = dequantizer(dtype, ir.DataType.FLOAT, opset, "Dequantize")
    x = np.zeros((5, 7), np.float32)
    stored = {"codes": codes.numpy(), "scale": scale.reshape(5, 1).numpy()}
    nodes = [call(function, "codes", "w"), helper.make_node("Add", ["x", "w"], ["y"])]
    model = model_of(nodes, stored, function, x, opset)
    expected = dequantize(codes, qparams, dtype).numpy()
    for found in in_onnxruntime(model, {"x": x}):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(qwrap.load(model)(torch.from_numpy(x)).detach(), expected)
