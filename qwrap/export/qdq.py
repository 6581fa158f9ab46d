"""Insert QuantizeLinear and DequantizeLinear, and store constants as codes."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx_ir as ir
from torch import Tensor

from qwrap.dtypes import INT32, QuantType
from qwrap.graph.constants import Constants
from qwrap.graph.index import OnnxGraph, walk_nodes
from qwrap.model.points import Point, UsePoint, ValuePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import QParams, quantize
from qwrap.quant.plan import TensorPlan
from qwrap.quant.prepare import plan_of
from qwrap.quant.stubs import BiasStub, Stub

Array = npt.NDArray[Any]


class QdqWriter:
    """Edits one draft: a copy of the model's graph, with its current parameters.

    Names follow onnxruntime's own tool: ``<tensor>_QuantizeLinear`` and ``_DequantizeLinear`` for
    nodes, ``_scale`` and ``_zero_point`` for qparams, ``_quantized`` for codes.
    """

    def __init__(self, model: WrappedModel, draft: ir.Model) -> None:
        self.model, self.plan, self.draft = model, plan_of(model), draft
        self.graph = OnnxGraph(draft)
        self.initializers = Constants(draft)
        self.node_names = {node.name for node in walk_nodes(draft.graph)}
        self.qparams: dict[str, tuple[ir.Value, ir.Value]] = {}
        self.constants: dict[tuple[object, ...], list[ir.Value]] = {}

    def write(self) -> None:
        """Write all pairs and codes of the plan, in place."""
        for (node, index), constant in self.plan.constants.items():
            stub = self._stub(UsePoint(node, index))
            value, spec = self._stored(constant.value), stub.spec
            codes = quantize(value, stub.qparams, stub.grid)
            self._constant(node, index, constant.value, codes, stub.qparams, spec.dtype)
        for (node, index), bias in self.plan.biases.items():
            bias_stub = self.model.tap(UsePoint(node, index))
            assert isinstance(bias_stub, BiasStub)
            codes = bias_stub.codes(self._stored(bias.value))
            self._constant(node, index, bias.value, codes, bias_stub.qparams, INT32)
        for key, tensor in self.plan.tensors.items():
            self._pair(self.graph.values[key], tensor)
        self._remove_unused()

    # --- what the model holds --------------------------------------------------------------------

    def _stub(self, point: Point) -> Stub:
        stub = self.model.tap(point)
        assert isinstance(stub, Stub)
        return stub

    def _stored(self, key: str) -> Tensor:
        value = self.model.stored(key)
        assert value is not None
        return value

    # --- new things ------------------------------------------------------------------------------

    def _initializer(self, name: str, array: Array, kind: int) -> ir.Value:
        array = array.astype(ir.DataType(kind).numpy())
        name = self.initializers.unique_name(name)
        return self.initializers.add(self.draft.graph, name, array)

    def _scale_and_zero_point(
        self, name: str, qparams: QParams, dtype: QuantType
    ) -> tuple[ir.Value, ir.Value]:
        scale, zero_point = _array(qparams.scale), _array(qparams.zero_point)
        if qparams.axis is None:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        return (
            self._initializer(f"{name}_scale", scale, ir.DataType.FLOAT.value),
            self._initializer(f"{name}_zero_point", zero_point, dtype.onnx_type),
        )

    def _node(
        self, op_type: str, inputs: list[ir.Value], tensor: str, axis: int | None = None
    ) -> ir.Node:
        attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
        name = unique = f"{tensor}_{op_type}"
        count = 0
        while unique in self.node_names:
            count += 1
            unique = f"{name}_{count}"
        self.node_names.add(unique)
        node = ir.Node("", op_type, inputs, attributes, num_outputs=1, name=unique)
        node.outputs[0].name = self.initializers.unique_name(f"{name}_Output")
        return node

    # --- constants -------------------------------------------------------------------------------

    def _constant(
        self, node: str, index: int, key: str, codes: Tensor, qparams: QParams, dtype: QuantType
    ) -> None:
        """Feed input ``index`` of ``node`` from codes; equal codes and scales are stored once."""
        user, name = self.graph.nodes[node], self.graph.values[key].name or "constant"
        scale, zero_point = _array(qparams.scale), _array(qparams.zero_point)
        identity = (key, dtype, qparams.axis, scale.tobytes(), zero_point.tobytes())
        if identity not in self.constants:
            stored = self._initializer(f"{name}_quantized", _array(codes), dtype.onnx_type)
            qvalues = self._scale_and_zero_point(name, qparams, dtype)
            self.constants[identity] = [stored, *qvalues]
        dequantize = self._node(
            "DequantizeLinear", self.constants[identity], name, axis=qparams.axis
        )
        _graph(user).insert_before(user, dequantize)
        user.replace_input_with(index, dequantize.outputs[0])

    def _remove_unused(self) -> None:
        """Drop the float constants that only codes replaced."""
        replaced = [c.value for c in self.plan.constants.values()]
        replaced += [b.value for b in self.plan.biases.values()]
        self.initializers.drop_unused(self.graph.values[key] for key in dict.fromkeys(replaced))

    # --- activations -----------------------------------------------------------------------------

    def _pair(self, value: ir.Value, tensor: TensorPlan) -> None:
        """Put a pair behind ``value``; all that read it read what comes out."""
        name = value.name or "tensor"
        if tensor.source not in self.qparams:
            source = self.graph.values[tensor.source].name or "tensor"
            qparams = self._stub(ValuePoint(tensor.source)).qparams
            self.qparams[tensor.source] = self._scale_and_zero_point(
                source, qparams, tensor.spec.dtype
            )
        scale, zero_point = self.qparams[tensor.source]
        uses = list(value.uses())
        quantizer = self._node("QuantizeLinear", [value, scale, zero_point], name)
        _insert_behind(value, quantizer)
        codes = [quantizer.outputs[0], scale, zero_point]
        readers: dict[ir.Graph, ir.Value] = {}
        for use in uses:
            where = _graph(use.node)
            if where not in readers:
                readers[where] = self._dequantize(codes, name, where, quantizer)
            use.node.replace_input_with(use.idx, readers[where])
        if value in _graph(quantizer).outputs and value.producer() is not None:
            self._take_over_output(value, self._dequantize(codes, name, None, quantizer))

    def _dequantize(
        self, codes: list[ir.Value], name: str, where: ir.Graph | None, quantizer: ir.Node
    ) -> ir.Value:
        """Return the dequantized value in graph ``where``: kernels fuse only within one graph."""
        node = self._node("DequantizeLinear", codes, name)
        if where is None or where is quantizer.graph:
            _graph(quantizer).insert_after(quantizer, node)
        else:
            where.insert_before(where[0], node)
        return node.outputs[0]

    def _take_over_output(self, value: ir.Value, result: ir.Value) -> None:
        """Let a graph output come out of the pair under its own name, in place."""
        outputs, name = value.graph.outputs if value.graph else [], value.name
        result.type, result.shape = value.type, value.shape
        for i, output in enumerate(outputs):
            if output is value:
                outputs[i] = result
        value.name = self.initializers.unique_name(f"{name}_float")
        result.name = name


def _insert_behind(value: ir.Value, node: ir.Node) -> None:
    producer = value.producer()
    if producer is not None:
        _graph(producer).insert_after(producer, node)
        return
    graph = value.graph
    assert isinstance(graph, ir.Graph), "a quantized value is made by a node or is a graph input"
    graph.insert_before(graph[0], node)


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)  # nodes of functions are never quantized
    return node.graph


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().numpy()
    return array
