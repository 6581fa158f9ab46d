"""Calibration data one sample at a time, wherever the model treats samples alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qwrap.errors import QwrapError
from qwrap.model.wrapped import WrappedModel

Inputs = Mapping[str, Any]
Axis = int | None
"""The axis along which a value has its samples; None for one that is the same for all."""

CHUNK = 32  # samples that run together
ALIKE = 1e-3  # of the largest value: what rounding may change if samples run together


class Samples:
    """Samples to draw from: rows of the batches if they can run side by side, else whole batches.

    That is tried out: two samples go through the float model alone, and together.

    Args:
        model: the float model.
        batches: graph input -> value.
        keys: activations that samples will be cut at.

    Attributes:
        rows: the graph inputs of each sample.
        sizes: bytes of each of ``keys`` for one sample.
    """

    def __init__(self, model: WrappedModel, batches: Sequence[Inputs], keys: Iterable[str]) -> None:
        asked = list(keys)
        rows = _rows(batches)
        pair = None if rows is None else _pair(rows)
        self._axes: dict[str, Axis] | None = None
        if rows is not None and pair is not None:
            self._axes = _axes(model, pair, asked)
        together = rows is not None and (self._axes is not None or len(rows) == len(batches))
        self.rows: list[Inputs] = list(batches) if rows is None or not together else rows
        seen = _seen(model, self.rows[0], asked)
        self.sizes = {key: _size(value) for key, value in seen.items()}

    def groups(
        self, ids: Iterable[int], values: Mapping[str, Mapping[int, Any]], size: int = CHUNK
    ) -> list[list[int]]:
        """Return ``ids`` in groups that can run together: those of equal shapes.

        Args:
            ids: of samples.
            values: activation -> sample -> value.
            size: the most samples in a group.
        """
        found: dict[Any, list[int]] = {}
        for i in ids:
            given = [*self.rows[i].values(), *(each[i] for each in values.values())]
            key = tuple(tuple(x.shape) for x in given if isinstance(x, Tensor))
            found.setdefault(key if self._axes is not None else i, []).append(i)
        return [g[i : i + size] for g in found.values() for i in range(0, len(g), size)]

    def axis(self, key: str) -> Axis:
        """Return the axis of an activation along which samples lie side by side."""
        return None if self._axes is None else self._axes[key]

    def batch(self, ids: Sequence[int]) -> Inputs:
        """Return the graph inputs of a group of samples."""
        return {name: self.inputs(name, ids) for name in self.rows[ids[0]]}

    def inputs(self, name: str, ids: Sequence[int]) -> Any:
        """Return a graph input for a group of samples."""
        first = self.rows[ids[0]][name]
        if len(ids) == 1 or not first.dim():  # without dimensions it is the same for all
            return first
        return torch.cat([self.rows[i][name] for i in ids])

    def join(self, key: str, values: Sequence[Any]) -> Any:
        """Return an activation for a group of samples from those for each."""
        axis = self.axis(key)
        return values[0] if len(values) == 1 or axis is None else torch.cat(list(values), axis)

    def cut(self, key: str, value: Any, count: int) -> list[Any]:
        """Return an activation for each of ``count`` samples from that for the group."""
        axis = self.axis(key)
        if count == 1 or axis is None:
            return [value] * count
        return [part.clone() for part in value.chunk(count, axis)]


def _rows(batches: Sequence[Inputs]) -> list[Inputs] | None:
    """Return the batches cut along the first axis of all inputs, None where they have none."""
    rows: list[Inputs] = []
    for batch in batches:
        if not all(isinstance(x, Tensor) for x in batch.values()):
            return None
        sizes = {len(x) for x in batch.values() if x.dim()}
        if len(sizes) != 1:
            return None
        rows += [
            {k: x[i : i + 1] if x.dim() else x for k, x in batch.items()}
            for i in range(sizes.pop())
        ]
    single = {k: x for k, x in rows[0].items() if not x.dim()} if rows else {}
    same = all(torch.equal(row[k], x) for row in rows for k, x in single.items())
    return rows if same and rows else None


def _pair(rows: Sequence[Inputs]) -> tuple[Inputs, Inputs] | None:
    """Return two samples of the same shapes, None if there are none."""
    first: dict[Any, Inputs] = {}
    for row in rows:
        shape = tuple(tuple(x.shape) for x in row.values())
        if shape in first:
            return first[shape], row
        first[shape] = row
    return None


def _axes(
    model: WrappedModel, pair: tuple[Inputs, Inputs], keys: Sequence[str]
) -> dict[str, Axis] | None:
    """Return the axis of samples of each activation, None if they cannot run together."""
    both = {k: torch.cat([x, pair[1][k]]) if x.dim() else x for k, x in pair[0].items()}
    try:
        alone, together = [_seen(model, row, keys) for row in pair], _seen(model, both, keys)
    except (RuntimeError, ValueError, IndexError, TypeError, QwrapError):
        return None  # a graph may be for one batch size only
    found: dict[str, Axis] = {}
    for key in keys:
        first, second, joint = alone[0][key], alone[1][key], together[key]
        axis = _axis(first, second, joint)
        if axis == -1:
            return None
        found[key] = None if axis == -2 else axis
    return found


def _axis(first: Any, second: Any, both: Any) -> int:
    """Return the axis along which the third value is the first two; -2 if they are the same."""
    if not all(isinstance(x, Tensor) for x in (first, second, both)):
        return -1
    if first.shape == second.shape == both.shape:
        return -2 if _is_alike(first, both) and _is_alike(second, both) else -1
    for axis in range(min(first.dim(), both.dim())):
        rest = [x.shape[:axis] + x.shape[axis + 1 :] for x in (first, second, both)]
        sizes = [x.shape[axis] for x in (first, second, both)]
        if len(set(rest)) == 1 and sizes[0] == sizes[1] and sum(sizes[:2]) == sizes[2]:
            return axis if _is_alike(torch.cat([first, second], axis), both) else -1
    return -1


def _is_alike(some: Tensor, others: Tensor) -> bool:
    if not some.is_floating_point() or not some.numel():
        return torch.equal(some, others)
    finite = some.isfinite() & others.isfinite()
    if not torch.equal(finite, some.isfinite()):
        return False
    a, b = torch.where(finite, some, 0), torch.where(finite, others, 0)
    return bool((a - b).abs().max() <= ALIKE * a.abs().max())


@torch.no_grad()
def _seen(model: WrappedModel, inputs: Inputs, keys: Iterable[str]) -> dict[str, Any]:
    """Return the activations with these keys for a batch."""
    found: dict[str, Any] = {}

    def watch(key: str) -> Any:
        return lambda x: found.__setitem__(key, x)

    with model.watching({key: watch(key) for key in keys}):
        model(**inputs)
    return found


def _size(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_size, value))
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
