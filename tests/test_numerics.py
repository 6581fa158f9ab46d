"""Codes, scales and gradients against onnxruntime, its quantizer and formulas worked by hand."""

import copy
import functools
import math
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnxruntime.quantization.quant_utils import compute_scale_zp
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.dtypes import INT8, INT16, INT32, UINT8, UINT16, QuantType
from qwrap.errors import InputError
from qwrap.numerics import (
    MIN_SCALE,
    QParams,
    choose_qparams,
    dequantize,
    fake_quantize,
    fake_quantize_bias,
    quantize,
    quantize_bias,
    sqnr,
)

TYPES = [UINT8, INT8, UINT16, INT16]
types = st.sampled_from(TYPES)
floats = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
scales = st.floats(min_value=2.0**-62, max_value=2.0**62, width=32)


@functools.cache
def session(
    op: str, dtype: QuantType, axis: int | None, real: int = onnx.TensorProto.FLOAT
) -> onnxruntime.InferenceSession:
    info = onnx.helper.make_tensor_value_info
    shape = [] if axis is None else [None]
    ends = {"QuantizeLinear": (real, dtype.onnx_type), "DequantizeLinear": (dtype.onnx_type, real)}
    node = onnx.helper.make_node(op, ["x", "scale", "zero_point"], ["y"])
    if axis is not None:
        node.attribute.append(onnx.helper.make_attribute("axis", axis))
    types = zip(("x", "scale", "zero_point"), (ends[op][0], real, dtype.onnx_type), strict=True)
    inputs = [info(n, t, None if n == "x" else shape) for n, t in types]
    graph = onnx.helper.make_graph([node], op, inputs, [info("y", ends[op][1], None)])
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(op: str, x: np.ndarray, qparams: QParams, dtype: QuantType) -> np.ndarray:
    scale, zero_point = qparams.scale.numpy(), qparams.zero_point.to(dtype.torch_dtype).numpy()
    if qparams.axis is None:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    real = onnx.TensorProto.FLOAT
    if scale.dtype == np.float16:
        real = onnx.TensorProto.FLOAT16
    feeds = {"x": x, "scale": scale, "zero_point": zero_point}
    return session(op, dtype, qparams.axis, real).run(None, feeds)[0]


def round_trip(x: np.ndarray, qparams: QParams, dtype: QuantType) -> np.ndarray:
    return run("DequantizeLinear", run("QuantizeLinear", x, qparams, dtype), qparams, dtype)


def along(values: np.ndarray, axis: int | None, rank: int) -> np.ndarray:
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])


def full(dtype: QuantType) -> QuantSpec:
    return QuantSpec(dtype=dtype, symmetric=False)


def per_tensor(scale: float, zero_point: int) -> QParams:
    return QParams(
        torch.tensor([scale], dtype=torch.float32), torch.tensor([zero_point], dtype=torch.int32)
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, QParams, QuantType]:
    """Values (anything, exact ties, or 16-bit grids), scales along any axis or none, and a type."""
    dtype, shape = draw(types), draw(array_shapes(max_dims=4, max_side=5))
    axis = draw(st.one_of(st.none(), st.integers(0, len(shape) - 1)))
    count = 1 if axis is None else shape[axis]
    scale = torch.from_numpy(draw(arrays(np.float32, count, elements=scales)))
    zero_point = draw(arrays(np.int32, count, elements=st.integers(dtype.qmin, dtype.qmax)))
    qparams = QParams(scale, torch.from_numpy(zero_point), axis)
    if draw(st.booleans()):
        return draw(arrays(np.float32, shape, elements=floats)), qparams, dtype
    halves = draw(arrays(np.float32, shape, elements=st.integers(-140_000, 140_000).map(float)))
    return halves / 2 * along(scale.numpy(), axis, len(shape)), qparams, dtype


