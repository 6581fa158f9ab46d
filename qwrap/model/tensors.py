"""Values as they travel through a wrapped model, and as arrays outside of it.

A tensor is a ``torch.Tensor``, of text a numpy array of objects; a sequence is a list; an empty
optional is None. Integers of 4 and 2 bits travel as int8 or uint8, floats of 4 and 6 bits as the
float32 numbers that they stand for.
"""

from __future__ import annotations

import bisect
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.errors import ModelError
from qwrap.graph.external import DataFile, FileTensor
from qwrap.graph.index import ValueType
from qwrap.ops.element_types import TORCH_DTYPES

Array = np.ndarray[Any, np.dtype[Any]]

WIDENED = frozenset((
    *(ir.DataType.INT4, ir.DataType.INT2, ir.DataType.UINT4, ir.DataType.UINT2),
    *(ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT6E2M3, ir.DataType.FLOAT6E3M2),
))
"""Element types that travel in a wider one."""

NUMPY_NAMES = {
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e4m3fnuz: ml_dtypes.float8_e4m3fnuz,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
    torch.float8_e5m2fnuz: ml_dtypes.float8_e5m2fnuz,
    torch.float8_e8m0fnu: ml_dtypes.float8_e8m0fnu,
}
"""Types that torch and ml_dtypes have but numpy itself lacks."""


def to_torch(tensor: ir.TensorProtocol) -> Any:
    """Return a copy of an ONNX tensor as it travels.

    Raises:
        ModelError: torch has no such element type, or the data cannot be read.
    """
    try:
        array = tensor.numpy()
        # What is decoded from a message is a new array each time; only raw bytes cannot be written.
        is_new = isinstance(tensor, ir.TensorProtoTensor) and array.flags.writeable
        array = array if is_new else np.array(array)
    except (ValueError, OSError, TypeError) as error:
        raise ModelError(f"tensor {tensor.name!r}: its data cannot be read: {error}") from error
    return from_numpy(array, tensor.dtype, tensor.name)


class WeightReader:
    """Makes the tensors of one module; those in files are mapped privately, page by page when used.

    Training such a tensor in place changes neither the file nor what another reader makes of it.
    What cannot be mapped so is copied: other byte orders, offsets that no element may have,
    elements of less than a byte, and what overlaps a tensor that was mapped before.
    """

    def __init__(self) -> None:
        self._files: dict[DataFile, Array] = {}
        self._used: dict[DataFile, list[tuple[int, int]]] = {}

    def read(self, tensor: ir.TensorProtocol) -> Any:
        """Return ``tensor`` as it travels, free to be changed.

        Raises:
            ModelError: see ``to_torch``.
        """
        if not isinstance(tensor, FileTensor) or not tensor.is_plain or not self._claim(tensor):
            return to_torch(tensor)
        file, start = tensor.file, tensor.start
        if file not in self._files:
            self._files[file] = file.private_copy()
        raw = self._files[file][start : start + tensor.nbytes]
        array = raw.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy())
        return from_numpy(array, tensor.dtype, tensor.name)

    def _claim(self, tensor: FileTensor) -> bool:
        """Mark the place of ``tensor`` as used; False if part of it was used before."""
        used = self._used.setdefault(tensor.file, [])
        start, stop = tensor.start, tensor.start + tensor.nbytes
        i = bisect.bisect(used, (start, stop))
        if (i and used[i - 1][1] > start) or (i < len(used) and used[i][0] < stop):
            return False
        used.insert(i, (start, stop))
        return True


def from_numpy(array: Array, dtype: ir.DataType, name: str | None) -> Any:
    """Return an array of ONNX type ``dtype`` as it travels; memory is shared where it can be.

    Raises:
        ModelError: torch has no such element type; the message says ``name``.
    """
    if dtype == ir.DataType.STRING:
        return np.vectorize(_text, otypes=[object])(array) if array.size else array.astype(object)
    carrier = TORCH_DTYPES.get(dtype)
    if carrier is None:
        raise ModelError(f"tensor {name!r}: element type {dtype} is not supported")
    if dtype in WIDENED:
        as_numpy = {torch.int8: np.int8, torch.uint8: np.uint8, torch.float32: np.float32}
        return torch.from_numpy(array.astype(as_numpy[carrier]))
    if carrier in NUMPY_NAMES:
        raw = np.int16 if array.dtype.itemsize == 2 else np.uint8
        return torch.from_numpy(np.ascontiguousarray(array).view(raw).reshape(array.shape)).view(
            carrier
        )
    return torch.from_numpy(array)


def _text(item: Any) -> str:
    return item.decode() if isinstance(item, bytes) else str(item)


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` in another float type in which what is finite stays finite.

    Exporters write masks as ``(1 - mask) * smallest float32``; with that as infinity in a narrower
    type, what is not masked would be ``0 * inf``.
    """
    result = tensor.to(dtype)
    limit = torch.finfo(dtype).max
    overflown = result.isinf() & ~tensor.isinf()
    return torch.where(overflown, result.clamp(-limit, limit), result)


def to_numpy(tensor: Tensor) -> Array:
    """Return a tensor as an array, in ml_dtypes where numpy has no such type."""
    tensor = tensor.detach().cpu()
    if tensor.dtype in NUMPY_NAMES:
        raw = tensor.contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.uint8)
        return raw.numpy().view(NUMPY_NAMES[tensor.dtype])
    array: Array = tensor.numpy()
    return array


def to_value(value: Any, declared: ValueType, device: torch.device) -> Any:
    """Return an array, list or None from outside as it travels."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return [to_value(item, declared, device) for item in value]
    dtype = declared.dtype
    array = np.asarray(value)
    if not array.flags.writeable:  # torch would share the memory and warns of that
        array = array.copy()
    if dtype is None:
        dtype = ir.DataType.from_numpy(array.dtype)
    result = from_numpy(array, dtype, None)
    return result.to(device) if isinstance(result, Tensor) else result


def to_array(value: Any, declared: ValueType) -> Any:
    """Return what travels as the array, list or None that it means outside."""
    if isinstance(value, (list, tuple)):
        return [to_array(item, declared) for item in value]
    if not isinstance(value, Tensor):
        return value
    array = to_numpy(value)
    return array.astype(declared.dtype.numpy()) if declared.dtype in WIDENED else array
