"""Reductions over axes.

Axes are an attribute in old revisions and an input in new ones, which also have
``noop_with_empty_axes``; what is computed is written once for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qwrap.ops.registry import op

Dims = tuple[int, ...]
Reduction = Callable[[Tensor, Dims, bool], Tensor]


def _sum(x: Tensor, dims: Dims, keepdim: bool) -> Tensor:
    return x.sum(dims, keepdim=keepdim, dtype=x.dtype)


def _is_empty(x: Tensor, dims: Dims) -> bool:
    """Whether each reduced set has no element."""
    return x.numel() == 0 and any(x.shape[dim] == 0 for dim in dims)


def _mean(x: Tensor, dims: Dims, keepdim: bool) -> Tensor:
    if _is_empty(x, dims):  # undefined in ONNX; onnxruntime gives zero
        return _sum(x, dims, keepdim)
    if x.dtype.is_floating_point:
        return x.mean(dims, keepdim=keepdim)
    count = 1
    for dim in dims:
        count *= x.shape[dim]
    return torch.div(_sum(x, dims, keepdim), count, rounding_mode="trunc")


def _max(x: Tensor, dims: Dims, keepdim: bool) -> Tensor:
    if _is_empty(x, dims):
        return torch.full_like(x.sum(dims, keepdim=keepdim), _lowest(x.dtype), dtype=x.dtype)
    return x.amax(dims, keepdim=keepdim)


def _min(x: Tensor, dims: Dims, keepdim: bool) -> Tensor:
    if _is_empty(x, dims):
        return torch.full_like(x.sum(dims, keepdim=keepdim), _highest(x.dtype), dtype=x.dtype)
    return x.amin(dims, keepdim=keepdim)


def _lowest(dtype: torch.dtype) -> float:
    """Return what is not above any number: the largest of an empty set."""
    if dtype.is_floating_point:
        return -math.inf
    return False if dtype == torch.bool else torch.iinfo(dtype).min


def _highest(dtype: torch.dtype) -> float:
    """Return what is not below any number: the smallest of an empty set."""
    if dtype.is_floating_point:
        return math.inf
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def _prod(x: Tensor, dims: Dims, keepdim: bool) -> Tensor:
    for dim in sorted((dim % x.ndim for dim in dims), reverse=True):
        x = x.prod(dim, keepdim=keepdim, dtype=x.dtype)
    return x


def _l1(x: Tensor, dims: Dims, keepdim: bool) -> Tensor:
    return _sum(x.abs(), dims, keepdim)


def _l2(x: Tensor, dims: Dims, keepdim: bool) -> Tensor:
    if x.dtype.is_floating_point:  # unlike the square root of a sum it has a gradient at zero
        norm: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=keepdim)
        return norm
    return _sum_square(x.double(), dims, keepdim).sqrt().to(x.dtype)


def _sum_square(x: Tensor, dims: Dims, keepdim: bool) -> Tensor:
    return _sum(x * x, dims, keepdim)


def _log_sum(x: Tensor, dims: Dims, keepdim: bool) -> Tensor:
    total = _sum(x, dims, keepdim)
    if x.dtype.is_floating_point:
        return total.log()
    return total.double().log().to(x.dtype)


def _log_sum_exp(x: Tensor, dims: Dims, keepdim: bool) -> Tensor:
    if x.dtype.is_floating_point:
        return torch.logsumexp(x, dims, keepdim)
    # Of integers onnxruntime takes exp(x - largest) as an integer: 1 for the largest, else 0.
    largest = _max(x, dims, True)
    count = (x == largest).sum(dims, keepdim=True)
    y = (largest + count.double().log()).to(x.dtype)
    return y if keepdim else y.squeeze(dims)


def _register(
    op_type: str, reduction: Reduction, attribute: Sequence[int], input: Sequence[int]
) -> None:
    """Register ``reduction`` with the axes as attribute and as input."""

    @op(op_type, since=attribute)
    def reduce_attribute(
        data: Tensor, *, axes: Sequence[int] | None = None, keepdims: int = 1
    ) -> Tensor:
        return reduction(data, tuple(axes or range(data.ndim)), bool(keepdims))

    @op(op_type, since=input, host=(1,))
    def reduce_input(
        data: Tensor,
        axes: Sequence[int] | None = None,
        *,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Tensor:
        if not axes and noop_with_empty_axes:
            return reduction(data.unsqueeze(0), (0,), False)  # each element is a set of its own
        return reduction(data, tuple(axes or range(data.ndim)), bool(keepdims))


_register("ReduceSum", _sum, (1, 11), (13,))
_register("ReduceMean", _mean, (1, 11, 13), (18,))
_register("ReduceMax", _max, (1, 11, 12, 13), (18, 20))
_register("ReduceMin", _min, (1, 11, 12, 13), (18, 20))
_register("ReduceProd", _prod, (1, 11, 13), (18,))
_register("ReduceL1", _l1, (1, 11, 13), (18,))
_register("ReduceL2", _l2, (1, 11, 13), (18,))
_register("ReduceSumSquare", _sum_square, (1, 11, 13), (18,))
_register("ReduceLogSum", _log_sum, (1, 11, 13), (18, 28))
_register("ReduceLogSumExp", _log_sum_exp, (1, 11, 13), (18, 28))


def _extreme_index(
    find: Callable[..., Tensor], data: Tensor, axis: int, keepdims: int, last: int
) -> Tensor:
    """Return the first, or the last, index at which ``find`` finds its extreme."""
    if not last:
        return find(data, axis, keepdim=bool(keepdims))
    return data.shape[axis] - 1 - find(data.flip(axis), axis, keepdim=bool(keepdims))


@op("ArgMax", since=(1, 11, 12, 13))
def argmax(data: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Return where along ``axis`` the largest value is."""
    return _extreme_index(torch.argmax, data, axis, keepdims, select_last_index)


@op("ArgMin", since=(1, 11, 12, 13))
def argmin(data: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Return where along ``axis`` the smallest value is."""
    return _extreme_index(torch.argmin, data, axis, keepdims, select_last_index)
