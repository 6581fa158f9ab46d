"""Scales and zero points against onnxruntime's quantizer, and what scale types hold."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnxruntime.quantization import quant_utils
from onnxruntime.quantization.quant_utils import compute_scale_zp, snap_zero_point_to_uint8

import qwrap
from qwrap.config import QConfig, QuantSpec
from qwrap.dtypes import FLOAT4E2M1, INTEGERS, QuantType, integer_type
from qwrap.export.quantizers import as_array
from qwrap.model.points import UsePoint
from qwrap.numerics import MIN_SCALE, block_extremes, choose_qparams, outer_scale, round_scale

SHAPE = (3, 10, 7)
RANGES = [
    (low, high)
    for low, high in itertools.product(
        (-300.5, -3.7, -1.0, -0.3, -1e-3, -0.0, 0.2),
        (-0.1, 0.0, 1e-3, 0.3, 1.0, 2.55, 6.0, 1e4),
    )
    if low <= high
]
WIDE = [t for t in INTEGERS if t.bits >= 4]


@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("least", [0.0, 0.01, 5.0])
def test_scales_and_zero_points_are_those_of_onnxruntimes_quantizer(
    dtype: QuantType, symmetric: bool, reduce_range: bool, least: float
) -> None:
    spec = QuantSpec(
        dtype=dtype, symmetric=symmetric, reduce_range=reduce_range, min_real_range=least
    )
    qmin, qmax = quant_utils.get_qmin_qmax_for_qType(
        dtype.onnx_type, reduce_range=reduce_range, symmetric=False
    )
    assert (spec.qmin, spec.qmax) == (qmin, qmax)
    for low, high in RANGES:
        if max(-low, high, least) == 0:
            continue  # ours is scale 1 and the zero point of the type, theirs scale 1 and 0
        ends = np.float32(low), np.float32(high)
        zero_point, scale = compute_scale_zp(
            *ends, qmin, qmax, symmetric=symmetric, min_real_range=least or None
        )
        ours = choose_qparams(*map(torch.tensor, ends), spec)
        assert float(ours.scale) == float(np.float32(scale)), (low, high)
        assert int(ours.zero_point) == int(zero_point), (low, high)


@pytest.mark.parametrize("dtype", [t for t in WIDE if not t.signed], ids=str)
@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("least", [0.0, 0.01, 5.0])
def test_restricted_zero_points_are_those_of_onnxruntimes_quantizer(
    dtype: QuantType, reduce_range: bool, least: float
) -> None:
    spec = QuantSpec(
        dtype=dtype,
        symmetric=False,
        restricted=True,
        reduce_range=reduce_range,
        min_real_range=least,
    )
    for low, high in RANGES:
        if max(-low, high, least) == 0 or (dtype.bits == 16 and low < 0):
            continue  # theirs returns every zero point as uint8
        ends = np.float32(low), np.float32(high)
        zero_point, scale = snap_zero_point_to_uint8(
            *ends, int(spec.qmin), int(spec.qmax), least or None
        )
        ours = choose_qparams(*map(torch.tensor, ends), spec)
        assert float(ours.scale) == float(scale), (low, high)
        assert int(ours.zero_point) == int(zero_point), (low, high)


@pytest.mark.parametrize("dtype", [t for t in INTEGERS if t.signed and t.bits >= 8], ids=str)
def test_a_narrow_range_is_onnxruntimes_symmetric_one(dtype: QuantType) -> None:
    spec = QuantSpec(dtype=dtype, narrow_range=True)
    assert (spec.qmin, spec.qmax) == quant_utils.ONNX_INT_TYPE_SYMMETRIC_RANGE[dtype.onnx_type]


def test_nothing_but_zeros_has_scale_1_and_the_zero_point_of_its_type() -> None:
    # onnxruntime's quantizer gives 0 to unsigned types too, where its kernels want the middle.
    zero = torch.tensor(0.0)
    for dtype in INTEGERS:
        qparams = choose_qparams(zero, zero, QuantSpec(dtype=dtype))
        middle = 0 if dtype.signed else 2 ** (dtype.bits - 1)
        assert (float(qparams.scale), int(qparams.zero_point)) == (1.0, middle)


def test_scales_stay_above_the_least_one() -> None:
    # onnxruntime's floor is the smallest normal float; the product of two such is 0.
    tiny = torch.tensor(1e-30)
    qparams = choose_qparams(-tiny, tiny, QuantSpec())
    assert float(qparams.scale) == MIN_SCALE
    assert float(qparams.scale * qparams.scale) > 0


@pytest.mark.parametrize("bits", range(2, 17))
def test_scale_types_hold_what_is_chosen(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    low = -torch.rand(64, generator=generator) * 10 ** torch.linspace(-12, 4, 64)
    for scale_type in ("float32", "float16", "bfloat16", "float8e8m0", "float8e4m3fn"):
        spec = QuantSpec(dtype=integer_type(bits), axis=0, scale_type=scale_type)
        scale = choose_qparams(low, -low, spec).scale
        assert bool((scale > 0).all())
        assert bool(scale.isfinite().all())
        again = round_scale(scale, spec).to(torch.float32)
        assert torch.equal(again, scale), scale_type


def test_powers_of_two_are_the_next_above() -> None:
    spec = QuantSpec(power_of_two=True)
    scale = torch.tensor([1.0, 1.0001, 0.75, 0.5, 3e-5], dtype=torch.float64)
    assert round_scale(scale, spec).tolist() == [1.0, 2.0, 1.0, 0.5, 2.0**-15]


@pytest.mark.parametrize("seed", range(8))
def test_two_levels_of_scales_can_be_taken_apart_again(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spec = QuantSpec(dtype=FLOAT4E2M1, axis=1, block_size=16, scale_type="float8e4m3fn")
    wanted = torch.rand(50, 7, generator=generator, dtype=torch.float64) * 10.0 ** (seed - 4)
    scale = round_scale(wanted, spec).to(torch.float32)
    outer = outer_scale(scale)
    inner = as_array(scale / outer, ir.DataType.FLOAT8E4M3FN).astype(np.float32)
    np.testing.assert_array_equal(inner * outer.numpy(), scale.numpy())
    assert inner.max() == 448
    normal = inner >= 2.0**-6
    error = np.abs(scale.numpy() / wanted.numpy() - 1)[normal]
    assert error.max() <= 2.0**-4 + 2.0**-19  # half a step of 3 bits, and the outer scale's


def test_the_extremes_of_blocks_are_those_of_slices() -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    for axis, size in ((0, 2), (1, 4), (2, 7), (2, 100)):
        low, high = block_extremes(x, QuantSpec(axis=axis, block_size=size))
        parts = x.split(size, axis)
        assert torch.equal(low, torch.cat([p.amin(axis, keepdim=True) for p in parts], axis))
        assert torch.equal(high, torch.cat([p.amax(axis, keepdim=True) for p in parts], axis))


@pytest.mark.parametrize(
    "weight",
    [QuantSpec(power_of_two=True), QuantSpec(scale_type="float16"), QuantSpec()],
    ids=["power of two", "float16", "float32"],
)
def test_a_scale_enlarged_for_a_bias_is_still_one_of_its_type(small, weight: QuantSpec) -> None:
    weights = {"w": np.full((2, 3, 3, 3), 1e-7), "b": np.array([5.0, 0.1])}
    source = small.build("y = Conv(x, w, b)", weights)
    model = qwrap.load(source).eval()
    plan = qwrap.prepare(model, QConfig(weight=weight, scope="kernels"))
    qwrap.calibrate(model, small.batches(), progress=False)
    assert plan.biases
    scale = model.tap(UsePoint("/y", 1)).scale
    assert torch.equal(round_scale(scale, weight).float(), scale)
    codes = model.tap(UsePoint("/y", 2)).codes(torch.tensor([5.0, 0.1]))
    assert int(codes.abs().max()) <= 2**30 * (1 + 2**-10)
