"""The arithmetic of quantization: every division by a scale, rounding and clamping in qwrap.

A code is ``clamp(round_half_to_even(x / scale) + zero_point, qmin, qmax)`` and stands for
``(code - zero_point) * scale``, as in ONNX QuantizeLinear-21 and DequantizeLinear-21. The division
is a float32 division, as in onnxruntime: multiplying by ``1 / scale`` moves ties to another code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.dtypes import INT32, QuantType
from qwrap.errors import InputError

MIN_SCALE = 2.0**-62
"""Smallest scale chosen: its inverse and the product of two (a bias's scale) are normal floats."""


@dataclass(frozen=True, slots=True)
class QParams:
    """What turns codes into real values.

    Attributes:
        scale: real units per step, float32 ``[1]`` or ``[C]``, above zero.
        zero_point: the code that means 0.0, int32, of the shape of ``scale``.
        axis: the axis that ``[C]`` runs along, None for one scale per tensor.
    """

    scale: Tensor
    zero_point: Tensor
    axis: int | None = None


def choose_qparams(low: Tensor, high: Tensor, spec: QuantSpec) -> QParams:
    """Return the scale and zero point that spread the codes of ``spec`` over ``[low, high]``.

    The range is first widened to hold 0, which then has a code of its own. A symmetric one reaches
    as far on both sides, and its largest magnitude gets the largest code. The range ``[0, 0]``
    gets scale 1; scales below ``MIN_SCALE`` become ``MIN_SCALE``.

    Args:
        low: smallest value to represent, a float scalar or ``[C]``.
        high: largest value to represent, of the same shape.
        spec: type and symmetry; its axis is handed on.

    Raises:
        InputError: ``low`` or ``high`` is not finite.

    Source: Jacob et al., arXiv:1712.05877, section 3.
    """
    low, high = _range_with_zero(low, high)
    middle = 0 if spec.dtype.signed else 2 ** (spec.dtype.bits - 1)
    if spec.symmetric:
        width, steps = torch.maximum(-low, high), spec.qmax - middle
    else:
        width, steps = high - low, spec.qmax - spec.qmin
    # A tensor of steps, because CUDA multiplies by the inverse of a Python number.
    scale = width / torch.full_like(width, steps)
    scale = torch.where(width > 0, scale.clamp(min=MIN_SCALE), 1.0)
    if spec.symmetric:
        zero_point = torch.full_like(scale, middle)
    else:
        zero_point = (spec.qmin - low / scale).round_().clamp_(spec.qmin, spec.qmax)
    return QParams(scale.to(torch.float32), zero_point.to(torch.int32), spec.axis)


def shrink_into(qparams: QParams, low: float, high: float, spec: QuantSpec) -> QParams:
    """Return ``qparams`` with the scale reduced until no code lies outside ``[low, high]``.

    Args:
        qparams: one scale; the code of ``low`` or ``high`` is the zero point where that end is 0.
        low: at most 0.
        high: at least 0.
        spec: gives the range of the codes.
    """
    down, up = (code - int(qparams.zero_point) for code in (spec.qmin, spec.qmax))
    scale = qparams.scale.clone()
    for end, steps in ((low, down), (high, up)):
        if steps:
            scale.clamp_(max=end / steps)
            while abs(float(scale * steps)) > abs(end):  # the float32 product, as a kernel has it
                scale = torch.nextafter(scale, torch.zeros_like(scale))
    return QParams(scale, qparams.zero_point, qparams.axis)


def _range_with_zero(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    # float64, as in onnxruntime's quantizer: float32 can overflow in high - low, and moves ties.
    low, high = (end.detach().to(torch.float64).reshape(-1) for end in (low, high))
    finite = torch.isfinite(low) & torch.isfinite(high)
    if not finite.all():
        index = int((~finite).nonzero()[0])
        raise InputError(
            f"cannot quantize the range [{low[index]:g}, {high[index]:g}] (index {index}): "
            "both ends must be finite; look for NaN or infinity in the data"
        )
    return low.clamp(max=0.0), high.clamp(min=0.0)


def along_axis(values: Tensor, axis: int | None, rank: int) -> Tensor:
    """Return a view of ``[1]`` or ``[C]`` values that broadcasts along ``axis`` of ``rank``."""
    shape = [1] * rank
    if axis is not None:
        shape[axis] = -1
    return values.reshape(shape)


def quantize(
    x: Tensor, qparams: QParams, dtype: QuantType, *, narrow_range: bool = False
) -> Tensor:
    """Return the codes of ``x``, stored as ``dtype.torch_dtype``.

    Equal to onnxruntime's QuantizeLinear bit for bit, which gives NaN the smallest code.

    Args:
        x: floats of any shape.
        qparams: scale and zero point.
        dtype: type of the codes.
        narrow_range: do not use the smallest code of the type.
    """
    # float32 holds every code of up to 16 bits, and float64 those of 32.
    work = torch.float64 if dtype.bits > 16 else torch.float32
    scale, zero_point = (
        along_axis(v, qparams.axis, x.ndim) for v in (qparams.scale, qparams.zero_point)
    )
    qmin = dtype.qmin + narrow_range
    codes = x.detach().to(work) / scale.to(work)
    codes.round_().add_(zero_point).clamp_(qmin, dtype.qmax).nan_to_num_(nan=qmin)
    return codes.to(torch.int32).to(dtype.torch_dtype)  # torch has no direct cast to every type


def dequantize(codes: Tensor, qparams: QParams) -> Tensor:
    """Return the float32 values that integer ``codes`` stand for."""
    scale, zero_point = (
        along_axis(v, qparams.axis, codes.ndim) for v in (qparams.scale, qparams.zero_point)
    )
    return (codes.to(torch.int32) - zero_point).to(torch.float32) * scale


def round_to_codes(steps: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the codes of values given in steps of a scale: rounded, then moved and clamped.

    Args:
        steps: floats.
        zero_point: an integer tensor that broadcasts to ``steps``.
        dtype: torch type of the codes, whose range bounds them.
    """
    info = torch.iinfo(dtype)
    codes = steps.detach().round() + zero_point
    return codes.clamp(info.min, info.max).to(torch.int32).to(dtype)


def multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return ``a * b + c`` of float32 numbers as a fused instruction does: the product is exact."""
    return (a.double() * b.double() + c.double()).float()


def quantize_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """Return the int32 codes of a ``[C]`` bias at ``scale`` (``[1]`` or ``[C]``), zero point 0.

    The division is done in float64, as float32 cannot hold all codes; codes that overflow
    saturate.

    Raises:
        InputError: ``bias`` holds NaN.
    """
    if bias.isnan().any():
        raise InputError("a bias holds NaN and cannot be quantized")
    codes = bias.detach().to(torch.float64) / scale.to(torch.float64)
    return codes.round_().clamp_(INT32.qmin, INT32.qmax).to(torch.int32)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return ``x`` rounded to the grid of its codes, in its own dtype.

    The arithmetic is float32 whatever the dtype of ``x``, and equal to onnxruntime's QuantizeLinear
    and DequantizeLinear bit for bit, save that NaN stays NaN. The gradient of ``x`` passes straight
    through where no code was clamped and is 0 elsewhere; ``scale`` and ``zero_point`` get none.

    Args:
        x: floats of any shape.
        scale: float32, ``[1]``, or ``[C]`` along ``spec.axis``.
        zero_point: integers of the shape of ``scale``.
        spec: gives axis and range of the codes, of at most 16 bits.

    Source: straight-through estimator of Bengio et al., arXiv:1308.3432.
    """
    scale = along_axis(scale, spec.axis, x.ndim)
    zero_point = along_axis(zero_point, spec.axis, x.ndim)
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]  # torch has no stub
            x, scale, zero_point, spec.qmin, spec.qmax
        )
        return result
    codes = _codes(x, scale, zero_point).clamp_(spec.qmin, spec.qmax)
    return codes.sub_(zero_point).mul_(scale).to(x.dtype)


def _codes(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return unclamped codes in a new float32 tensor, which the caller may overwrite."""
    return (x.to(torch.float32) / scale).round_().add_(zero_point)


class _FakeQuantize(torch.autograd.Function):
    """Fake quantization that keeps one bool per element for its backward.

    Works in place on one temporary: above some 100 k elements fresh memory costs more than the
    arithmetic, so that the mask of two comparisons beats comparing with a clamped copy.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
    ) -> Tensor:
        codes = _codes(x, scale, zero_point)
        inside = codes.ge(qmin)
        inside &= codes.le(qmax)
        ctx.save_for_backward(inside)
        return codes.clamp_(qmin, qmax).sub_(zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None, None


def squared_error_integral(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return the integral of ``(t - fake_quantize(t))^2`` over t from 0 to ``x``, in float64.

    The error is a sawtooth within the range and grows linearly beyond, so the integral has a closed
    form; its difference over a histogram's bin is the bin's squared error under a flat density.

    Args:
        x: upper ends.
        scale: broadcasts against ``x``.
        zero_point: of the shape of ``scale``.
        spec: gives the range of the codes.
    """
    scale = scale.to(torch.float64)
    steps = x / scale
    codes = steps.round().clamp_min_(spec.qmin - zero_point).clamp_max_(spec.qmax - zero_point)
    steps.sub_(codes)
    cubes = (steps * steps).mul_(steps)
    return cubes.mul_(4).add_(codes).mul_(scale**3 / 12)


def sqnr(reference: Tensor, other: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio of ``other`` in dB, infinite when equal.

    A zero reference with a different ``other`` gives minus infinity, as does any element that is
    not finite in just one of both. Shapes must agree.

    Raises:
        InputError: the shapes differ.
    """
    if reference.shape != other.shape:
        raise InputError(f"cannot compare shape {list(reference.shape)} with {list(other.shape)}")
    signal, noisy = (t.detach().to(torch.float64) for t in (reference, other))
    same = (signal == noisy) | (signal.isnan() & noisy.isnan())
    noise = (signal - noisy).masked_fill_(same, 0.0).square_().sum().item()
    power = signal[signal.isfinite()].square().sum().item()
    if noise == 0:
        return math.inf
    if power == 0 or not math.isfinite(noise):
        return -math.inf
    return 10 * math.log10(power / noise)
