"""The current parameters of a module, back in an ONNX graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwrap.graph.index import OnnxGraph
from qwrap.model.tensors import to_array
from qwrap.model.wrapped import WrappedModel


def materialize(model: WrappedModel) -> ir.Model:
    """Return a copy of the model's graph that holds its current parameters and buffers.

    Tensors that did not change stay the same objects, so that those outside the file stay there;
    every one is read to be compared.
    """
    copy = model.graph.model.clone()
    changed = {}
    for key in model.layout.slots:
        tensor, original = model.stored(key), model.layout.values.stored[key]
        assert tensor is not None
        array = to_array(tensor, model.graph.type_of(model.graph.values[key]))
        if not np.array_equal(array, original.numpy(), equal_nan=array.dtype.kind == "f"):
            changed[key] = ir.tensor(array, name=original.name)
    if changed:
        graph = OnnxGraph(copy)
        for key, replacement in changed.items():
            set_stored(graph.values[key], replacement)
    return copy


def set_stored(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Replace the tensor of an initialiser or Constant node, in place."""
    node = value.producer()
    if node is None:
        value.const_value = tensor
    else:
        node.attributes.clear()
        node.attributes["value"] = ir.AttrTensor("value", tensor)
