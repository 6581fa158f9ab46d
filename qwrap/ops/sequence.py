"""Sequences, which are lists of tensors, and optionals, which are a value or None.

A list is never changed: an operator that edits one returns another list of the same tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwrap.ops.registry import op


@op("SequenceConstruct", since=(11,))
def sequence_construct(*inputs: Tensor) -> list[Tensor]:
    """Make a sequence of the inputs."""
    return [*inputs]


@op("SequenceEmpty", since=(11,), ignored=("dtype",))
def sequence_empty() -> list[Tensor]:
    """Make an empty sequence."""
    return []


@op("SequenceAt", since=(11,), host=(1,))
def sequence_at(input_sequence: list[Tensor], position: Any) -> Tensor:
    """Return the tensor at ``position``, counted from the end if negative."""
    return input_sequence[_checked(position, len(input_sequence))]


@op("SequenceInsert", since=(11,), host=(2,))
def sequence_insert(
    input_sequence: list[Tensor], tensor: Tensor, position: Any = None
) -> list[Tensor]:
    """Put ``tensor`` before ``position``, or behind the last without one."""
    end = len(input_sequence)
    at = end if position is None else _checked(position, end, last=end)
    at = at + end if at < 0 else at
    return [*input_sequence[:at], tensor, *input_sequence[at:]]


@op("SequenceErase", since=(11,), host=(1,))
def sequence_erase(input_sequence: list[Tensor], position: Any = None) -> list[Tensor]:
    """Leave out the tensor at ``position``, or the last one without it."""
    count = len(input_sequence)
    at = _checked(-1 if position is None else position, count) % count
    return [*input_sequence[:at], *input_sequence[at + 1 :]]


def _checked(position: Any, count: int, last: int | None = None) -> int:
    """Return a position, given as a number or a list of one, that is inside ``-count … last``."""
    (at,) = position if isinstance(position, list) else [position]
    last = count - 1 if last is None else last
    if not -count <= at <= last:
        raise IndexError(f"position {at} in a sequence of {count} tensors")
    return int(at)


@op("SplitToSequence", since=(11, 24), host=(1,))
def split_to_sequence(
    x: Tensor, split: Any = None, *, axis: int = 0, keepdims: int = 1
) -> list[Tensor]:
    """Cut along ``axis``: into pieces of one number or of a list of sizes, else single slices.

    ``keepdims`` counts only without ``split``.
    """
    if split is None:
        return [*(torch.split(x, 1, axis) if keepdims else x.unbind(axis))]
    return [*torch.split(x, split, axis)]


@op("ConcatFromSequence", since=(11,))
def concat_from_sequence(input_sequence: list[Tensor], *, axis: int, new_axis: int = 0) -> Tensor:
    """Join the tensors along ``axis``, or along a new one."""
    join = torch.stack if new_axis else torch.cat
    return join(input_sequence, axis)


@op("Optional", since=(15, 28), ignored=("type",))
def optional(x: Any = None) -> Any:
    """Return the value, or None without one."""
    return x


@op("OptionalGetElement", since=(15, 18, 28))
def optional_get_element(x: Any) -> Any:
    """Return what the optional holds."""
    if x is None:
        raise ValueError("the optional is empty")
    return x
