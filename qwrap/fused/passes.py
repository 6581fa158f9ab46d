"""The passes that learned scales are made of, each in the quickest form there is for its tensor."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from qwrap.fused import chunked, plain
from qwrap.fused.compiling import is_traced, is_worthwhile, run
from qwrap.fused.plain import Gradients, Needs


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
        gradient, kept = _canonical(gradient), _canonical(kept)
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
        gradient, x = _canonical(gradient), _canonical(x)
        inputs = (gradient, x, scale, zero_point, _cached_ends(qmin, qmax, x.device))
        result = run(plain.backward_recomputed, (x.dtype, _kind(gradient)), *inputs, needs=needs)
        if result is not None:
            return _shaped(result, shape)
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


def _kind(x: Tensor) -> tuple[object, ...]:
    """Return what a compiled pass is specialised to."""
    outer, channels, inner = x.shape
    return x.dtype, x.device.type, outer == 1, channels == 1, inner == 1


def _shaped(result: Gradients, shape: torch.Size) -> Gradients:
    return result if result.x is None else result._replace(x=result.x.view(shape))
