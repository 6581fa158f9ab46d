"""The types of codes: numpy's names for them, and the ranges that onnxruntime's tool gives them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from qwrap.ort.errors import QuantizationError

Array = NDArray[Any]
Range = tuple[Array, Array]

FLOAT8_TYPES = (
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E4M3FNUZ,
    TensorProto.FLOAT8E5M2,
    TensorProto.FLOAT8E5M2FNUZ,
)

ONNX_TYPE_TO_NP_TYPE: dict[int, Any] = {
    TensorProto.INT8: np.dtype("int8"),
    TensorProto.UINT8: np.dtype("uint8"),
    TensorProto.INT16: np.dtype("int16"),
    TensorProto.UINT16: np.dtype("uint16"),
    TensorProto.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
    TensorProto.INT4: ml_dtypes.int4,
    TensorProto.UINT4: ml_dtypes.uint4,
}


def _ends(onnx_type: int, low: int, high: int) -> Range:
    dtype = ONNX_TYPE_TO_NP_TYPE[onnx_type]
    return np.array(low, dtype), np.array(high, dtype)


ONNX_INT_TYPE_RANGE: dict[int, Range] = {
    TensorProto.UINT8: _ends(TensorProto.UINT8, 0, 255),
    TensorProto.INT8: _ends(TensorProto.INT8, -128, 127),
    TensorProto.UINT16: _ends(TensorProto.UINT16, 0, 65535),
    TensorProto.INT16: _ends(TensorProto.INT16, -32768, 32767),
    TensorProto.UINT4: _ends(TensorProto.UINT4, 0, 15),
    TensorProto.INT4: _ends(TensorProto.INT4, -8, 7),
}
"""All codes of a type."""

ONNX_INT_TYPE_SYMMETRIC_RANGE: dict[int, Range] = {
    TensorProto.INT8: _ends(TensorProto.INT8, -127, 127),
    TensorProto.INT16: _ends(TensorProto.INT16, -32767, 32767),
}
"""Types that leave out a code where the range is symmetric, so that 0 is the middle one."""

ONNX_INT_TYPE_REDUCED_RANGE: dict[int, Range] = {
    TensorProto.UINT8: _ends(TensorProto.UINT8, 0, 127),
    TensorProto.INT8: _ends(TensorProto.INT8, -64, 64),
    TensorProto.UINT16: _ends(TensorProto.UINT16, 0, 32767),
    TensorProto.INT16: _ends(TensorProto.INT16, -16384, 16384),
    TensorProto.UINT4: _ends(TensorProto.UINT4, 0, 7),
    TensorProto.INT4: _ends(TensorProto.INT4, -4, 3),
}
"""Half of the codes: sums of two products of 7 and 8 bits fit the 16 bits of older processors."""

type_to_name: dict[int, str] = {
    value: name for name in dir(TensorProto) if isinstance(value := getattr(TensorProto, name), int)
}
"""Number of a ``TensorProto`` member -> its name, as in onnxruntime's tool."""


def data_type_name(data_type: int) -> str:
    """Return the name of a ``TensorProto.DataType``, for messages."""
    names: dict[int, str] = {number: name for name, number in TensorProto.DataType.items()}
    return names.get(data_type, str(data_type))


def get_qmin_qmax_for_qType(
    qType: int, reduce_range: bool = False, symmetric: bool = False
) -> Range:
    """Return the smallest and the largest code of a type, as 0-d arrays of that type.

    Args:
        qType: ``TensorProto.DataType`` of the codes.
        reduce_range: only half of the codes; it goes before ``symmetric``.
        symmetric: leave out the code of int8 and int16 that has no opposite.

    Raises:
        NotImplementedError: float 8, whose scale is not made from a range.
        QuantizationError: no type of codes (a ``ValueError``).
    """
    if qType == TensorProto.FLOAT8E4M3FN:
        raise NotImplementedError("This function is not implemented for float 8 as not needed.")
    if reduce_range:
        found = ONNX_INT_TYPE_REDUCED_RANGE.get(qType)
    elif symmetric and qType in ONNX_INT_TYPE_SYMMETRIC_RANGE:
        found = ONNX_INT_TYPE_SYMMETRIC_RANGE[qType]
    else:
        found = ONNX_INT_TYPE_RANGE.get(qType)
    if found is None:
        names = ", ".join(data_type_name(known) for known in ONNX_INT_TYPE_RANGE)
        raise QuantizationError(
            f"Unexpected data type {qType} requested. Only {names} are supported."
        )
    return found


def get_qrange_for_qType(qType: int, reduce_range: bool = False, symmetric: bool = False) -> Any:
    """Return how many steps lie between the smallest and the largest code, as a wide integer."""
    qmin, qmax = get_qmin_qmax_for_qType(qType, reduce_range, symmetric=symmetric)
    return np.int32(int(qmax) - int(qmin))  # 255 and 65535 do not fit int8 and int16


def normalize_axis(axis: int, rank: int) -> tuple[bool, int]:
    """Return whether a tensor of that rank has ``axis``, and it counted from the front."""
    positive = axis + rank if axis < 0 else axis
    return 0 <= positive < rank, positive
