"""Matrices of 4-bit numbers, two to a byte."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from qwrap.nbits.packing import pack, unpack


def transpose_packed_int4_matrix(packed: NDArray[Any], rows: int, cols: int) -> NDArray[Any]:
    """Return the packed transpose, flat, of a packed matrix ``[rows, cols]``."""
    codes = unpack(packed.reshape(-1), 4, rows * cols).reshape(rows, cols)
    return pack(codes.T.reshape(-1), 4)


def is_divisible(val1: int, val2: int) -> bool:
    """Whether ``val1`` is a multiple of ``val2``."""
    return val1 % val2 == 0