@given(cases())
@settings(deadline=None, max_examples=400)
def test_quantize_gives_onnxruntimes_codes(case: tuple[np.ndarray, QParams, QuantType]) -> None:
    x, qparams, dtype = case
    codes = quantize(torch.from_numpy(x), qparams, full(dtype))
    assert codes.dtype == dtype.torch_dtype
    np.testing.assert_array_equal(codes.numpy(), run("QuantizeLinear", x, qparams, dtype))


@given(cases())
@settings(deadline=None, max_examples=400)
def test_fake_quantize_is_onnxruntimes_round_trip_bit_for_bit(
    case: tuple[np.ndarray, QParams, QuantType],
) -> None:
    x, qparams, dtype = case
    spec = QuantSpec(dtype=dtype, symmetric=False, axis=qparams.axis)
    ours = fake_quantize(torch.from_numpy(x), qparams.scale, qparams.zero_point, spec).numpy()
    valid = ~np.isnan(x)
    theirs = round_trip(x, qparams, dtype)
    np.testing.assert_array_equal(ours[valid].view(np.int32), theirs[valid].view(np.int32))
    assert np.isnan(ours[~valid]).all()


@given(cases())
@settings(deadline=None)
def test_dequantize_inverts_codes_as_onnxruntime_does(
    case: tuple[np.ndarray, QParams, QuantType],
) -> None:
    x, qparams, dtype = case
    codes = quantize(torch.from_numpy(x), qparams, full(dtype))
    theirs = run("DequantizeLinear", codes.numpy(), qparams, dtype)
    np.testing.assert_array_equal(dequantize(codes, qparams).numpy(), theirs)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_special_values_get_onnxruntimes_codes(dtype: QuantType) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, -0.0, 1e-45, -1e-40] * 9, np.float32)
    for zero_point in (dtype.qmin, 7, dtype.qmax):
        qparams = per_tensor(0.1, zero_point)
        ours = quantize(torch.from_numpy(x), qparams, full(dtype)).numpy()
        np.testing.assert_array_equal(ours, run("QuantizeLinear", x, qparams, dtype))
        assert ours[:3].tolist() == [dtype.qmin, dtype.qmax, dtype.qmin]


def test_images_over_255_have_no_differing_code() -> None:
    # Ties everywhere: a multiplication by 1 / scale gets a tenth of these wrong.
    x = (np.arange(0, 511, dtype=np.float32) / 2) / 255
    qparams = per_tensor(1 / 255, 0)
    ours = quantize(torch.from_numpy(x), qparams, full(UINT8)).numpy()
    np.testing.assert_array_equal(ours, run("QuantizeLinear", x, qparams, UINT8))


def test_ties_go_to_the_even_code() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantize(x, per_tensor(1.0, 1), full(INT8)).tolist() == [-1, -1, 1, 1, 3, 3]


def test_narrow_range_leaves_the_smallest_code_unused() -> None:
    x = torch.tensor([-9.0, 9.0])
    assert quantize(x, per_tensor(0.01, 0), QuantSpec(narrow_range=True)).tolist() == [-127, 127]
    spec = QuantSpec(narrow_range=True)
    assert fake_quantize(x * 99, torch.tensor([0.5]), torch.tensor([0]), spec)[0] == -63.5


def test_a_scalar_keeps_its_shape() -> None:
    x = torch.tensor(0.3, requires_grad=True)
    spec = QuantSpec(dtype=INT8)
    qparams = per_tensor(0.25, 0)
    assert fake_quantize(x, qparams.scale, qparams.zero_point, spec).shape == ()
    assert quantize(x, qparams, full(INT8)).shape == ()
    assert fake_quantize(x.detach().half(), qparams.scale, qparams.zero_point, spec).shape == ()


