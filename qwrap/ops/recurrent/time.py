"""Sequences of different lengths in one tensor ``[seq, batch, …]``, padded at the end."""

from __future__ import annotations

import torch
from torch import Tensor


def valid(lengths: Tensor, steps: int) -> Tensor:
    """Return which elements belong to a sequence, ``[seq, batch, 1]``."""
    return (torch.arange(steps, device=lengths.device)[:, None] < lengths)[..., None]


def zero_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Return ``x`` with zeros past the end of each sequence."""
    return x if lengths is None else torch.where(valid(lengths, x.shape[0]), x, 0.0)


def reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Return ``x`` with each sequence back to front; padding stays at the end."""
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(x.shape[0], device=x.device)[:, None]
    source = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x.gather(0, source[..., None].expand_as(x))


def last(x: Tensor, lengths: Tensor) -> Tensor:
    """Return the last valid element of each sequence, zero for an empty one."""
    index = (lengths.long() - 1).clamp(min=0)[None, :, None].expand(1, *x.shape[1:])
    return zero_empty(x.gather(0, index)[0], lengths)


def zero_empty(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Return states ``[…, batch, hidden]`` with zeros for empty sequences, as onnxruntime does."""
    return x if lengths is None else torch.where(lengths[:, None] > 0, x, 0.0)
