"""ONNX tensors as torch tensors."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.errors import ModelError

TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
}
BITS = {1: torch.uint8, 2: torch.int16}  # item size -> type that carries what numpy does not know


def to_torch(tensor: ir.TensorProtocol) -> Tensor:
    """Return a copy of an ONNX tensor. Integers of 4 and 2 bits become int8 or uint8.

    Raises:
        ModelError: torch has no such element type, or the data cannot be read.
    """
    try:
        array = np.array(tensor.numpy())
    except (ValueError, OSError, TypeError) as error:
        raise ModelError(f"tensor {tensor.name!r}: its data cannot be read: {error}") from error
    if tensor.dtype in (ir.DataType.INT4, ir.DataType.INT2):
        return torch.from_numpy(array.astype(np.int8))
    if tensor.dtype in (ir.DataType.UINT4, ir.DataType.UINT2):
        return torch.from_numpy(array.astype(np.uint8))
    dtype = TORCH_DTYPES.get(tensor.dtype)
    if dtype is None:
        raise ModelError(f"tensor {tensor.name!r}: element type {tensor.dtype} is not supported")
    if array.dtype.kind == "V" or array.dtype.name.startswith(("bfloat", "float8")):
        carrier = BITS[array.dtype.itemsize]
        raw = array.view(np.uint8 if carrier is torch.uint8 else np.int16)
        return torch.from_numpy(raw).view(dtype)
    return torch.from_numpy(array)