# Finite: onnxruntime's float16 kernel casts to int32 before it clamps, so +inf gets code qmin.
@given(
    x=arrays(np.float16, 33, elements=st.floats(width=16, allow_nan=False, allow_infinity=False)),
    scale=st.floats(min_value=2.0**-10, max_value=8, width=16),
    dtype=st.sampled_from([UINT8, INT8]),
)
@settings(deadline=None)
def test_float16_is_divided_in_float32_as_in_onnxruntime(
    x: np.ndarray, scale: float, dtype: QuantType
) -> None:
    qparams = per_tensor(scale, 5)
    spec = QuantSpec(dtype=dtype, symmetric=False)
    ours = fake_quantize(torch.from_numpy(x), qparams.scale, qparams.zero_point, spec)
    assert ours.dtype == torch.float16
    half = QParams(qparams.scale.half(), qparams.zero_point)
    np.testing.assert_array_equal(ours.numpy(), round_trip(x, half, dtype))


def test_bfloat16_comes_back_as_bfloat16() -> None:
    x = torch.tensor([0.1, 0.26, 300.0], dtype=torch.bfloat16)
    fake = fake_quantize(x, torch.tensor([0.5]), torch.tensor([0]), QuantSpec())
    assert (fake.dtype, fake.tolist()) == (torch.bfloat16, [0.0, 0.5, 63.5])


@given(cases())
@settings(deadline=None)
def test_gradient_is_one_where_no_code_is_clamped_and_zero_elsewhere(
    case: tuple[np.ndarray, QParams, QuantType],
) -> None:
    values, qparams, dtype = case
    x = torch.from_numpy(values).nan_to_num_(0.0, 1e9, -1e9).requires_grad_()
    spec = QuantSpec(dtype=dtype, symmetric=False, axis=qparams.axis)
    upstream = torch.arange(1.0, 1.0 + x.numel()).reshape(x.shape)
    out = fake_quantize(x, qparams.scale, qparams.zero_point, spec)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    with np.errstate(over="ignore"):
        ratio = x.detach().numpy() / along(qparams.scale.numpy(), qparams.axis, x.ndim)
    codes = np.rint(ratio) + along(qparams.zero_point.numpy(), qparams.axis, x.ndim)
    inside = (codes >= dtype.qmin) & (codes <= dtype.qmax)
    np.testing.assert_array_equal(gradient.numpy(), np.where(inside, upstream.numpy(), 0))


def test_gradient_reaches_the_outermost_codes_and_no_further() -> None:
    x = torch.tensor([-3.6, -3.4, 252.4, 252.6], requires_grad=True)
    spec = QuantSpec(dtype=UINT8, symmetric=False)
    fake_quantize(x, torch.tensor([1.0]), torch.tensor([3]), spec).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_the_value_is_the_same_with_and_without_gradient() -> None:
    x = torch.linspace(-3, 3, 1001)
    arguments = torch.tensor([0.013]), torch.tensor([90]), QuantSpec(dtype=UINT8, symmetric=False)
    assert torch.equal(
        fake_quantize(x.clone().requires_grad_(), *arguments), fake_quantize(x, *arguments)
    )


def test_only_a_bool_mask_is_saved_and_nothing_without_gradient() -> None:
    saved: list[Tensor] = []
    arguments = torch.tensor([0.1]), torch.tensor([0]), QuantSpec()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = torch.ones(8, requires_grad=True)
        fake_quantize(x, *arguments)
        with torch.no_grad():
            assert not fake_quantize(x, *arguments).requires_grad
    assert [t.dtype for t in saved] == [torch.bool]


def test_input_is_left_alone() -> None:
    x = torch.tensor([0.3, 5.0])
    before = copy.deepcopy(x)
    fake_quantize(x, torch.tensor([0.1]), torch.tensor([3]), QuantSpec(dtype=INT8, symmetric=False))
    quantize(x, per_tensor(0.1, 3), full(INT8))
    assert torch.equal(x, before)


