"""The passes without a compiler on a CPU: piece by piece, each piece staying in the cache.

torch does not vectorise operations that write booleans or choose by them: they take ten times the
time of those that write float32. So every comparison here has a float32 result, 0 or 1, and every
choice is a product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qwrap.fused.plain import ABOVE, BELOW, LARGEST, NEITHER, RESIDUAL_STEPS, Gradients, Needs

ELEMENTS = 2**16
"""Elements of a piece for each thread: starting an operation no longer costs much, and what a pass
holds at a time fits into the second cache."""

FAR = 1000.0
"""Takes a code that is one step or more outside beyond what ``kept`` can hold."""

Piece = tuple[slice, slice, slice]


def forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: float, qmax: float, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Return what ``passes.forward`` says."""
    values = torch.empty_like(x)
    kept = torch.empty_like(x, dtype=torch.int8) if keep else None
    spread_scale, spread_zero_point = _spread(scale), _spread(zero_point.to(torch.float32))
    for _, piece in _pieces(x):
        s, z = spread_scale[:, piece[1]], spread_zero_point[:, piece[1]]
        steps = x[piece].to(torch.float32) / s
        codes = steps.round()
        residual = torch.sub(codes, steps, out=steps) if kept is not None else steps
        codes.add_(z)
        clamped = codes.clamp(qmin, qmax)
        if kept is not None:
            residual.mul_(RESIDUAL_STEPS).round_().nan_to_num_(nan=0.0)  # infinity has none
            residual.add_(codes.sub_(clamped), alpha=FAR).clamp_(BELOW, ABOVE)
            kept[piece] = residual.nan_to_num_(nan=NEITHER)
        clamped.sub_(z)
        values[piece] = clamped.mul_(s)
    return values, kept


def backward_kept(gradient: Tensor, kept: Tensor, *, needs: Needs) -> Gradients:
    """Return what ``passes.backward_kept`` says."""
    through = torch.empty_like(gradient) if needs.x else None
    wide = torch.promote_types(gradient.dtype, torch.float32)
    sums = _Sums(gradient, wide) if needs.sums else None
    for row, piece in _pieces(gradient):
        g, codes = gradient[piece].to(wide), kept[piece].to(wide)
        product = codes.abs().le_(LARGEST).mul_(g)
        if through is not None:
            through[piece] = product
        if sums is not None:
            sums.inside(row, piece, product.mul_(codes))
            sums.below(row, piece, torch.eq(codes, BELOW, out=product).mul_(g))
            sums.above(row, piece, codes.eq_(ABOVE).mul_(g))
    if sums is None:
        return Gradients(through, None, None, None)
    inside, below, above = sums.total()
    return Gradients(through, inside.div_(RESIDUAL_STEPS), below, above)


def backward_recomputed(
    gradient: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: float,
    qmax: float,
    *,
    needs: Needs,
) -> Gradients:
    """Return what ``passes.backward_recomputed`` says."""
    through = torch.empty_like(gradient) if needs.x else None
    wide = torch.promote_types(gradient.dtype, torch.float32)
    sums = _Sums(gradient, wide) if needs.sums else None
    spread_scale, spread_zero_point = _spread(scale), _spread(zero_point.to(torch.float32))
    for row, piece in _pieces(gradient):
        g = gradient[piece].to(wide)
        steps = x[piece].to(torch.float32) / spread_scale[:, piece[1]]
        codes = steps.round()
        residual = torch.sub(codes, steps, out=steps).nan_to_num_(nan=0.0)  # infinity has none
        codes.add_(spread_zero_point[:, piece[1]])
        beyond = codes.sub_(codes.clamp(qmin, qmax)).to(wide)  # below 0, above 0 or NaN
        product = torch.eq(beyond, 0.0, out=torch.empty_like(beyond)).mul_(g)
        if through is not None:
            through[piece] = product
        if sums is not None:
            sums.inside(row, piece, product.mul_(residual))
            sums.below(row, piece, torch.lt(beyond, 0.0, out=product).mul_(g))
            sums.above(row, piece, beyond.gt_(0.0).mul_(g))
    return Gradients(through, *(sums.total() if sums is not None else (None, None, None)))


def _spread(values: Tensor) -> Tensor:
    return values.reshape(1, -1, 1)


class _Sums:
    """Three sums for each channel, gathered piece by piece and added up pairwise at the end."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        rows = 1 + max((row for row, _ in _pieces(like)), default=0)
        self._parts = like.new_zeros((3, rows, like.shape[1]), dtype=dtype)

    def inside(self, row: int, piece: Piece, values: Tensor) -> None:
        """Take in what one piece says."""
        torch.sum(values, (0, 2), out=self._parts[0, row, piece[1]])

    def below(self, row: int, piece: Piece, values: Tensor) -> None:
        """Take in what one piece says."""
        torch.sum(values, (0, 2), out=self._parts[1, row, piece[1]])

    def above(self, row: int, piece: Piece, values: Tensor) -> None:
        """Take in what one piece says."""
        torch.sum(values, (0, 2), out=self._parts[2, row, piece[1]])

    def total(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums of all pieces, each ``[C]``."""
        inside, below, above = self._parts.sum(1).to(torch.float32)
        return inside, below, above


def _pieces(x: Tensor) -> Iterator[tuple[int, Piece]]:
    """Yield pieces of ``[outer, C, inner]``, numbered so that no two of one channel agree."""
    if not x.numel():
        return
    outer, channels, inner = x.shape
    room = ELEMENTS * torch.get_num_threads()
    inner_step = min(inner, room)
    channel_step = min(channels, max(room // inner, 1))
    outer_step = max(room // (channels * inner), 1)
    row = 0
    for o in range(0, outer, outer_step):
        for i in range(0, inner, inner_step):
            for c in range(0, channels, channel_step):
                yield (
                    row,
                    (
                        slice(o, o + outer_step),
                        slice(c, c + channel_step),
                        slice(i, i + inner_step),
                    ),
                )
            row += 1
