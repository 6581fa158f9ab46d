"""The current parameters of a module, back in an ONNX graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.graph.external import FileTensor, written_to
from qwrap.graph.index import OnnxGraph, ValueType
from qwrap.model.shards import check_unsharded
from qwrap.model.tensors import WIDENED, converted, to_array, to_torch
from qwrap.model.wrapped import WrappedModel
from qwrap.ops.element_types import TORCH_DTYPES

Array = npt.NDArray[Any]


def materialize(model: WrappedModel, *, lasting: bool = False) -> ir.Model:
    """Return a copy of the model's graph that holds its current parameters and buffers.

    Tensors that did not change stay the same objects, so that those outside the file stay there.

    Args:
        model: what is written back.
        lasting: whether changed tensors are copies, which training does not change any more;
            else they share the memory of the module where they can.

    Raises:
        ModelError: the parameters are sharded.
    """
    copy = model.graph.model.clone()
    changed = changed_tensors(model)
    if changed:
        graph = OnnxGraph(copy)
        for key, replacement in changed.items():
            set_stored(graph.values[key], _copied(replacement) if lasting else replacement)
    return copy


def _copied(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)


def changed_tensors(model: WrappedModel) -> dict[str, ir.TensorProtocol]:
    """Return the parameters and buffers that differ from the graph's tensors, by value key.

    They share the memory of the module where they can; those of another float type than the graph
    declares (``load(dtype=…)``, ``model.half()``) are converted if they were changed. What was
    mapped from a file and never written to is not read.

    Raises:
        ModelError: the parameters are sharded.
    """
    check_unsharded(model)
    changed: dict[str, ir.TensorProtocol] = {}
    for key in model.layout.slots:
        tensor, original = model.deployed(key), model.layout.values.stored[key]
        assert tensor is not None
        if is_untouched(tensor, original):
            continue
        dtype = TORCH_DTYPES.get(original.dtype, tensor.dtype)
        if tensor.is_floating_point() and tensor.dtype != dtype:
            if torch.equal(converted(to_torch(original), tensor.dtype), tensor.cpu()):
                continue  # what the file says, as precisely as the module can hold it
            tensor = tensor.to(dtype)
        array = to_array(tensor, ValueType(original.dtype))
        if not _is_equal(array, original):
            changed[key] = ir.tensor(array, dtype=original.dtype, name=original.name)
    return changed


def is_untouched(tensor: Tensor, original: ir.TensorProtocol) -> bool:
    """Whether ``tensor`` is known to be what ``WeightReader`` mapped from the file of ``original``.

    The system tells which pages were written to. ``Tensor._version`` would not do, for it does not
    count what is written through ``.data``.
    """
    if not isinstance(original, FileTensor) or tensor.device.type != "cpu":
        return False
    is_whole = tensor.is_contiguous() and tuple(tensor.shape) == original.shape.numpy()
    if not is_whole or tensor.dtype != TORCH_DTYPES.get(original.dtype):
        return False
    address = tensor.data_ptr()
    return original.file.is_private_copy(address, original.start) and not written_to(
        address, original.nbytes
    )


def _is_equal(array: Array, original: ir.TensorProtocol) -> bool:
    """Compare bit by bit, for the file is to hold exactly what the module does."""
    if array.shape != original.shape.numpy():
        return False
    if original.dtype in WIDENED or array.dtype.hasobject:
        return bool(np.array_equal(array, original.numpy()))
    if not isinstance(original, FileTensor):
        return bool(np.array_equal(_bits(array), _bits(original.numpy())))
    start, mine = 0, _bits(array)
    for block in original.file.blocks(original.start, original.nbytes):
        if not np.array_equal(mine[start : start + len(block)], np.frombuffer(block, np.uint8)):
            return False
        start += len(block)
    return True


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def set_stored(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Replace the tensor of an initialiser or Constant node, in place."""
    node = value.producer()
    if node is None:
        value.const_value = tensor
    else:
        node.attributes.clear()
        node.attributes["value"] = ir.AttrTensor("value", tensor)