@pytest.mark.parametrize("axis", [None, 1])
def test_fake_quantize_compiles_into_one_dynamic_graph(axis: int | None) -> None:
    spec = QuantSpec(dtype=UINT8, symmetric=False, axis=axis)
    count = 1 if axis is None else 3
    scale, zero_point = torch.full([count], 0.1), torch.full([count], 9, dtype=torch.int32)
    graphs: list[int] = []

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(1)
        return module

    torch._dynamo.reset()
    compiled = torch.compile(fake_quantize, fullgraph=True, dynamic=True, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while tracing
        for batch in (2, 5, 7):
            x = torch.randn(batch, 3, 4, generator=torch.manual_seed(batch)).mul_(9)
            eager, traced = x.clone().requires_grad_(), x.clone().requires_grad_()
            out = compiled(traced, scale, zero_point, spec)
            expected = fake_quantize(eager, scale, zero_point, spec)
            assert torch.equal(out, expected)
            out.sum().backward()
            expected.sum().backward()
            assert torch.equal(traced.grad, eager.grad)
    assert len(graphs) == 1


finite = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)


@given(ends=st.tuples(finite, finite), dtype=types)
@settings(deadline=None)
def test_asymmetric_qparams_are_those_of_onnxruntimes_quantizer(
    ends: tuple[float, float], dtype: QuantType
) -> None:
    low, high = (np.array(v, np.float32) for v in sorted(ends))
    qparams = choose_qparams(
        torch.from_numpy(low), torch.from_numpy(high), QuantSpec(dtype=dtype, symmetric=False)
    )
    width = max(float(high), 0.0) - min(float(low), 0.0)
    if width < (dtype.qmax - dtype.qmin) * MIN_SCALE:
        return  # onnxruntime's floor is lower, see the next test
    numpy_type = np.dtype(str(dtype))
    zero_point, scale = compute_scale_zp(
        low, high, numpy_type.type(dtype.qmin), numpy_type.type(dtype.qmax)
    )
    assert qparams.scale.item() == float(scale)
    assert qparams.zero_point.item() == zero_point


@given(low=finite, high=finite, dtype=types, symmetric=st.booleans())
@settings(deadline=None)
def test_zero_and_both_ends_are_within_half_a_step_of_a_code(
    low: float, high: float, dtype: QuantType, symmetric: bool
) -> None:
    spec = QuantSpec(dtype=dtype, symmetric=symmetric)
    low, high = min(low, high, 0.0), max(low, high, 0.0)
    qparams = choose_qparams(torch.tensor(low), torch.tensor(high), spec)
    scale = qparams.scale.item()
    assert math.isfinite(scale)
    assert scale >= MIN_SCALE
    ends = torch.tensor([low, 0.0, high])
    fake = fake_quantize(ends, qparams.scale, qparams.zero_point, spec)
    assert fake[1] == 0
    # The rounded zero point shifts the grid by up to half a step, so an end may lie half a step
    # beyond the last code; float32 arithmetic on 2^16 steps adds up to 2^-7 of a step.
    assert (fake - ends).abs().max() <= (0.5 + 2**-7) * scale


@pytest.mark.parametrize(
    ("dtype", "symmetric", "narrow", "scale", "zero_point"),
    [
        (UINT8, False, False, 4.0 / 255, 64),
        (INT8, False, False, 4.0 / 255, -64),
        (UINT8, True, False, 6.0 / 255, 128),
        (INT8, True, False, 6.0 / 255, 0),
        (INT8, True, True, 3.0 / 127, 0),
        (UINT16, False, False, 4.0 / 65535, 16384),
        (INT16, True, False, 6.0 / 65535, 0),
    ],
)
def test_pinned_qparams_of_minus_one_to_three(
    dtype: QuantType, symmetric: bool, narrow: bool, scale: float, zero_point: int
) -> None:
    spec = QuantSpec(dtype=dtype, symmetric=symmetric, narrow_range=narrow)
    qparams = choose_qparams(torch.tensor(-1.0), torch.tensor(3.0), spec)
    assert qparams.scale.tolist() == [np.float32(scale)]
    assert qparams.zero_point.tolist() == [zero_point]
    assert (qparams.scale.dtype, qparams.zero_point.dtype) == (torch.float32, torch.int32)


