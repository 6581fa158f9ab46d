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
})
"""``onnx.TensorProto`` data type to torch type, where casting in torch is casting in ONNX."""


def torch_dtype(data_type: int) -> torch.dtype:
    """Return the torch type of an ``onnx.TensorProto`` data type.

    Raises:
        UnsupportedOpError: torch has none that converts as ONNX demands (strings, 8-bit floats
            and below).
    """
    if data_type not in TORCH_DTYPES:
        name = TensorProto.DataType.Name(data_type)
        raise UnsupportedOpError(f"no tensor of element type {name} can be made in torch")
    return TORCH_DTYPES[data_type]
