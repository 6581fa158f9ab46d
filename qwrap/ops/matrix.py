"""Operators on matrices and the Einstein summation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwrap.ops.element_types import torch_dtype
from qwrap.ops.registry import op


@op("Det", since=(11, 22))
def det(x: Tensor) -> Tensor:
    """Return the determinant of the two inner axes."""
    wide = x.float() if x.itemsize < 4 else x  # torch factorises no half precision
    result: Tensor = torch.linalg.det(wide)
    return result.to(x.dtype)


@op("Einsum", since=(12, 28))
def einsum(*inputs: Tensor, equation: str) -> Tensor:
    """Multiply and sum over the subscripts of ``equation``, as in ``numpy.einsum``."""
    return torch.einsum(equation, *inputs)


@op("Trilu", since=(14,), host=(1,))
def trilu(input: Tensor, k: int | Sequence[int] | None = None, *, upper: int = 1) -> Tensor:
    """Keep the triangle on and above (or below) the ``k``-th diagonal of the two inner axes."""
    (diagonal,) = k if isinstance(k, Sequence) else (k or 0,)
    return torch.triu(input, diagonal) if upper else torch.tril(input, diagonal)


@op("EyeLike", since=(9, 22))
def eye_like(input: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    """Return a matrix of the shape of ``input`` with ones on the ``k``-th diagonal."""
    rows, columns = (torch.arange(n, device=input.device) for n in input.shape)
    ones = columns - rows.unsqueeze(1) == k
    return ones.to(input.dtype if dtype is None else torch_dtype(dtype))