def test_a_range_of_zeros_has_scale_one_and_a_tiny_range_the_smallest_scale() -> None:
    low, high = torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1e-44])
    qparams = choose_qparams(low, high, QuantSpec(axis=0))
    assert qparams.scale.tolist() == [1.0, MIN_SCALE]
    assert qparams.axis == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_range_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(InputError, match=r"index 1\): both ends must be finite"):
        choose_qparams(torch.tensor([0.0, 0.0]), torch.tensor([1.0, bad]), QuantSpec(axis=0))


def test_bias_codes_round_in_float64_and_saturate() -> None:
    bias = torch.tensor([0.3, -16777217.5, 5e9, -5e9, 2.5])
    codes = quantize_bias(bias.double(), torch.tensor([0.1, 1.0, 1.0, 1.0, 1.0]))
    # float32(0.1) is a little above 0.1; -16777217.5 is no float32, and its tie goes to even.
    assert codes.tolist() == [3, -16777218, 2**31 - 1, -(2**31), 2]
    assert codes.dtype == torch.int32


def test_bias_dequantizes_as_onnxruntime_does() -> None:
    bias = torch.linspace(-3, 3, 7)
    scale = torch.linspace(1e-5, 2e-4, 7)
    qparams = QParams(scale, torch.zeros(7, dtype=torch.int32), 0)
    codes = quantize_bias(bias, scale)
    theirs = run("DequantizeLinear", codes.numpy(), qparams, INT32)
    np.testing.assert_array_equal(dequantize(codes, qparams).numpy(), theirs)


@given(
    bias=arrays(np.float32, 5, elements=st.floats(-1e6, 1e6, width=32)),
    scale=st.floats(2**-20, 1e3, width=32),
)
def test_a_fake_quantized_bias_is_what_its_codes_stand_for(bias: np.ndarray, scale: float) -> None:
    values, step = torch.from_numpy(bias), torch.tensor([scale])
    qparams = QParams(step, torch.zeros(1, dtype=torch.int32))
    expected = dequantize(quantize_bias(values, step), qparams)
    assert torch.equal(fake_quantize_bias(values, step), expected)


def test_a_fake_quantized_bias_passes_nan_on() -> None:
    found = fake_quantize_bias(torch.tensor([math.nan, 2.4]), torch.ones(1))
    assert found.isnan().tolist() == [True, False]
    assert found[1] == 2


def test_sqnr_of_a_tenth_of_noise_is_twenty_decibel() -> None:
    reference = torch.ones(50)
    assert sqnr(reference, reference * 1.1) == pytest.approx(20.0, abs=1e-5)  # 0.1 in float32


def test_sqnr_of_equal_tensors_is_infinite_and_of_noise_on_nothing_minus_infinite() -> None:
    zero = torch.zeros(3)
    odd = torch.tensor([1.0, math.inf, math.nan])
    assert sqnr(zero, zero) == math.inf
    assert sqnr(odd, odd.clone()) == math.inf
    assert sqnr(zero, zero + 1) == -math.inf
    assert sqnr(zero + 1, odd) == -math.inf
    assert sqnr(torch.empty(0), torch.empty(0)) == math.inf


def test_unusable_tensors_are_refused() -> None:
    with pytest.raises(InputError, match=r"shape \[2\] with \[2, 1\]"):
        sqnr(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(InputError, match="bias holds NaN"):
        quantize_bias(torch.tensor([math.nan]), torch.ones(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_codes_on_cuda_are_those_on_the_cpu() -> None:
    x = torch.arange(-3000, 3000) / 2 * 0.037
    qparams = per_tensor(0.037, 100)
    on_cuda = QParams(qparams.scale.cuda(), qparams.zero_point.cuda())
    assert torch.equal(
        quantize(x.cuda(), on_cuda, full(UINT8)).cpu(), quantize(x, qparams, full(UINT8))
    )
