"""The torch type of each ONNX element type."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from onnx import TensorProto

from qwrap.errors import UnsupportedOpError

TORCH_DTYPES: Mapping[int, torch.dtype] = MappingProxyType({
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.BOOL: torch.bool,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
    TensorProto.COMPLEX64: torch.complex64,
    TensorProto.COMPLEX128: torch.complex128,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    TensorProto.FLOAT8E5M2: torch.float8_e5m2,
    TensorProto.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    TensorProto.FLOAT8E8M0: torch.float8_e8m0fnu,
    TensorProto.INT4: torch.int8,
    TensorProto.INT2: torch.int8,
    TensorProto.UINT4: torch.uint8,
    TensorProto.UINT2: torch.uint8,
    TensorProto.FLOAT4E2M1: torch.float32,
    TensorProto.FLOAT6E2M3: torch.float32,
    TensorProto.FLOAT6E3M2: torch.float32,
})
"""``onnx.TensorProto`` data type to the torch type that carries it.

Integers of 4 and 2 bits travel in 8, floats of 4 and 6 bits as the float32 numbers they stand for.
"""

DATA_TYPES: Mapping[torch.dtype, int] = MappingProxyType({
    dtype: data_type for data_type, dtype in reversed([*TORCH_DTYPES.items()])
})
"""The torch type to the ``onnx.TensorProto`` data type that travels as itself in it."""


def torch_dtype(data_type: int) -> torch.dtype:
    """Return the torch type that carries an ``onnx.TensorProto`` data type.

    Raises:
        UnsupportedOpError: no torch type does (text, or a number that names no type).
    """
    if data_type not in TORCH_DTYPES:
        raise UnsupportedOpError(f"no tensor of element type {data_type} can be made in torch")
    return TORCH_DTYPES[data_type]
