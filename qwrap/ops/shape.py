"""Operators that rearrange, join, cut and repeat without looking at values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.errors import InputError
from qwrap.ops.limits import at_least, one_of
from qwrap.ops.registry import op

SINCE_13 = (13, 21, 23, 24, 25)
SINCE_14 = (14, 19, 21, 23, 24, 25)
SINCE_19 = (19, 21, 23, 24, 25)


@op("Identity", since=(1, 13, 14, 16, *SINCE_19))
def identity(input: Tensor) -> Tensor:
    """Return the input."""
    return input


@op("Shape", since=(1, 13, 15, *SINCE_19))
def shape(data: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """Return the sizes of the axes from ``start`` to before ``end``, int64 on the CPU."""
    return torch.tensor(data.shape[start:end], dtype=torch.int64)


@op("Size", since=(1, 13, *SINCE_19))
def size(data: Tensor) -> Tensor:
    """Return the number of elements, int64 on the CPU."""
    return torch.tensor(data.numel(), dtype=torch.int64)


@op("Reshape", since=(5, 13, *SINCE_14), host=(1,))
def reshape(data: Tensor, shape: Sequence[int], *, allowzero: int = 0) -> Tensor:
    """Give ``data`` another shape: -1 means what is left over, 0 the size of that axis of data."""
    if not allowzero and 0 in shape:
        shape = [data.shape[axis] if n == 0 else n for axis, n in enumerate(shape)]
    return data.reshape(shape)


@op("Reshape", since=(1,))
def reshape_to_attribute(data: Tensor, *, shape: Sequence[int]) -> Tensor:
    """Give ``data`` another shape."""
    return reshape(data, shape)


@op("Flatten", since=(1, 9, 11, *SINCE_13))
def flatten(input: Tensor, *, axis: int = 1) -> Tensor:
    """Make a matrix: the axes before ``axis`` times the axes from it on."""
    rows = 1
    for n in input.shape[:axis]:
        rows *= n
    columns = 1
    for n in input.shape[axis:] if axis != input.ndim else ():
        columns *= n
    return input.reshape(rows, columns)


@op("Transpose", since=(1, *SINCE_13))
def transpose(data: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Permute the axes; reverse them without ``perm``."""
    return data.permute(tuple(range(data.ndim - 1, -1, -1) if perm is None else perm))


