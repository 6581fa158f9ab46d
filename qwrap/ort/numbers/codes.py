"""Codes of arrays: rounded, clamped, and packed where two share a byte."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from onnx import TensorProto

from qwrap.ort.errors import InvalidModelError, QuantizationError
from qwrap.ort.numbers.code_types import (
    FLOAT8_TYPES,
    ONNX_INT_TYPE_RANGE,
    ONNX_TYPE_TO_NP_TYPE,
    Array,
    get_qmin_qmax_for_qType,
)
from qwrap.ort.numbers.scales import compute_data_quant_params

_FLOAT8_MAX = 448.0  # of e4m3fn


def quantize_nparray(
    qType: int, arr: Array, scale: Any, zero_point: Any, low: Any = None, high: Any = None
) -> Array:
    """Return ``clamp(round_half_to_even(arr / scale) + zero_point)``, in the type of the codes.

    The range is that of the type, not a reduced one; float 8 saturates.

    Args:
        qType: ``TensorProto.DataType`` of the codes.
        arr: floats of any shape.
        scale: one, or an array that broadcasts.
        zero_point: one, or an array that broadcasts; 0 for float 8.
        low: smallest code, if above that of the type.
        high: largest code, if below that of the type.

    Raises:
        QuantizationError: no type of codes, or ``arr`` holds NaN (a ``ValueError``).
        NotImplementedError: float 8 with a zero point.

    Source: ONNX QuantizeLinear-21.
    """
    if qType not in ONNX_TYPE_TO_NP_TYPE:
        raise QuantizationError(
            f"Unexpected data type {qType} requested. Only INT8, UINT8, INT16, UINT16, INT4, UINT4 "
            "and FLOAT8E4M3FN are supported."
        )
    if qType in FLOAT8_TYPES:
        return _float8_codes(np.asarray(arr), scale, zero_point)
    qmin, qmax = (int(code) for code in get_qmin_qmax_for_qType(qType))
    least = qmin if low is None else max(qmin, low)
    most = qmax if high is None else min(qmax, high)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.asarray(np.asarray(arr, np.float32) / scale)
    np.rint(steps, out=steps)
    zero = np.asarray(zero_point).astype(np.float32)  # which holds all of 16 bits
    fits = np.broadcast_shapes(zero.shape, steps.shape) == steps.shape
    codes = np.asarray(np.add(steps, zero, out=steps if fits else None))
    np.clip(codes, least, most, out=codes)
    if np.isnan(codes.sum()):  # clamped, so nothing else makes it NaN
        raise QuantizationError("an array holds NaN, or a scale is 0, and cannot be quantized")
    return np.asarray(codes.astype(ONNX_TYPE_TO_NP_TYPE[qType]))


def _float8_codes(arr: Array, scale: Any, zero_point: Any) -> Array:
    if np.asarray(zero_point).astype(np.float32).any():
        raise NotImplementedError(
            f"zero_point is expected to be null for float 8 not {zero_point!r}."
        )
    if arr.dtype not in (np.float32, np.float16):
        raise QuantizationError(f"Unexpected dtype {arr.dtype}; give float32 or float16.")
    steps = np.asarray(arr / scale)
    return np.asarray(steps.clip(-_FLOAT8_MAX, _FLOAT8_MAX).astype(ml_dtypes.float8_e4m3fn))


def quantize_data(
    data: Array,
    qType: int,
    symmetric: bool,
    reduce_range: bool = False,
    min_real_range: float | None = None,
    rmin_override: float | None = None,
    rmax_override: float | None = None,
) -> tuple[Array, Array, Array]:
    """Return zero point, scale and codes of all of ``data``: ``scale * (code - zero_point)``.

    Args and errors are those of ``compute_data_quant_params``.

    Raises:
        InvalidModelError: a code of float 8 is NaN (a ``RuntimeError``).
    """
    if qType not in ONNX_INT_TYPE_RANGE and qType != TensorProto.FLOAT8E4M3FN:
        raise QuantizationError(f"Unexpected value for qType={qType}.")
    zero_point, scale = compute_data_quant_params(
        data, qType, symmetric, reduce_range, min_real_range, rmin_override, rmax_override
    )
    codes = quantize_nparray(qType, data, scale, zero_point)
    if qType == TensorProto.FLOAT8E4M3FN:
        refuse_nan(codes, data)
    return zero_point, scale, codes


def refuse_nan(codes: Array, data: Array) -> None:
    """Check codes of float 8.

    Raises:
        InvalidModelError: one is NaN (a ``RuntimeError``).
    """
    if np.isnan(codes).any():
        raise InvalidModelError(
            f"One of the quantized value is NaN data in [{np.min(data)}, {np.max(data)}]; "
            "look for NaN in the data"
        )


def pack_bytes_to_4bit(src_8bit: Any) -> bytearray:
    """Return codes of one byte each as two to a byte, the first in the lower half.

    Args:
        src_8bit: bytes, or an array of one byte for each code; the upper halves are dropped.

    Source: ONNX TensorProto, types INT4 and UINT4.
    """
    if isinstance(src_8bit, np.ndarray):
        codes = np.ascontiguousarray(src_8bit).reshape(-1).view(np.uint8)
    else:
        codes = np.frombuffer(src_8bit, np.uint8)
    packed = codes[::2] & 0xF
    packed[: codes.size // 2] |= codes[1::2] << 4  # a shift of uint8 drops what leaves the byte
    return bytearray(packed.tobytes())
