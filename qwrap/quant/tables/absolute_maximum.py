"""The one number that TensorRT's tables hold of a tensor: its largest absolute value.

TensorRT's int8 codes are symmetric from -127 to 127, and their scale is the maximum over 127. A
range that is not symmetric loses its nearer end. Where the table holds an int8 scale without zero
point, that scale decides, so that TensorRT computes with it and no other.
"""

from __future__ import annotations

import numpy as np

from qwrap.config import QuantSpec
from qwrap.dtypes import INT8
from qwrap.errors import TableError
from qwrap.quant.tables.grid import encoded
from qwrap.quant.tables.tensor_range import TensorRange

CODES = QuantSpec(dtype=INT8, narrow_range=True)
"""How TensorRT quantizes an activation."""


def scale_of(entry: TensorRange) -> float:
    """Return the scale that TensorRT is to use, a float32; 0 for a tensor that is always 0."""
    if entry.scale is not None and entry.dtype == INT8 and entry.symmetric:
        return float(entry.scale.reshape(()))
    largest = maximum_of(entry)
    symmetric = TensorRange(-largest, largest)
    return float(symmetric.qparams(CODES).scale) if largest else 0.0


def maximum_of(entry: TensorRange) -> float:
    """Return the largest absolute value, a float32."""
    if entry.scale is not None and entry.dtype == INT8 and entry.symmetric:
        return float(from_scale(float(entry.scale.reshape(()))).high)
    return float(max(np.abs(entry.low).max(), np.abs(entry.high).max()))


def from_maximum(value: float) -> TensorRange:
    """Return the range up to an absolute maximum.

    Raises:
        TableError: it is negative or not finite.
    """
    if value < 0:
        raise TableError(f"absolute maximum {value:g}: expected 0 or more")
    return TensorRange(-value, value)


def from_scale(scale: float) -> TensorRange:
    """Return the range of TensorRT's codes at ``scale``.

    Raises:
        TableError: it is negative or not finite.
    """
    if scale == 0:
        return from_maximum(0.0)
    return encoded(np.array(scale), np.array(0.0), CODES)
