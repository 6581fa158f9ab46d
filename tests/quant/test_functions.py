"""Types written as ONNX functions: what they compute, and what is refused."""

import copy
import pickle

import numpy as np
import onnx
import onnxscript
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnxscript import opset18 as op
from torch import Tensor

from qwrap.config import QConfig, QuantSpec
from qwrap.dtypes import QuantType
from qwrap.errors import ConfigError
from qwrap.numerics import QParams, fake_quantize, quantize
from qwrap.quant.functions import function_type

TERNARY = """
<opset_import: ["" : 13], domain: "mine"> Ternary (x, scale) => (y) {
    one = Constant <value_float = 1.0> ()
    minus_one = Neg (one)
    steps = Div (x, scale)
    below = Min (steps, one)
    inside = Max (below, minus_one)
    codes = Round (inside)
    y = Mul (codes, scale)
}"""
SHIFTED = """
<opset_import: ["" : 13], domain: "mine"> Shifted (x, scale, zero_point) => (y) {
    low = Constant <value_float = 0.0> ()
    high = Constant <value_float = 5.0> ()
    steps = Div (x, scale)
    rounded = Round (steps)
    moved = Add (rounded, zero_point)
    below = Min (moved, high)
    codes = Max (below, low)
    back = Sub (codes, zero_point)
    y = Mul (back, scale)
}"""
CLIPPED = """
<opset_import: ["" : 13], domain: "mine"> Clipped (x, scale) => (y) {
    least = Neg (scale)
    above = Max (x, least)
    y = Min (above, scale)
}"""


def proto(text: str) -> onnx.FunctionProto:
    return onnx.parser.parse_function(text)


def body(lines: str) -> onnx.FunctionProto:
    head = '<opset_import: ["" : 13], domain: "mine"> Wrong (x, scale) => (y) {'
    return proto(f"{head} {lines} }}")


def gradient_of(x: Tensor, dtype: QuantType, scale: float, zero_point: int = 0) -> Tensor:
    x = x.clone().requires_grad_()
    spec = QuantSpec(dtype=dtype, symmetric=False)
    fake_quantize(x, torch.tensor([scale]), torch.tensor([zero_point]), spec).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("scale", [0.037, 2.5])
def test_a_function_simulates_what_the_reference_evaluator_computes(scale: float) -> None:
    dtype = function_type(proto(TERNARY), -1, 1)
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * scale
    found = fake_quantize(x, torch.tensor([scale]), torch.tensor([0]), QuantSpec(dtype=dtype))
    feed = {"x": x.numpy(), "scale": np.float32(scale)}
    (expected,) = ReferenceEvaluator(proto(TERNARY)).run(None, feed, attributes={})
    np.testing.assert_array_equal(found, expected)


def test_a_function_may_have_a_zero_point() -> None:
    dtype = function_type(proto(SHIFTED), 0, 5)
    spec = QuantSpec(dtype=dtype, symmetric=False)
    assert dtype.has_zero_point
    assert not spec.symmetric
    x = torch.linspace(-3, 5, 100)
    found = fake_quantize(x, torch.tensor([0.5]), torch.tensor([2]), spec)
    assert torch.equal(found, (torch.round(x / 0.5) + 2).clamp(0, 5).sub(2) * 0.5)


def test_without_zero_point_it_is_symmetric() -> None:
    spec = QuantSpec(dtype=function_type(proto(TERNARY), -1, 1), symmetric=False)
    assert spec.symmetric


def test_each_channel_or_block_has_its_scale() -> None:
    dtype = function_type(proto(TERNARY), -1, 1)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.1, 0.3, 0.5, 0.7])
    zeros = torch.zeros(4, dtype=torch.int32)
    found = fake_quantize(x, scale, zeros, QuantSpec(dtype=dtype, axis=0))
    assert torch.equal(found, (x / scale[:, None]).clamp(-1, 1).round() * scale[:, None])
    spec = QuantSpec(dtype=dtype, axis=1, block_size=4)
    blocks = torch.rand(4, 2, generator=torch.Generator().manual_seed(1)) + 0.1
    found = fake_quantize(x, blocks, torch.zeros_like(blocks), spec)
    wide = blocks.repeat_interleave(4, 1)[:, :6]
    assert torch.equal(found, (x / wide).clamp(-1, 1).round() * wide)


def test_the_gradient_passes_straight_through_within_the_range() -> None:
    dtype = function_type(proto(TERNARY), -1, 1)
    x = torch.tensor([-0.51, -0.5, 0.0, 0.2, 0.5, 0.51])
    assert gradient_of(x, dtype, 0.5).tolist() == [0, 1, 1, 1, 1, 0]
    shifted = function_type(proto(SHIFTED), 0, 5)
    x = torch.tensor([-1.1, -1.0, 1.5, 1.6])
    assert gradient_of(x, shifted, 0.5, zero_point=2).tolist() == [0, 1, 1, 0]


def test_the_gradient_can_be_the_functions_own() -> None:
    dtype = function_type(proto(CLIPPED), -1, 1, gradient="own")
    x = torch.tensor([-0.6, -0.2, 0.4, 0.6])
    assert gradient_of(x, dtype, 0.5).tolist() == [0, 1, 1, 0]


