"""Insert QuantizeLinear and DequantizeLinear, and store constants as codes."""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.dtypes import INT32
from qwrap.export.custom import Call, FunctionCalls
from qwrap.export.quantizers import Parameters, Quantizers
from qwrap.graph.index import OnnxGraph
from qwrap.model.points import Point, UsePoint, ValuePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import QParams, quantize
from qwrap.quant.plan import TensorPlan
from qwrap.quant.prepare import plan_of
from qwrap.quant.stubs import BiasStub, Stub


class QdqWriter:
    """Edits one draft: a copy of the model's graph, with its current parameters.

    Names follow onnxruntime's own tool: ``<tensor>_QuantizeLinear`` and ``_DequantizeLinear`` for
    nodes, ``_scale`` and ``_zero_point`` for qparams, ``_quantized`` for codes.

    Attributes:
        in_float: whether activations are rounded by functions. Then integer weights are too, for
            behind a DequantizeLinear onnxruntime makes MatMul an operator that rounds what it
            multiplies to 8 bits.
        apart: whether no operator may be behind a DequantizeLinear, see ``QuantPlan.kept_apart``.
    """

    def __init__(self, model: WrappedModel, draft: ir.Model) -> None:
        self.model, self.plan, self.draft = model, plan_of(model), draft
        self.graph = OnnxGraph(draft)
        self.make = Quantizers(draft)
        self.calls = FunctionCalls(self.make)
        specs = [tensor.spec for tensor in self.plan.tensors.values()]
        self.in_float = any(not spec.dtype.is_standard for spec in specs)
        self.apart = self.plan.kept_apart
        self.qparams: dict[str, Parameters] = {}
        self.constants: dict[tuple[object, ...], tuple[ir.Value, Parameters | Call]] = {}

    def write(self) -> None:
        """Write all pairs and codes of the plan, in place."""
        for (node, index), constant in self.plan.constants.items():
            stub = self._stub(UsePoint(node, index))
            if stub.spec.dtype.function is not None:
                self._call_on_constant(node, index, constant.value, stub)
                continue
            codes = quantize(self._stored(constant.value), stub.qparams, stub.grid)
            self._constant(node, index, constant.value, codes, stub.qparams, stub.spec)
        for (node, index), bias in self.plan.biases.items():
            bias_stub = self.model.tap(UsePoint(node, index))
            assert isinstance(bias_stub, BiasStub)
            codes, qparams = bias_stub.codes(self._stored(bias.value)), bias_stub.qparams
            spec = QuantSpec(dtype=INT32, axis=qparams.axis)
            self._constant(node, index, bias.value, codes, qparams, spec)
        for key, tensor in self.plan.tensors.items():
            self._pair(self.graph.values[key], tensor)
        self._remove_unused()

    # --- what the model holds --------------------------------------------------------------------

    def _stub(self, point: Point) -> Stub:
        stub = self.model.tap(point)
        assert isinstance(stub, Stub)
        return stub

    def _stored(self, key: str) -> Tensor:
        value = self.model.deployed(key)
        assert value is not None
        return value

    def _real(self, value: ir.Value) -> ir.DataType:
        return self.graph.type_of(value).dtype or ir.DataType.FLOAT

    # --- constants -------------------------------------------------------------------------------

    def _constant(
        self, node: str, index: int, key: str, codes: Tensor, qparams: QParams, spec: QuantSpec
    ) -> None:
        """Feed input ``index`` of ``node`` from codes; equal codes and scales are stored once."""
        user, value = self.graph.nodes[node], self.graph.values[key]
        name = value.name or "constant"
        parts = (qparams.scale, qparams.zero_point)
        identity = (key, spec, *(part.detach().cpu().numpy().tobytes() for part in parts))
        if identity not in self.constants:
            self.constants[identity] = self._codes(name, codes, qparams, spec, self._real(value))
        stored, parameters = self.constants[identity]
        if isinstance(parameters, Call):
            nodes = self.calls.dequantize(stored, parameters, self._real(value), name)
        else:
            nodes = self.make.dequantize(stored, parameters, name)
        _graph(user).insert_before(user, nodes)
        user.replace_input_with(index, nodes[-1].outputs[0])

    def _codes(
        self, name: str, codes: Tensor, qparams: QParams, spec: QuantSpec, real: ir.DataType
    ) -> tuple[ir.Value, Parameters | Call]:
        """Make the initialisers of a constant's codes, scale and zero point."""
        if spec.dtype.codebook or (self.in_float and spec.dtype.is_integer):
            stored = self.calls.codes(name, codes, spec.dtype)
            return stored, self.calls.parameters(name, qparams, spec, codes.shape)
        stored = self.make.codes(name, codes, spec.dtype)
        return stored, self.make.parameters(name, qparams, spec, real)

    def _call_on_constant(self, node: str, index: int, key: str, stub: Stub) -> None:
        """Put a call of the user's function between a constant and input ``index`` of ``node``."""
        user, value = self.graph.nodes[node], self.graph.values[key]
        name = value.name or "constant"
        shape = self._stored(key).shape
        call = self.calls.parameters(name, stub.qparams, stub.spec, shape)
        nodes = self.calls.fake_quantize(value, call, name, self._real(value))
        _graph(user).insert_before(user, nodes)
        user.replace_input_with(index, nodes[-1].outputs[0])

    def _remove_unused(self) -> None:
        """Drop the float constants that only codes replaced."""
        replaced = [c.value for c in self.plan.constants.values()]
        replaced += [b.value for b in self.plan.biases.values()]
        self.make.initializers.drop_unused(
            self.graph.values[key] for key in dict.fromkeys(replaced)
        )

    # --- activations -----------------------------------------------------------------------------

    def _pair(self, value: ir.Value, tensor: TensorPlan) -> None:
        """Put a pair behind ``value``; all that read it read what comes out."""
        if not tensor.spec.dtype.is_standard:
            self._call(value, tensor)
            return
        name = value.name or "tensor"
        if tensor.source not in self.qparams:
            source, stub = self.graph.values[tensor.source], self._stub(ValuePoint(tensor.source))
            self.qparams[tensor.source] = self.make.parameters(
                source.name or "tensor", stub.qparams, stub.spec, self._real(source)
            )
        parameters = self.qparams[tensor.source]
        uses = list(value.uses())
        data, before = value, list[ir.Node]()
        if self._follows_clamp(value, tensor, parameters):
            before = [self.calls.keep_apart(value, name, parameters.real)]
            data = before[0].outputs[0]
        quantizer = self.make.quantize(data, parameters, name)
        _insert_behind(value, [*before, quantizer])
        readers: dict[ir.Graph, ir.Value] = {}
        for use in uses:
            where = _graph(use.node)
            if where not in readers:
                readers[where] = self._dequantize(parameters, name, where, quantizer)
            use.node.replace_input_with(use.idx, readers[where])
        if value in _graph(quantizer).outputs and value.producer() is not None:
            where = _graph(quantizer)
            result = self._dequantize(parameters, name, where, quantizer, is_output=True)
            self._take_over_output(value, result)

    def _follows_clamp(self, value: ir.Value, tensor: TensorPlan, parameters: Parameters) -> bool:
        """Whether a Relu or Clip is in front that onnxruntime must not join to the quantizer."""
        producer = value.producer()
        if producer is None or producer.op_type not in ("Relu", "Clip"):
            return False
        zero_point = self._stub(ValuePoint(tensor.source)).zero_point
        return self.make.upsets(producer.op_type, parameters, zero_point)

    def _call(self, value: ir.Value, tensor: TensorPlan) -> None:
        """Put the call of a function behind ``value``, unless it only has moved since one."""
        key, name, uses = self.graph.key(value), value.name or "tensor", list(value.uses())
        if tensor.source != key:
            return
        stub, known = self._stub(ValuePoint(key)), self.graph.type_of(value).shape
        shape = [size if isinstance(size, int) else None for size in known or ()]
        call = self.calls.parameters(name, stub.qparams, stub.spec, shape)
        nodes = self.calls.fake_quantize(value, call, name, self._real(value))
        _insert_behind(value, nodes)
        result = nodes[-1].outputs[0]
        for use in uses:
            use.node.replace_input_with(use.idx, result)
        if value in _graph(nodes[-1]).outputs and value.producer() is not None:
            self._take_over_output(value, result)

    def _dequantize(
        self,
        parameters: Parameters,
        name: str,
        where: ir.Graph,
        quantizer: ir.Node,
        *,
        is_output: bool = False,
    ) -> ir.Value:
        """Return the dequantized value in graph ``where``: kernels fuse only within one graph."""
        nodes = self.make.dequantize(quantizer.outputs[0], parameters, name)
        if self.apart and not is_output:
            nodes.append(self.calls.keep_apart(nodes[-1].outputs[0], name, parameters.real))
        if where is quantizer.graph:
            where.insert_after(quantizer, nodes)
        else:
            where.insert_before(where[0], nodes)
        return nodes[-1].outputs[0]

    def _take_over_output(self, value: ir.Value, result: ir.Value) -> None:
        """Let a graph output come out of the pair under its own name, in place."""
        outputs, name = value.graph.outputs if value.graph else [], value.name
        result.type, result.shape = value.type, value.shape
        for i, output in enumerate(outputs):
            if output is value:
                outputs[i] = result
        value.name = self.make.initializers.unique_name(f"{name}_float")
        result.name = name


def _insert_behind(value: ir.Value, nodes: list[ir.Node]) -> None:
    producer = value.producer()
    if producer is not None:
        _graph(producer).insert_after(producer, nodes)
        return
    graph = value.graph
    assert isinstance(graph, ir.Graph), "a quantized value is made by a node or is a graph input"
    graph.insert_before(graph[0], nodes)


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)  # nodes of functions are never quantized
    return node.graph
