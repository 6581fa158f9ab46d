"""Round to nearest: scale and zero point of a block from its extremes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.nbits.blocks import BlockFormat, Blocks

AT_ONCE = 1 << 18  # weights whose temporaries are made together: they stay in the cache


@torch.no_grad()
def round_to_nearest(
    weight: Tensor,
    form: BlockFormat,
    _statistics: object = None,
    *,
    around_zero: bool = False,
) -> Blocks:
    """Return a matrix as codes that are the nearest to its values.

    Symmetric: the value that is largest in magnitude gets the lowest code, so its block's scale has
    the other sign than that value. Asymmetric: the codes span the block's extremes and 0. Codes are
    made with the scale as it is stored, in the dtype of the weight. All results are those of
    onnxruntime's quantizers, bit for bit, but for bfloat16, where these round the scale last.

    Args:
        weight: floats ``[N, K]``.
        form: bits, block size, symmetry.
        around_zero: what lies half way between two codes goes to the one further from the zero
            point, as in onnxruntime's blocked DequantizeLinear; else to the higher one, as in its
            MatMulNBits.

    Source: ``MlasQuantizeBlockwise`` and ``MlasQDQQuantizeBlockwise`` of onnxruntime, of which the
    results were compared.
    """
    weight = weight.contiguous()  # of a view of [K, N], rows are slow to read
    rows = max(1, AT_ONCE // max(1, weight.shape[1]))
    parts = [_round(part, form, around_zero) for part in torch.split(weight, rows)]
    codes, scale, zero_point = (torch.cat(column) for column in zip(*parts, strict=True))
    return Blocks(codes, scale, None if form.symmetric else zero_point, form)


def _round(weight: Tensor, form: BlockFormat, around_zero: bool) -> tuple[Tensor, Tensor, Tensor]:
    inputs = weight.shape[1]
    size = form.block_size or inputs
    padded = F.pad(weight.float(), (0, -inputs % size))
    blocks = padded.reshape(len(weight), -1, size)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)  # aminmax is slow
    scale, zero_point = spread(low, high, form, weight.dtype)
    top = 2**form.bits - 1
    stored = scale.float()
    steps = blocks * torch.where(stored == 0, 0.0, 1.0 / stored)
    if around_zero:
        codes = round_half_away(steps).add_(zero_point).clamp_(0, top)
    else:
        codes = _round_half_up(steps.add_(zero_point).clamp_(0, top))
    codes = codes.flatten(1)[:, :inputs].to(torch.uint8)
    return codes, scale[..., 0], zero_point[..., 0].to(torch.uint8)


def spread(
    low: Tensor, high: Tensor, form: BlockFormat, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the scales that reach from ``low`` to ``high``, and zero points.

    Args:
        low: smallest values, float32.
        high: largest values.
        form: bits and symmetry.
        dtype: of the scales, 0 where all values are.

    Returns:
        Scales in ``dtype``, and zero points as whole float32 numbers.
    """
    top, middle = 2**form.bits - 1, 2 ** (form.bits - 1)
    if form.symmetric:
        exact = torch.where(high.abs() > low.abs(), high, low) / -middle
        return exact.to(dtype), torch.full_like(low, middle)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    exact = (high - low) / top
    zero_point = round_half_away(torch.where(exact == 0, low, -low / exact)).clamp_(0, top)
    return exact.to(dtype), zero_point


def round_half_away(x: Tensor) -> Tensor:
    """Round to integers, halves away from 0."""
    return torch.copysign(_round_half_up(x.abs()), x)


def _round_half_up(x: Tensor) -> Tensor:
    """Round numbers that are not negative, and spoil ``x``.

    ``floor(x + 0.5)`` is wrong just below a half; here the difference is exact.
    """
    whole = x.floor()
    return whole.add_(x.sub_(whole).ge_(0.5))
