"""The ranges of weights, from the weights themselves."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from qwrap.config import WEIGHT_METHODS, QuantSpec
from qwrap.errors import ConfigError, InputError
from qwrap.numerics import block_extremes, fake_quantize, scale_shape
from qwrap.quant.ranges.scaling import RowScaling
from qwrap.quant.ranges.search import Cost, Steps, least_cost

_CHUNK = 2**18  # values quantized at once, so that temporaries stay in the cache
_STEPS = Steps(
    both=[*(1 - i / 16 for i in range(1, 8)), *(2 ** (-i / 4) for i in range(4, 21))],
    each=[],
    fine=[(1 - 1 / 32, 1 + 1 / 32), (1 - 1 / 64, 1 + 1 / 64)],
)


def choose_weight_range(
    weight: Tensor, spec: QuantSpec, method: str = "mse"
) -> tuple[Tensor, Tensor]:
    """Return the range of a weight, or of each of its channels or blocks.

    A channel of zeros gets the widest range of all channels, so that its scale, and its bias's
    with it, is of the order of the others; so does a block.

    Args:
        weight: floats.
        spec: how it will be quantized: per tensor, per channel, or in blocks.
        method: ``"minmax"``, or ``"mse"`` for the clipped range with the least squared error,
            which is never above that of ``"minmax"``.

    Returns:
        Low and high, float32, of the shape of the scale.

    Raises:
        ConfigError: the method is unknown.
        InputError: the weight holds NaN or infinity.
    """
    if method not in WEIGHT_METHODS:
        raise ConfigError(
            f"no range method {method!r} for weights; choose one of {', '.join(WEIGHT_METHODS)}"
        )
    rows = _rows(weight.detach(), spec)
    low, high = _extremes(weight, rows, spec)
    if not (low.isfinite().all() and high.isfinite().all()):
        raise InputError("a weight holds NaN or infinity: its range must be finite")
    scaling = RowScaling.of(low, high, spec)
    if method == "mse":
        low, high = _least_squares(rows, low, high, scaling)
    widest = (low.min(), high.max()) if scaling.unit is None else scaling.unit
    zero = (low == 0) & (high == 0)
    low, high = torch.where(zero, widest[0], low), torch.where(zero, widest[1], high)
    shape = scale_shape(weight.shape, spec)
    return _as_scale(low, shape, spec), _as_scale(high, shape, spec)


def _rows(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Return what shares a scale side by side, float32 ``[R, K]``; blocks are filled with zeros."""
    if spec.axis is None:
        return weight.reshape(1, -1).to(torch.float32)
    if spec.block_size is None:
        return weight.movedim(spec.axis, 0).reshape(weight.shape[spec.axis], -1).to(torch.float32)
    along = weight.movedim(spec.axis, -1).to(torch.float32)
    missing = -along.shape[-1] % spec.block_size
    filled = pad(along, (0, missing)) if missing else along
    return filled.reshape(-1, spec.block_size)


def _extremes(weight: Tensor, rows: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest value of each row, without what blocks are filled with."""
    if spec.axis is None or spec.block_size is None:
        low, high = torch.aminmax(rows, dim=1)
        return low, high
    ends = block_extremes(weight.detach().to(torch.float32), spec)
    low, high = (end.movedim(spec.axis, -1).reshape(-1) for end in ends)
    return low, high


def _least_squares(
    rows: Tensor, low: Tensor, high: Tensor, scaling: RowScaling
) -> tuple[Tensor, Tensor]:
    """Return the ranges of least squared error, float32 ``[R]``, from a few rows at a time."""
    found = []
    count = max(1, _CHUNK // rows.shape[1])
    for start in range(0, rows.shape[0], count):
        chunk = slice(start, start + count)
        ends = low[chunk].to(torch.float64), high[chunk].to(torch.float64)
        best = least_cost(
            _squared_error(rows[chunk], scaling),
            *ends,
            _STEPS,
            apart=not scaling.spec.symmetric,
            pinned=scaling.pinned(*ends),
        )
        found.append(torch.stack(best))
    low, high = torch.cat(found, 1).to(torch.float32)
    return low, high


def _squared_error(rows: Tensor, scaling: RowScaling) -> Cost:
    """Return the function that gives the squared error of every row, ``[R]``."""
    by_row = replace(scaling.spec, axis=0)
    tiles = torch.split(rows, max(1, _CHUNK // rows.shape[0]), dim=1)

    def cost(low: Tensor, high: Tensor) -> Tensor:
        qparams = scaling.qparams(low, high)
        total = torch.zeros_like(low)
        for tile in tiles:
            error = fake_quantize(tile, qparams.scale, qparams.zero_point, by_row).sub_(tile)
            total += error.square_().sum(1, dtype=torch.float64)
        return total

    return cost


def _as_scale(ends: Tensor, shape: tuple[int, ...], spec: QuantSpec) -> Tensor:
    if spec.block_size is None or spec.axis is None:
        return ends
    moved = [*shape[: spec.axis], *shape[spec.axis + 1 :], shape[spec.axis]]
    return ends.reshape(moved).movedim(-1, spec.axis).contiguous()
