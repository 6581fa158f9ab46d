"""The arithmetic of quantization: every division by a scale, rounding and clamping in qwrap.

A code is ``clamp(round_half_to_even(x / scale) + zero_point, qmin, qmax)`` and stands for
``(code - zero_point) * scale``, as in ONNX QuantizeLinear-21 and DequantizeLinear-21. The division
is a float32 division, as in onnxruntime: multiplying by ``1 / scale`` moves ties to another code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from onnx import TensorProto
from torch import Tensor

from qwrap.codebook import as_tensor, nearest
from qwrap.config import QuantSpec
from qwrap.dtypes import INT32, QuantType
from qwrap.errors import ConfigError, InputError
from qwrap.minifloat import saturate_to
from qwrap.rounding import by_function, to_integers, to_levels

MIN_SCALE = 2.0**-62
"""Smallest scale chosen: its inverse and the product of two (a bias's scale) are normal floats."""


@dataclass(frozen=True, slots=True)
class QParams:
    """What turns codes into real values.

    Attributes:
        scale: real units per step, float32, above zero: ``[1]``, ``[C]``, or for blocks the shape
            of the tensor with ``ceil(D / block_size)`` in place of ``axis``'s D.
        zero_point: the code that means 0.0, int32, of the shape of ``scale``.
        axis: the axis that ``[C]`` or the blocks run along, None for one scale per tensor.
        block_size: elements that share a scale along ``axis``, None for one scale per index.
    """

    scale: Tensor
    zero_point: Tensor
    axis: int | None = None
    block_size: int | None = None


def choose_qparams(low: Tensor, high: Tensor, spec: QuantSpec) -> QParams:
    """Return the scale and zero point that spread the codes of ``spec`` over ``[low, high]``.

    The range is first widened to hold 0, which then has a code of its own, and to
    ``spec.min_real_range``. A symmetric one reaches as far on both sides; where it has one code
    more on the lower side, both ends lie half a step within. The range ``[0, 0]`` gets scale 1;
    scales below ``MIN_SCALE`` become ``MIN_SCALE``. The zero point goes with the scale before it
    is rounded to float32, and after it is rounded to anything coarser.

    Args:
        low: smallest value to represent, a float scalar, ``[C]`` or one for each block.
        high: largest value to represent, of the same shape.
        spec: type and symmetry; its axis is handed on.

    Raises:
        InputError: ``low`` or ``high`` is not finite.

    Source: Jacob et al., arXiv:1712.05877, section 3; the rules for symmetric, restricted and
    least ranges are those of onnxruntime's ``compute_scale_zp`` and ``snap_zero_point_to_uint8``.
    """
    low, high = _range_with_zero(low, high, spec)
    qmin, qmax = spec.qmin, spec.qmax
    middle: Tensor | float = float(_middle(spec))
    # Tensors of steps, because CUDA multiplies by the inverse of a Python number.
    if spec.restricted:
        middle = torch.where(low < 0, middle, qmin)
        down, up = (middle - qmin).clamp(min=1), qmax - middle
        width = torch.maximum(-low / down, high / up)
    elif not spec.dtype.has_zero_point:
        ends = [e / torch.full_like(e, q) for e, q in ((low, qmin), (high, qmax)) if q != 0]
        width = ends[0].clamp(min=0) if len(ends) == 1 else torch.maximum(*ends)
    elif spec.symmetric:
        width = torch.maximum(-low, high)
        width = (width + width) / torch.full_like(width, qmax - qmin)
    else:
        width = (high - low) / torch.full_like(low, qmax - qmin)
    chosen = torch.where(width > 0, width.clamp(min=MIN_SCALE), 1.0)
    scale = round_scale(chosen, spec)
    if spec.symmetric or spec.restricted:
        zero_point = torch.zeros_like(scale) + middle
    else:
        plain = spec.scale_type == "float32" and not spec.power_of_two
        zero_point = (qmin - low / (chosen if plain else scale)).round_().clamp_(qmin, qmax)
    return QParams(scale.to(torch.float32), zero_point.to(torch.int32), spec.axis, spec.block_size)


def _middle(spec: QuantSpec) -> int:
    """Return the zero point of a symmetric type: of two middle codes the even one."""
    return round((spec.qmin + spec.qmax) / 2) if spec.dtype.has_zero_point else 0


def round_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Return scales as they can be stored, in float64; none becomes 0 or infinite.

    Args:
        scale: positive, of any shape; with ``scale_type`` float8e4m3fn all scales of one tensor.
        spec: gives ``scale_type`` and ``power_of_two``.
    """
    scale = scale.to(torch.float64)
    if spec.power_of_two or spec.scale_type == "float8e8m0":
        mantissa, exponent = torch.frexp(scale)
        exponent = (exponent - (mantissa == 0.5).to(exponent.dtype)).clamp(-126, 127)
        scale = torch.ldexp(torch.ones_like(scale), exponent)
    if spec.scale_type == "float8e4m3fn":
        outer = outer_scale(scale)
        inner = saturate_to(scale / outer, TensorProto.FLOAT8E4M3FN).clamp(min=2.0**-9)
        return (inner * outer).to(torch.float64)
    dtype = _SCALE_DTYPES.get(spec.scale_type, torch.float32)
    info = torch.finfo(dtype)
    return scale.clamp(info.smallest_normal * info.eps, info.max).to(dtype).to(torch.float64)


def outer_scale(scale: Tensor) -> Tensor:
    """Return the float32 scale ``[1]`` that takes the largest of ``scale`` to the top of float8.

    It has 20 significant bits. So its product with any number of float8, which has 4, is exact, and
    can be taken apart again.

    Source: NVFP4, as in NVIDIA's "Pretraining Large Language Models with NVFP4",
    arXiv:2509.25149, section 2.
    """
    largest = torch.finfo(torch.float8_e4m3fn).max
    mantissa, exponent = torch.frexp(scale.max().reshape(1).to(torch.float64) / largest)
    rounded = torch.ldexp((mantissa * 2**20).round(), exponent - 20)
    return rounded.to(torch.float32).clamp(min=MIN_SCALE)


_SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


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
            scale = round_scale(scale, spec).to(torch.float32)
            while abs(float(scale * steps)) > abs(end):  # the float32 product, as a kernel has it
                scale = _next_lower(scale, spec)
    return QParams(scale, qparams.zero_point, qparams.axis)


def _next_lower(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Return the next lower scales that can be stored."""
    if spec.power_of_two or spec.scale_type == "float8e8m0":
        return scale / 2
    stored = scale.to(_SCALE_DTYPES.get(spec.scale_type, torch.float32))
    bits = stored.view(torch.int32 if stored.dtype == torch.float32 else torch.int16)
    return (bits - 1).view(stored.dtype).to(torch.float32)  # positive floats count as integers do


def _range_with_zero(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    # float64, as in onnxruntime's quantizer: float32 can overflow in high - low, and moves ties.
    low, high = (end.detach().to(torch.float64) for end in (low, high))
    if spec.block_size is None:
        low, high = low.reshape(-1), high.reshape(-1)
    finite = torch.isfinite(low) & torch.isfinite(high)
    if not finite.all():
        index = int((~finite).reshape(-1).nonzero()[0])
        worst = low.reshape(-1)[index], high.reshape(-1)[index]
        raise InputError(
            f"cannot quantize the range [{worst[0]:g}, {worst[1]:g}] (index {index}): "
            "both ends must be finite; look for NaN or infinity in the data"
        )
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if not spec.min_real_range:
        return low, high
    least = low + spec.min_real_range
    if not spec.restricted:  # onnxruntime adds in float32 but there
        least = (low.float() + spec.min_real_range).double()
    return low, torch.maximum(high, least)


def block_extremes(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of every block, of the shape of the scale.

    Args:
        x: floats; a last block that is cut off is one of the values there are.
        spec: gives ``axis`` and ``block_size``.
    """
    assert spec.axis is not None
    assert spec.block_size is not None
    size, step = x.shape[spec.axis], spec.block_size
    rest = -size % step
    # The last value, repeated, changes no extreme.
    tail = x.narrow(spec.axis, size - 1, 1).repeat_interleave(rest, spec.axis)
    shape = (*x.shape[: spec.axis], -1, step, *x.shape[spec.axis + 1 :])
    blocks = torch.cat([x, tail], spec.axis).reshape(shape)
    low, high = torch.aminmax(blocks, dim=spec.axis + 1)
    return low, high


def scale_shape(shape: Sequence[int], spec: QuantSpec) -> tuple[int, ...]:
    """Return the shape of the scale of a tensor of ``shape``."""
    if spec.axis is None:
        return (1,)
    if spec.block_size is None:
        return (shape[spec.axis],)
    blocks = -(-shape[spec.axis] // spec.block_size)
    return (*shape[: spec.axis], blocks, *shape[spec.axis + 1 :])


def spread(values: Tensor, shape: Sequence[int], qparams: QParams | QuantSpec) -> Tensor:
    """Return scales or zero points as they broadcast against a tensor of ``shape``.

    Args:
        values: ``[1]``, ``[C]``, or one for each block.
        shape: of the tensor that they belong to.
        qparams: gives ``axis`` and ``block_size``.
    """
    axis, block_size = qparams.axis, qparams.block_size
    if block_size is None or axis is None:
        return along_axis(values, axis, len(shape))
    return values.repeat_interleave(block_size, axis).narrow(axis, 0, shape[axis])


def along_axis(values: Tensor, axis: int | None, rank: int) -> Tensor:
    """Return a view of ``[1]`` or ``[C]`` values that broadcasts along ``axis`` of ``rank``."""
    shape = [1] * rank
    if axis is not None:
        shape[axis] = -1
    return values.reshape(shape)


def quantize(x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
    """Return the codes of ``x``, stored as ``spec.dtype.torch_dtype``.

    Equal to onnxruntime's QuantizeLinear bit for bit up to 2^31 steps from 0. What lies beyond
    saturates, and NaN gets the smallest code of an integer type, as in its kernels for 8 and 16
    bits of float32; those for blocks, 4 and 2 bits and float16 overflow there.

    Args:
        x: floats of any shape.
        qparams: scale and zero point.
        spec: gives type and range of the codes.
    """
    dtype = spec.dtype
    # float32 holds every code of up to 16 bits, and float64 those of 32.
    work = torch.float64 if dtype.bits > 16 else torch.float32
    scale = spread(qparams.scale, x.shape, qparams)
    steps = x.detach().to(work) / scale.to(work)
    if dtype.function is not None:
        raise ConfigError(f"type {dtype} is a function and has no codes")
    if dtype.codebook:
        return nearest(steps, dtype.middles).to(dtype.torch_dtype)
    if not dtype.is_integer:
        return saturate_to(steps, dtype.onnx_type).to(dtype.torch_dtype)
    zero_point = spread(qparams.zero_point, x.shape, qparams)
    codes = steps.round_().add_(zero_point).clamp_(spec.qmin, spec.qmax)
    codes.nan_to_num_(nan=spec.qmin)
    return codes.to(torch.int32).to(dtype.torch_dtype)  # torch has no direct cast to every type


def dequantize(codes: Tensor, qparams: QParams, dtype: QuantType | None = None) -> Tensor:
    """Return the float32 values that codes stand for.

    Args:
        codes: integers or floats, as ``quantize`` returns them.
        qparams: scale and zero point.
        dtype: type of the codes; needed for code books.
    """
    scale = spread(qparams.scale, codes.shape, qparams)
    if dtype is not None and dtype.codebook:
        assert dtype.levels is not None
        return as_tensor(dtype.levels, codes.device)[codes.to(torch.int32)] * scale
    if codes.is_floating_point():
        return codes.to(torch.float32) * scale
    zero_point = spread(qparams.zero_point, codes.shape, qparams)
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
    return _bias_steps(bias, scale).to(torch.int32)


def fake_quantize_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 values of these codes; NaN stays NaN, and no device is waited for."""
    return _bias_steps(bias, scale).to(torch.float32) * scale


def _bias_steps(bias: Tensor, scale: Tensor) -> Tensor:
    steps = bias.detach().to(torch.float64) / scale.to(torch.float64)
    return steps.round_().clamp_(INT32.qmin, INT32.qmax)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return ``x`` rounded to the grid of its codes, in its own dtype.

    The arithmetic is float32 whatever the dtype of ``x``, and equal to onnxruntime's QuantizeLinear
    and DequantizeLinear bit for bit, save that NaN stays NaN. The gradient of ``x`` passes straight
    through where no code was clamped and is 0 elsewhere; ``scale`` and ``zero_point`` get none.
    A type that is a function computes and propagates what ``QuantFunction`` says.

    Args:
        x: floats of any shape.
        scale: float32, ``[1]``, ``[C]`` along ``spec.axis``, or one for each block.
        zero_point: integers of the shape of ``scale``; ignored for types that have none.
        spec: gives axis and range of the codes, of at most 16 bits.

    Source: straight-through estimator of Bengio et al., arXiv:1308.3432.
    """
    dtype, scale = spec.dtype, spread(scale, x.shape, spec)
    if dtype.levels is not None:
        return to_levels(x, scale, dtype)
    zero_point = spread(zero_point, x.shape, spec)
    if dtype.function is not None:
        if spec.axis is None:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        return by_function(x, scale, zero_point, dtype)
    return to_integers(x, scale, zero_point, spec.qmin, spec.qmax)


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