@op("Squeeze", since=SINCE_13, host=(1,))
def squeeze(data: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    """Drop the axes ``axes``, or all axes of size 1.

    Raises:
        InputError: one of ``axes`` is of another size; torch would keep it.
    """
    if not axes:
        return data.squeeze()
    for axis in axes:
        if data.shape[axis] != 1:
            raise InputError(
                f"Squeeze of axis {axis}, of size {data.shape[axis]}; only size 1 can be dropped"
            )
    return data.squeeze(tuple(axes))


@op("Squeeze", since=(1, 11))
def squeeze_attribute(data: Tensor, *, axes: Sequence[int] | None = None) -> Tensor:
    """Drop the axes ``axes``, or all axes of size 1."""
    return squeeze(data, axes)


@op("Unsqueeze", since=SINCE_13, host=(1,))
def unsqueeze(data: Tensor, axes: int | Sequence[int]) -> Tensor:
    """Insert axes of size 1; ``axes`` are positions in the result."""
    axes = [axes] if isinstance(axes, int) else axes
    rank = data.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        data = data.unsqueeze(axis)
    return data


@op("Unsqueeze", since=(1, 11))
def unsqueeze_attribute(data: Tensor, *, axes: Sequence[int]) -> Tensor:
    """Insert axes of size 1."""
    return unsqueeze(data, axes)


@op("Expand", since=(8, 13), host=(1,))
def expand(input: Tensor, shape: Sequence[int]) -> Tensor:
    """Broadcast ``input`` and ``shape`` against each other; the result is a view."""
    new = max(len(shape) - input.ndim, 0)
    target = [1] * (input.ndim - len(shape)) + list(shape)
    return input.expand([-1 if n == 1 and axis >= new else n for axis, n in enumerate(target)])


@op("Tile", since=(6, 13), host=(1,))
def tile(input: Tensor, repeats: Sequence[int]) -> Tensor:
    """Repeat ``input`` along each axis."""
    return input.repeat(tuple(repeats))


@op("Tile", since=(1,), host=(1, 2))
def tile_one_axis(
    input: Tensor, tiles: float | Sequence[float], axis: float | Sequence[float]
) -> Tensor:
    """Repeat ``input`` along one axis; both numbers have the type of ``input``."""
    count, dim = (int(n[0] if isinstance(n, Sequence) else n) for n in (tiles, axis))
    return input.repeat([count if i == dim % input.ndim else 1 for i in range(input.ndim)])


@op("Concat", since=(4, 11, 13))
def concat(*inputs: Tensor, axis: int) -> Tensor:
    """Join along ``axis``."""
    return torch.cat(inputs, axis)


@op("Concat", since=(1,))
def concat_1(*inputs: Tensor, axis: int = 1) -> Tensor:
    """Join along ``axis``."""
    return torch.cat(inputs, axis)


@op("Split", since=(13,), host=(1,))
def split_13(
    input: Tensor, split: Sequence[int] | None = None, *, axis: int = 0, output_count: int = 1
) -> tuple[Tensor, ...]:
    """Cut into parts of the sizes ``split``, or equal ones.

    Raises:
        InputError: no equal parts are possible; torch would return more of them.
    """
    if split:
        return torch.split(input, list(split), axis)
    size, rest = divmod(input.shape[axis], output_count)
    if rest:
        raise InputError(
            f"Split of axis {axis}, of size {input.shape[axis]}, into {output_count} equal parts"
        )
    return torch.split(input, [size] * output_count, axis)


@op("Split", since=(18,), host=(1,), allowed={"num_outputs": at_least(1)})
def split_18(
    input: Tensor,
    split: Sequence[int] | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
) -> tuple[Tensor, ...]:
    """Cut into parts of the sizes ``split``, or ``num_outputs`` ones of which the last is less."""
    if split:
        return torch.split(input, list(split), axis)
    assert num_outputs is not None
    n = input.shape[axis]
    size = -(-n // num_outputs)
    sizes = [min(size, max(n - i * size, 0)) for i in range(num_outputs)]
    return torch.split(input, sizes, axis)


@op("Split", since=(2, 11))
def split_attribute(
    input: Tensor, *, axis: int = 0, split: Sequence[int] | None = None, output_count: int = 1
) -> tuple[Tensor, ...]:
    """Cut into parts of the sizes ``split``, or equal ones."""
    return split_1(input, axis=axis, split=split, output_count=output_count)


@op("Split", since=(1,), host=(1,))
def split_1(
    input: Tensor,
    sizes: Sequence[float] | None = None,
    *,
    axis: int = 0,
    split: Sequence[int] | None = None,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """Cut into parts of sizes that an input (of the type of ``input``) or an attribute gives."""
    parts = split or [int(size) for size in sizes or ()]
    return split_13(input, parts, axis=axis, output_count=output_count)


ORDERS = one_of("DCR", "CRD")


@op("DepthToSpace", since=(11, 13, 28), allowed={"blocksize": at_least(1), "mode": ORDERS})
def depth_to_space(input: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Spread channels over blocks of pixels; in CRD the original channel varies slowest."""
    if mode == "CRD":
        return F.pixel_shuffle(input, blocksize)
    n, c, h, w = input.shape
    blocks = input.reshape(n, blocksize, blocksize, c // blocksize**2, h, w)
    blocks = blocks.permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(n, c // blocksize**2, h * blocksize, w * blocksize)


@op("DepthToSpace", since=(1,), allowed={"blocksize": at_least(1)})
def depth_to_space_1(input: Tensor, *, blocksize: int) -> Tensor:
    """Spread channels over blocks of pixels."""
    return depth_to_space(input, blocksize=blocksize)


@op("SpaceToDepth", since=(28,), allowed={"blocksize": at_least(1), "mode": ORDERS})
def space_to_depth(input: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Gather blocks of pixels into channels; in CRD the original channel varies slowest."""
    if mode == "CRD":
        return F.pixel_unshuffle(input, blocksize)
    n, c, h, w = input.shape
    blocks = input.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize)
    blocks = blocks.permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(n, c * blocksize**2, h // blocksize, w // blocksize)


@op("SpaceToDepth", since=(1, 13), allowed={"blocksize": at_least(1)})
def space_to_depth_1(input: Tensor, *, blocksize: int) -> Tensor:
    """Gather blocks of pixels into channels."""
    return space_to_depth(input, blocksize=blocksize)
