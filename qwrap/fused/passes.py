"""The passes that learned scales are made of, each in the quickest form there is for its tensor."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from qwrap.fused import chunked, plain
from qwrap.fused.compiling import is_traced, is_worthwhile, run
from qwrap.fused.plain import Gradients, Needs

BAND = 64
"""Rows of a matrix that are summed up at a time."""


def forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: float, qmax: float, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Return ``x`` fake-quantized, and what its backward needs.

    The value is that of ``numerics.fake_quantize`` bit for bit: a float32 division, rounded half to
    even. Inside is decided on the rounded code, as for fixed scales: half a step beyond ``qmin``
    and ``qmax`` is inside, so that no element is called clamped that was only rounded.

    Args:
        x: floats ``[outer, C, inner]`` with any strides; ``[1, 1, N]`` for one scale.
        scale: float32 ``[C]``.
        zero_point: int32 ``[C]``.
        qmin: smallest code.
        qmax: largest code.
        keep: whether to keep one int8 per element: -128 where the code was clamped to ``qmin``, 127
            where to ``qmax``, -127 where ``x`` is NaN, else the residual in 1/252 of a step.

    Returns:
        Values of the dtype and shape of ``x``; int8 of its shape, None without ``keep``.
    """
    if is_traced(x):
        return plain.forward(x, scale, zero_point, _ends(qmin, qmax, x.device), keep=keep)
    shape, x, scale = x.shape, x.detach(), scale.detach()
    if is_worthwhile(x):
        x = _canonical(x)
        ends = _cached_ends(qmin, qmax, x.device)
        results = run(plain.forward, _kind(x), x, scale, zero_point, ends, keep=keep)
        if results is not None:
            values, kept = results
            return values.view(shape), kept.view(shape) if keep else None
        x = x.view(shape)
    if x.device.type == "cpu":
        return chunked.forward(x, scale, zero_point, qmin, qmax, keep=keep)
    return plain.forward(x, scale, zero_point, _cached_ends(qmin, qmax, x.device), keep=keep)


def backward_kept(gradient: Tensor, kept: Tensor, *, needs: Needs) -> Gradients:
    """Return the gradients from what ``forward`` kept; the residual is right to 1/504 of a step.

    Args:
        gradient: floats ``[outer, C, inner]``, of the fake-quantized values.
        kept: int8 of that shape.
        needs: which gradients are wanted.
    """
    if is_traced(gradient):
        return plain.backward_kept(gradient, kept, needs=needs)
    shape, gradient = gradient.shape, gradient.detach()
    if is_worthwhile(gradient):
        gradient, kept = _in_bands(_canonical(gradient)), _in_bands(_canonical(kept))
        result = run(plain.backward_kept, _kind(gradient), gradient, kept, needs=needs)
        if result is not None:
            return _shaped(result, shape)
        gradient, kept = gradient.view(shape), kept.view(shape)
    if gradient.device.type == "cpu":
        return chunked.backward_kept(gradient, kept, needs=needs)
    return plain.backward_kept(gradient, kept, needs=needs)


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
    """Return the gradients with the exact residual; for an ``x`` that lives on anyway.

    Args:
        gradient: floats ``[outer, C, inner]``, of the fake-quantized values.
        x: what was quantized, of that shape.
        scale: float32 ``[C]``.
        zero_point: int32 ``[C]``.
        qmin: smallest code.
        qmax: largest code.
        needs: which gradients are wanted.
    """
    if is_traced(x):
        ends = _ends(qmin, qmax, x.device)
        return plain.backward_recomputed(gradient, x, scale, zero_point, ends, needs=needs)
    shape, gradient, x, scale = x.shape, gradient.detach(), x.detach(), scale.detach()
    if is_worthwhile(x):
        gradient, x = _in_bands(_canonical(gradient)), _in_bands(_canonical(x))
        inputs = (gradient, x, scale, zero_point, _cached_ends(qmin, qmax, x.device))
        results = [
            run(plain.backward_recomputed, (x.dtype, _kind(gradient)), *inputs, needs=part)
            for part in (_split(needs) if shape[1] > 1 and shape[2] == 1 else [needs])
        ]
        if None not in results:
            return _shaped(_joined(results), shape)
        gradient, x = gradient.view(shape), x.view(shape)
    if x.device.type == "cpu":
        return chunked.backward_recomputed(gradient, x, scale, zero_point, qmin, qmax, needs=needs)
    ends = _cached_ends(qmin, qmax, x.device)
    return plain.backward_recomputed(gradient, x, scale, zero_point, ends, needs=needs)


def _ends(qmin: float, qmax: float, device: torch.device) -> Tensor:
    return torch.tensor([qmin, qmax], dtype=torch.float32, device=device)


@lru_cache(maxsize=256)
def _cached_ends(qmin: float, qmax: float, device: torch.device) -> Tensor:
    """Return both ends as a tensor, as a kernel would be compiled anew for the number 0 or 1."""
    with torch.inference_mode(mode=False):
        return _ends(qmin, qmax, device)


def _canonical(x: Tensor) -> Tensor:
    """Return ``x`` contiguous, and flat where it has one scale."""
    return x.reshape(1, 1, -1) if x.shape[1] == 1 else x.contiguous()


def _in_bands(x: Tensor) -> Tensor:
    """Return a matrix with a scale for each column as bands of rows, ``[bands, rows, C, 1]``.

    A compiled sum walks down one group of columns after the other, and a matrix has too many rows
    for that: each is on another page. In bands the pages of one are at hand, and the sums of bands
    can be added pairwise.
    """
    outer, channels, inner = x.shape
    rows = math.gcd(outer, BAND)
    if inner > 1 or rows < BAND // 8 or rows == outer:
        return x
    return x.view(outer // rows, rows, channels, 1)


def _split(needs: Needs) -> list[Needs]:
    """Return needs one by one: as sums of columns do not fuse with what goes row by row."""
    return [Needs(x=True, sums=False), Needs(x=False, sums=True)] if all(needs) else [needs]


def _joined(results: list[Gradients]) -> Gradients:
    """Return the gradients that were found one by one."""
    return Gradients(results[0].x, *results[-1][1:])


def _kind(x: Tensor) -> tuple[object, ...]:
    """Return what a compiled pass is specialised to."""
    return x.dtype, x.device.type, *(size == 1 for size in x.shape)


def _shaped(result: Gradients, shape: torch.Size) -> Gradients:
    """Return gradients of a tensor of ``shape``, sums over all its bands."""
    x = None if result.x is None else result.x.view(shape)
    sums = [s if s is None or s.dim() == 1 else s.sum(0) for s in result[1:]]
    return Gradients(x, *sums)
