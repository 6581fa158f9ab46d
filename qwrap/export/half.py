"""Islands of float16 in a draft: casts at their borders, constants of float16 inside."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qwrap.errors import ExportError
from qwrap.export.quantizers import Quantizers
from qwrap.graph.constants import label
from qwrap.graph.index import OnnxGraph
from qwrap.quant.plan import HalfPlan

CASTS_BY_NAME = 5  # the last opset whose Cast calls types by their names


def write_half(graph: OnnxGraph, half: Mapping[str, HalfPlan], make: Quantizers) -> None:
    """Let nodes compute in float16, in place.

    A tensor is cast once in each direction, whatever number of nodes read it so, and never between
    two nodes of ``half``. Constants are stored in float16, and in float32 too where others read
    them. Graph inputs and outputs keep their names and types, and so does each tensor that is read
    in float32: what it is cast from is ``<name>_float16``.

    Args:
        graph: of a draft, with its pairs written.
        half: key of a node in it -> its tensors that are to be float16.
        make: what new nodes and constants come from.

    Raises:
        ExportError: a constant has become too large for float16.
    """
    if half:
        _HalfWriter(graph, half, make).write()


class _HalfWriter:
    def __init__(self, graph: OnnxGraph, half: Mapping[str, HalfPlan], make: Quantizers) -> None:
        self.make = make
        self.nodes = [(graph.nodes[key], plan) for key, plan in half.items()]
        self.made = {node.outputs[i]: None for node, plan in self.nodes for i in plan.outputs}
        self.read = {(node, i) for node, plan in self.nodes for i in plan.inputs}
        self.rounded: dict[ir.Value, ir.Value] = {}

    def write(self) -> None:
        """Write all casts and constants, in place."""
        for node, plan in self.nodes:
            if node.op_type == "Cast" and plan.outputs:
                node.attributes.add(self._to(ir.DataType.FLOAT16))
            for index in plan.inputs:
                value = node.inputs[index]
                assert value is not None
                if value not in self.made:
                    node.replace_input_with(index, self._as_half(value, node))
        for value in self.made:
            value.type = ir.TensorType(ir.DataType.FLOAT16)
            self._widen(value)
        self.make.initializers.drop_unused(self.rounded)

    def _as_half(self, value: ir.Value, user: ir.Node) -> ir.Value:
        """Return a tensor of float32 in float16."""
        if value not in self.rounded:
            tensor = self.make.initializers.array(value)
            if tensor is None:
                self.rounded[value] = self._cast(value, ir.DataType.FLOAT16)
            else:
                self.rounded[value] = self._stored(value, tensor, user)
        return self.rounded[value]

    def _stored(
        self,
        value: ir.Value,
        array: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
        user: ir.Node,
    ) -> ir.Value:
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if (np.isinf(half) & np.isfinite(array)).any():
            raise ExportError(
                f"{label(user)}: {value.name!r} has values up to {np.abs(array).max():.3g}, and "
                f"float16 ends at {np.finfo(np.float16).max:g}; leave the node in float32 with "
                "QConfig.set(..., activation='float32')"
            )
        return self.make.initializer(f"{value.name}_float16", half)

    def _widen(self, value: ir.Value) -> None:
        """Let all that does not read float16 read a cast of ``value``, in place."""
        others = [(u.node, u.idx) for u in value.uses() if (u.node, u.idx) not in self.read]
        outputs = _outputs_of(value)
        if not others and not outputs:
            return
        result = self._cast(value, ir.DataType.FLOAT)
        for node, index in others:
            node.replace_input_with(index, result)
        for index in outputs:
            _graph(value).outputs[index] = result
        name = value.name  # which is that of a tensor of float32 in the model
        value.name = self.make.initializers.unique_name(f"{name}_float16")
        result.name = name

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Put a Cast behind ``value``; return what it makes."""
        suffix = "float16" if dtype == ir.DataType.FLOAT16 else "float32"
        node = ir.Node("", "Cast", [value], [self._to(dtype)], num_outputs=1)
        self.make.named(node, f"{value.name}_{suffix}")
        result = node.outputs[0]
        result.name = self.make.initializers.unique_name(f"{value.name}_{suffix}")
        result.type, result.shape = ir.TensorType(dtype), value.shape
        producer = value.producer()
        if producer is not None:
            _graph(value).insert_after(producer, node)
        else:
            assert isinstance(value.graph, ir.Graph)
            value.graph.insert_before(value.graph[0], node)
        return result

    def _to(self, dtype: ir.DataType) -> ir.Attr:
        if self.make.opset <= CASTS_BY_NAME:
            return ir.AttrString("to", dtype.name)
        return ir.AttrInt64("to", dtype)


def _outputs_of(value: ir.Value) -> list[int]:
    """Return which outputs of its graph ``value`` is."""
    return [i for i, output in enumerate(_graph(value).outputs) if output is value]


def _graph(value: ir.Value) -> ir.Graph:
    """Return the graph of the node that makes ``value``."""
    producer = value.producer()
    assert producer is not None
    assert isinstance(producer.graph, ir.Graph)
    return producer.graph