def test_half_precision_is_computed_in_float32() -> None:
    dtype = function_type(proto(TERNARY), -1, 1)
    x = torch.randn(99, generator=torch.Generator().manual_seed(0)).half()
    args = torch.tensor([0.3]), torch.tensor([0]), QuantSpec(dtype=dtype)
    assert torch.equal(fake_quantize(x, *args), fake_quantize(x.float(), *args).half())


def test_it_compiles_in_one_graph() -> None:
    spec = QuantSpec(dtype=function_type(proto(TERNARY), -1, 1))
    args = torch.tensor([0.5]), torch.tensor([0]), spec
    compiled = torch.compile(
        lambda x: fake_quantize(x, *args), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for size in (5, 9):
        x = torch.randn(size, generator=torch.Generator().manual_seed(0))
        assert torch.equal(compiled(x), fake_quantize(x, *args))


def test_a_type_can_be_copied_pickled_and_compared() -> None:
    dtype = function_type(proto(TERNARY), -1, 1)
    for other in (copy.deepcopy(dtype), pickle.loads(pickle.dumps(dtype))):
        assert other == dtype
        assert hash(other) == hash(dtype)
        x = torch.tensor([0.7])
        assert torch.equal(other.function.compute(x, x), dtype.function.compute(x, x))
    assert function_type(proto(TERNARY), -1, 1, name="other") != dtype


MINE = onnxscript.values.Opset("mine", 1)


@onnxscript.script(MINE)
def PowerOfTwo(x, scale):
    """Round to a power of two from 2^-3 to 1, or to 0, in the logarithm."""
    magnitude = op.Min(op.Abs(op.Div(x, scale)), op.Constant(value_float=1.0))
    two = op.Constant(value_float=2.0)
    exponent = op.Round(op.Div(op.Log(magnitude), op.Log(two)))
    kept = op.GreaterOrEqual(exponent, op.Constant(value_float=-3.0))
    level = op.Where(kept, op.Pow(two, exponent), op.Constant(value_float=0.0))
    return op.Mul(op.Mul(op.Sign(x), level), scale)


def test_a_function_of_onnxscript_will_do() -> None:
    dtype = function_type(PowerOfTwo, -1, 1)
    x = torch.tensor([0.0, 0.04, 0.1, -0.13, 0.3, 0.8, -5.0])
    found = fake_quantize(x, torch.tensor([1.0]), torch.tensor([0]), QuantSpec(dtype=dtype))
    assert found.tolist() == [0.0, 0.0, 0.125, -0.125, 0.25, 1.0, -1.0]


def test_a_configuration_takes_it() -> None:
    dtype = function_type(proto(TERNARY), -1, 1)
    assert QConfig(weight=dtype, activation=dtype).weight_spec(0).dtype == dtype


def test_it_has_no_codes() -> None:
    dtype = function_type(proto(TERNARY), -1, 1)
    qparams = QParams(torch.ones(1), torch.zeros(1))
    with pytest.raises(ConfigError, match="Ternary is a function and has no codes"):
        quantize(torch.ones(3), qparams, QuantSpec(dtype=dtype))


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        ("y = Flatten (x)", r"torch.float32 \[240\] became torch.float32 \[240, 1\]"),
        ("y = Gather (x, x)", "onnxruntime refuses"),
        ("y = Add (x, scale)", "0 became 0.037 .* it has to stay 0"),
        ("h = Add (x, x) y = Min (h, scale)", "beyond qmin=-1|was applied again"),
        ("y = Div (x, x)", "became nan"),
        ("y = Reciprocal (x)", "became inf"),
        ("y = Identity (x)", "beyond qmin=-1 and qmax=1"),
        ("y = Missing (x)", "onnxruntime refuses .*Missing"),
        (
            "n = Neg (scale) h = Constant <value_float = 0.5> () a = Min (x, scale) "
            "b = Max (a, n) y = Mul (b, h)",
            "a value that it returned, became .* applied again",
        ),
        (
            "r = RandomUniformLike (x) z = Sub (r, r) n = Neg (scale) a = Min (x, scale) "
            "b = Max (a, n) y = Mul (b, r)",
            "another result the second time",
        ),
    ],
)
def test_what_is_no_quantization_is_refused(lines: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        function_type(body(lines), -1, 1)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('<opset_import: ["": 13], domain: "m"> F (x) => (y) { y = Neg (x) }', "expected a func"),
        (
            '<opset_import: ["": 13], domain: "m"> F (x, s) => (y, z) { y = Neg (x) z = Neg (s) }',
            "expected a function",
        ),
        (
            '<opset_import: ["": 13], domain: "m"> F <k> (x, s) => (y) '
            "{ y = Elu <alpha = @k> (x) }",
            r"\['k'\] default values",
        ),
        ('<opset_import: ["": 13], domain: ""> F (x, s) => (y) { y = Neg (x) }', "domain of its"),
        ('<opset_import: ["": 13], domain: "m"> int3 (x, s) => (y) { y = Neg (x) }', "cannot be c"),
    ],
)
def test_a_function_of_another_kind_is_refused(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        function_type(proto(text), -1, 1)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of"):
        function_type(proto(TERNARY), -1, 1, gradient="none")
    with pytest.raises(ConfigError, match="have to enclose 0"):
        function_type(proto(TERNARY), 1, 2)
    with pytest.raises(ConfigError, match="got int"):
        function_type(3, -1, 1)
    with pytest.raises(ConfigError, match="is 0 everywhere"):
        function_type(proto(TERNARY), -1, 1, gradient="own")
