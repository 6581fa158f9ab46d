"""Insert QuantizeLinear and DequantizeLinear, and store constants as codes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from torch import Tensor

from qwrap.dtypes import INT32, QuantType
from qwrap.graph.index import OnnxGraph
from qwrap.model.points import UsePoint, ValuePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import QParams, quantize
from qwrap.quant.prepare import plan_of
from qwrap.quant.stubs import BiasStub, Stub


class QdqWriter:
    """Edits one draft: a copy of the model's graph, with its current parameters.

    Names follow onnxruntime's own tool: ``<tensor>_QuantizeLinear`` and ``_DequantizeLinear`` for
    nodes, ``_scale`` and ``_zero_point`` for qparams, ``_quantized`` for codes.
    """

    def __init__(self, model: WrappedModel, draft: ir.Model) -> None:
        self.model, self.plan = model, plan_of(model)
        self.graph = OnnxGraph(draft)
        self.draft = draft
        self.names = {v.name for v in self.graph.values.values()}
        self.qparams: dict[str, tuple[ir.Value, ir.Value]] = {}
        self.constants: dict[tuple[str, str], ir.Value] = {}

    def write(self) -> None:
        """Write all pairs and codes of the plan, in place."""
        for (node, index), constant in self.plan.constants.items():
            stub = self.model.tap(UsePoint(node, index))
            assert isinstance(stub, Stub)
            value = self.model.stored(constant.value)
            assert value is not None
            codes = quantize(
                value, stub.qparams, stub.spec.dtype, narrow_range=stub.spec.narrow_range
            )
            self._constant(node, index, constant.value, codes, stub.qparams, stub.spec.dtype)
        for (node, index), bias in self.plan.biases.items():
            stub = self.model.tap(UsePoint(node, index))
            assert isinstance(stub, BiasStub)
            value = self.model.stored(bias.value)
            assert value is not None
            self._constant(node, index, bias.value, stub.codes(value), stub.qparams, INT32)
        for key in self.plan.tensors:
            self._pair(key)
        self._remove_unused()

    def _fresh(self, name: str) -> str:
        unique, count = name, 0
        while unique in self.names:
            count += 1
            unique = f"{name}_{count}"
        self.names.add(unique)
        return unique

    def _initializer(self, name: str, array: np.ndarray, dtype: QuantType | None) -> ir.Value:  # type: ignore[type-arg]
        name = self._fresh(name)
        kind = None if dtype is None else ir.DataType(dtype.onnx_type)
        tensor = ir.tensor(array, dtype=kind, name=name)
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.draft.graph.register_initializer(value)
        return value

    def _scale_and_zero_point(
        self, name: str, qparams: QParams, dtype: QuantType
    ) -> tuple[ir.Value, ir.Value]:
        scale, zero_point = _array(qparams.scale), _array(qparams.zero_point)
        if qparams.axis is None:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        stored = zero_point.astype(ir.DataType(dtype.onnx_type).numpy())
        return (
            self._initializer(f"{name}_scale", scale, None),
            self._initializer(f"{name}_zero_point", stored, dtype),
        )

    def _node(self, op_type: str, inputs: list[ir.Value], name: str, axis: int | None) -> ir.Node:
        attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
        node = ir.Node("", op_type, inputs, attributes, num_outputs=1, name=self._fresh(name))
        output = self._fresh(f"{name}_Output")
        node.outputs[0].name = output
        return node

    def _constant(
        self, node: str, index: int, key: str, codes: Tensor, qparams: QParams, dtype: QuantType
    ) -> None:
        """Feed input ``index`` of ``node`` from codes; equal codes are stored once."""
        user = self.graph.nodes[node]
        name = self.graph.values[key].name or "constant"
        array = _array(codes).astype(ir.DataType(dtype.onnx_type).numpy())
        stored = self._initializer(f"{name}_quantized", array, dtype)
        inputs = [stored, *self._scale_and_zero_point(name, qparams, dtype)]
        dequantize = self._node(
            "DequantizeLinear", inputs, f"{name}_DequantizeLinear", qparams.axis
        )
        graph = user.graph
        assert graph is not None
        graph.insert_before(user, dequantize)
        user.replace_input_with(index, dequantize.outputs[0])

    def _pair(self, key: str) -> None:
        """Put a pair behind the value ``key``; all its consumers read what comes out."""
        tensor = self.plan.tensors[key]
        value = self.graph.values[key]
        stub = self.model.tap(ValuePoint(tensor.source))
        assert isinstance(stub, Stub)
        if tensor.source not in self.qparams:
            name = self.graph.values[tensor.source].name or "tensor"
            self.qparams[tensor.source] = self._scale_and_zero_point(
                name, stub.qparams, tensor.spec.dtype
            )
        scale, zero_point = self.qparams[tensor.source]
        uses = list(value.uses())
        name = value.name or "tensor"
        quantize_node = self._node(
            "QuantizeLinear", [value, scale, zero_point], f"{name}_QuantizeLinear", None
        )
        producer = value.producer()
        home = self.draft.graph if producer is None else producer.graph
        assert home is not None
        if producer is None:
            first = next(iter(home))
            home.insert_before(first, quantize_node)
        else:
            home.insert_after(producer, quantize_node)
        readers: dict[ir.Graph, ir.Value] = {}
        codes = quantize_node.outputs[0]
        for use in uses:
            where = use.node.graph
            assert isinstance(where, ir.Graph)
            if where not in readers:
                readers[where] = self._dequantize(
                    codes, scale, zero_point, name, where, quantize_node
                )
            use.node.replace_input_with(use.idx, readers[where])
        self._rewire_outputs(value, codes, scale, zero_point, quantize_node)

    def _dequantize(
        self,
        codes: ir.Value,
        scale: ir.Value,
        zero_point: ir.Value,
        name: str,
        where: ir.Graph,
        after: ir.Node,
    ) -> ir.Value:
        """Return the dequantized value in graph ``where``: kernels fuse only within one graph."""
        node = self._node(
            "DequantizeLinear", [codes, scale, zero_point], f"{name}_DequantizeLinear", None
        )
        if where is after.graph:
            where.insert_after(after, node)
        else:
            where.insert_before(next(iter(where)), node)
        return node.outputs[0]

    def _rewire_outputs(
        self,
        value: ir.Value,
        codes: ir.Value,
        scale: ir.Value,
        zero_point: ir.Value,
        after: ir.Node,
    ) -> None:
        """Let a graph output come out of the pair under its own name."""
        graph = after.graph
        assert isinstance(graph, ir.Graph)
        if value not in graph.outputs:
            return
        name = value.name or "output"
        node = self._node(
            "DequantizeLinear", [codes, scale, zero_point], f"{name}_output_DequantizeLinear", None
        )
        graph.insert_after(after, node)
        result = node.outputs[0]
        result.type, result.shape = value.type, value.shape
        for i, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[i] = result
        value.name = self._fresh(f"{name}_float")
        result.name = name

    def _remove_unused(self) -> None:
        """Drop the float constants that only codes replaced."""
        replaced = {c.value for c in self.plan.constants.values()}
        replaced |= {b.value for b in self.plan.biases.values()}
        for key in replaced:
            value = self.graph.values[key]
            if value.uses() or value.is_graph_output():
                continue
            producer = value.producer()
            if producer is not None:
                graph = producer.graph
                assert graph is not None
                graph.remove(producer, safe=True)
            else:
                graph = value.graph
                assert isinstance(graph, ir.Graph)
                if value in graph.inputs:
                    graph.inputs.remove(value)
                graph.initializers.pop(value.name or "")


def _array(tensor: Tensor) -> np.ndarray:  # type: ignore[type-arg]
    array: np.ndarray = tensor.detach().cpu().numpy()  # type: ignore[type-arg]
    return array
