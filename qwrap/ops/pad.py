"""Padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.ops.limits import one_of
from qwrap.ops.registry import op
from qwrap.ops.window import torch_pads

TORCH_MODES = {"reflect": "reflect", "edge": "replicate"}


MODES = one_of("constant", "reflect", "edge", "wrap")


@op("Pad", since=(11, 13, 18, 19, 21, 23, 24, 25), host=(1, 2, 3), allowed={"mode": MODES})
def pad(
    data: Tensor,
    pads: Sequence[int],
    constant_value: float | Sequence[float] | None = None,
    axes: Sequence[int] | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    """Add to (or, where negative, cut from) both ends of ``axes``."""
    count = len(pads) // 2
    begin, end = list(pads[:count]), list(pads[count:])
    if axes is not None:
        begin, end = _spread(begin, axes, data.ndim), _spread(end, axes, data.ndim)
    if mode == "constant":
        value = constant_value[0] if isinstance(constant_value, Sequence) else constant_value
        # Not F.pad, which makes a float of a large integer.
        return torch.constant_pad_nd(data, torch_pads(begin, end), 0 if value is None else value)
    if _torch_can(data, begin, end, mode):
        return F.pad(data, torch_pads(begin[-2:], end[-2:]), mode=TORCH_MODES[mode])
    for axis, (before, after) in enumerate(zip(begin, end, strict=True)):
        if before or after:
            data = _pad_axis(data, axis, before, after, mode)
    return data


def _spread(pads: Sequence[int], axes: Sequence[int], rank: int) -> list[int]:
    """Return pads for all axes from those for ``axes``."""
    spread = [0] * rank
    for axis, value in zip(axes, pads, strict=True):
        spread[axis] = value
    return spread


def _torch_can(data: Tensor, begin: Sequence[int], end: Sequence[int], mode: str) -> bool:
    """Whether ``F.pad`` does it: two inner axes of four, not beyond one reflection."""
    if data.ndim != 4 or mode not in TORCH_MODES or not data.dtype.is_floating_point:
        return False
    if any((*begin[:2], *end[:2])) or min((*begin, *end)) < 0:
        return False
    inner = zip(data.shape[2:], begin[2:], end[2:], strict=True)
    return all(max(before, after) < n for n, before, after in inner)


def _pad_axis(data: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """Extend one axis by copies of its elements, after cutting where a pad is negative."""
    data = data.narrow(axis, max(-before, 0), data.shape[axis] - max(-before, 0) - max(-after, 0))
    n = data.shape[axis]
    index = torch.arange(-max(before, 0), n + max(after, 0), device=data.device)
    if mode == "edge":
        index = index.clamp(0, n - 1)
    elif mode == "wrap":
        index %= n
    else:  # mirrored at the first and last element, again and again
        period = max(2 * (n - 1), 1)
        index %= period
        index = torch.minimum(index, period - index) if n > 1 else index
    return data.index_select(axis, index)


@op("Pad", since=(2,), allowed={"mode": one_of("constant", "reflect", "edge")})
def pad_attributes(
    data: Tensor, *, pads: Sequence[int], mode: str = "constant", value: float = 0.0
) -> Tensor:
    """Add to or cut from both ends of all axes."""
    return pad(data, pads, value, mode=mode)


@op("Pad", since=(1,), allowed={"mode": one_of("constant", "reflect", "edge")})
def pad_paddings(
    data: Tensor, *, paddings: Sequence[int], mode: str = "constant", value: float = 0.0
) -> Tensor:
    """Add to or cut from both ends of all axes."""
    return pad(data, paddings, value, mode=mode)
