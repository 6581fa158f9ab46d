"""The real values of quantized weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qwrap.graph import graphs
from qwrap.ort.errors import InvalidModelError

Array = NDArray[Any]
_DEFAULT_AXIS = 1  # of DequantizeLinear
_WHOLE = {  # types whose codes are integers
    getattr(onnx.TensorProto, name)
    for name in ("INT4", "UINT4", "INT8", "UINT8", "INT16", "UINT16", "INT32", "INT2", "UINT2")
    if hasattr(onnx.TensorProto, name)
}


def dequantized_weights(model: onnx.ModelProto) -> Iterator[tuple[str, Array]]:
    """Yield the name of each constant that DequantizeLinear reads, and its real values.

    Bodies included. Per-tensor, per-channel and blocked scales; all types.

    Raises:
        InvalidModelError: scales do not fit their tensor.
    """
    outer = constants_of(model.graph)
    seen = set()
    for graph in graphs(model.graph):
        tensors = {**outer, **constants_of(graph)}
        for node in graph.node:
            name = node.input[0] if node.op_type == "DequantizeLinear" else ""
            if name in tensors and name not in seen:
                seen.add(name)
                yield name, _dequantized(node, [tensors.get(n) for n in node.input])


def constants_of(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Return the tensors that initializers and Constant nodes of ``graph`` hold, by name."""
    nodes = (node for node in graph.node if node.op_type == "Constant")
    held = {node.output[0]: a.t for node in nodes for a in node.attribute if a.name == "value"}
    return {**held, **{tensor.name: tensor for tensor in graph.initializer}}


def _dequantized(node: onnx.NodeProto, tensors: list[onnx.TensorProto | None]) -> Array:
    codes, scale, *rest = tensors
    if codes is None or scale is None:
        raise InvalidModelError(
            f"node '{node.name}': the scale of weight '{node.input[0]}' is no constant"
        )
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    axis, block = attributes.get("axis", _DEFAULT_AXIS), attributes.get("block_size", 0)
    real = numpy_helper.to_array(scale)
    values = numpy_helper.to_array(codes)
    zero = rest[0] if rest else None
    if codes.data_type in _WHOLE:
        values = values.astype(np.int64)
        if zero is not None:
            offset = numpy_helper.to_array(zero).astype(np.int64)
            values = values - _spread(offset, values.shape, axis, block, node)
    step = _spread(real, values.shape, axis, block, node)
    return values.astype(real.dtype) * step


def _spread(
    parameter: Array, shape: tuple[int, ...], axis: int, block: int, node: onnx.NodeProto
) -> Array:
    """Return scales or zero points such that they broadcast against a tensor of ``shape``."""
    if parameter.size == 1 and not block:
        return parameter.reshape(())
    if not -len(shape) <= axis < len(shape):
        raise InvalidModelError(f"node '{node.name}': axis {axis} of a tensor of shape {shape}")
    axis %= len(shape)
    if block:
        spread = np.repeat(parameter, block, axis=axis) if parameter.ndim == len(shape) else None
        if spread is not None and spread.shape[axis] >= shape[axis]:
            return spread.take(range(shape[axis]), axis)
    elif parameter.ndim == 1 and parameter.size == shape[axis]:
        return parameter.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    raise InvalidModelError(
        f"node '{node.name}': scale or zero_point of shape {parameter.shape} does not fit a "
        f"tensor of shape {shape} along axis {axis}" + (f", blocks of {block}" if block else "")
    )
