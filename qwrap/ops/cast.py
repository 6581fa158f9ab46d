"""Conversions between element types.

Out of range, float to integer is undefined in ONNX. On x86 torch and onnxruntime then give the
same codes: both let the processor convert to a wider integer and cut that off.
"""

from __future__ import annotations

from onnx import TensorProto
from torch import Tensor

from qwrap.ops.element_types import torch_dtype
from qwrap.ops.registry import op

FLOAT8_ONLY = ("saturate", "round_mode")


@op("Cast", since=(6, 9, 13, 19, 21, 23, 24, 25, 28), ignored=FLOAT8_ONLY)
def cast(input: Tensor, *, to: int) -> Tensor:
    """Convert to the ``onnx.TensorProto`` data type ``to``."""
    return input.to(torch_dtype(to))


@op("Cast", since=(1,))
def cast_to_name(input: Tensor, *, to: str) -> Tensor:
    """Convert to the ``onnx.TensorProto`` data type named ``to``."""
    return input.to(torch_dtype(TensorProto.DataType.Value(to)))


@op("CastLike", since=(15, 19, 21, 23, 24, 25), ignored=FLOAT8_ONLY)
def cast_like(input: Tensor, target_type: Tensor) -> Tensor:
    """Convert to the element type of ``target_type``."""
    return input.to(target_type.dtype)
