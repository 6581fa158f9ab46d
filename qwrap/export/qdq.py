"""Insert QuantizeLinear and DequantizeLinear, and store constants as codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import onnx_ir as ir
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.dtypes import INT32
from qwrap.export.apart import Apart
from qwrap.export.custom import Call, FunctionCalls
from qwrap.export.quantizers import Parameters, Quantizers
from qwrap.graph.index import OnnxGraph
from qwrap.model.points import Point, UsePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import QParams, quantize
from qwrap.quant.plan import Conversion, TensorPlan
from qwrap.quant.prepare import config_of, plan_of
from qwrap.quant.stubs import BiasStub, Stub
from qwrap.targets import find_target

Use = tuple[ir.Node, int]


class QdqWriter:
    """Edits one draft: a copy of the model's graph, with its current parameters.

    Names follow onnxruntime's own tool: ``<tensor>_QuantizeLinear`` and ``_DequantizeLinear`` for
    nodes, ``_scale`` and ``_zero_point`` for qparams, ``_quantized`` for codes.

    Attributes:
        in_float: whether activations are rounded by functions. Then integer weights are too, for
            behind a DequantizeLinear onnxruntime makes MatMul an operator that rounds what it
            multiplies to 8 bits.
        apart: whether no operator may be behind a DequantizeLinear, see ``QuantPlan.kept_apart``.
        alone: which ones may not, in any case.
    """

    def __init__(self, model: WrappedModel, draft: ir.Model) -> None:
        self.model, self.plan, self.draft = model, plan_of(model), draft
        self.graph = OnnxGraph(draft)
        self.make = Quantizers(draft)
        self.calls = FunctionCalls(self.make)
        specs = [tensor.spec for tensor in self.plan.tensors.values()]
        self.in_float = any(not spec.dtype.is_standard for spec in specs)
        self.apart = self.plan.kept_apart
        target = find_target(config_of(model).target)
        self.alone = Apart(self.plan, self.graph, is_cpu=target.is_cpu)
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
            if self.alone.of_weight(user, spec):
                nodes.append(self.calls.keep_apart(nodes[-1].outputs[0], name, parameters.real))
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
        """Put a pair behind ``value``; all that read it read what comes out, or a conversion."""
        uses = [(use.node, use.idx) for use in value.uses()]
        converted = {
            c.key: [(n, i) for n, i in uses if (self.graph.node_key(n), i) in c.consumers]
            for c in tensor.conversions
        }
        others = [use for use in uses if not any(use in found for found in converted.values())]
        outputs = self._output_indices(value)
        if not uses and not outputs:
            return
        for conversion in tensor.conversions:
            outputs -= set(conversion.outputs)
        results = self._rounded(value, tensor)
        for node, index in others:
            apart = self.apart or self.alone.in_front_of(node, tensor.spec)
            node.replace_input_with(index, results.reader(_graph(node), apart=apart))
        for conversion in tensor.conversions:
            self._convert(value, conversion, converted[conversion.key], results)
        if outputs and results.codes is not value:
            self._take_over_output(value, results.output(), outputs)

    def _output_indices(self, value: ir.Value) -> set[int]:
        """Return which outputs of its graph ``value`` is; a graph input that is one stays so."""
        if value.graph is None or value.producer() is None:
            return set()
        return {i for i, output in enumerate(value.graph.outputs) if output is value}

    def _rounded(self, value: ir.Value, tensor: TensorPlan) -> Rounded:
        """Put what quantizes ``value`` behind it."""
        name = value.name or "tensor"
        if not tensor.spec.dtype.is_standard:
            result = value
            if tensor.source == self.graph.key(value):
                nodes = self._fake_quantized(value, tensor.source, name)
                _insert_behind(value, nodes)
                result = nodes[-1].outputs[0]
            return Rounded(result)
        parameters = self._parameters(tensor.source)
        data, before = value, list[ir.Node]()
        if self._starts_apart(value, tensor, parameters):
            before = [self.calls.keep_apart(value, name, parameters.real)]
            data = before[0].outputs[0]
        quantizer = self.make.quantize(data, parameters, name)
        _insert_behind(value, [*before, quantizer])
        return Rounded(quantizer.outputs[0], partial(self._dequantize, parameters, quantizer), name)

    def _convert(
        self, value: ir.Value, conversion: Conversion, uses: list[Use], results: Rounded
    ) -> None:
        """Let some readers of ``value`` get its codes in another type.

        In the form of onnxruntime's tool: behind a DequantizeLinear of its own where others read
        the tensor as it is.
        """
        name = conversion.key
        made: dict[ir.Graph, Rounded] = {}
        graphs = dict.fromkeys(_graph(node) for node, _ in uses)
        if conversion.outputs:
            graphs.setdefault(self.draft.graph)
        for where in graphs:
            data = results.for_conversion(where, f"{name}_clone")
            if not conversion.spec.dtype.is_standard:
                nodes = self._fake_quantized(data, name, name)
                _insert_after(data, where, nodes)
                made[where] = Rounded(nodes[-1].outputs[0])
                continue
            parameters = self._parameters(name)
            quantizer = self.make.quantize(data, parameters, name)
            _insert_after(data, where, [quantizer])
            made[where] = Rounded(
                quantizer.outputs[0], partial(self._dequantize, parameters, quantizer), name
            )
        for node, index in uses:
            apart = self.apart or self.alone.in_front_of(node, conversion.spec)
            result = made[_graph(node)].reader(_graph(node), apart=apart)
            node.replace_input_with(index, result)
        if conversion.outputs:
            result = made[self.draft.graph].output()
            self._take_over_output(value, result, set(conversion.outputs))

    def _parameters(self, key: str) -> Parameters:
        """Return the initialisers of scale and zero point of a tensor or conversion."""
        if key not in self.qparams:
            stub = self._stub(self.plan.point_of(key))
            value = self._value_of(key)
            name, suffix = value.name or "tensor", ""
            if key not in self.plan.tensors:
                suffix = key.removeprefix(self.graph.key(value))
            real = self._real(value)
            self.qparams[key] = self.make.parameters(name, stub.qparams, stub.spec, real, suffix)
        return self.qparams[key]

    def _value_of(self, key: str) -> ir.Value:
        """Return a tensor, or what a conversion is made of."""
        if key in self.plan.tensors:
            return self.graph.values[key]
        return self.graph.values[next(k for k, c in self.plan.conversions() if c.key == key)]

    def _starts_apart(self, value: ir.Value, tensor: TensorPlan, parameters: Parameters) -> bool:
        """Whether something is in front that onnxruntime must not join to the quantizer."""
        producer = value.producer()
        if producer is None:
            return False
        if self.alone.behind(producer, tensor.spec):
            return True
        if producer.op_type not in ("Relu", "Clip"):
            return False
        zero_point = self._stub(self.plan.point_of(tensor.source)).zero_point
        return self.make.upsets(producer.op_type, parameters, zero_point)

    def _fake_quantized(self, data: ir.Value, key: str, name: str) -> list[ir.Node]:
        """Make the call of a function that rounds ``data`` to the grid of a tensor."""
        value = self._value_of(key)
        stub, known = self._stub(self.plan.point_of(key)), self.graph.type_of(value).shape
        shape = [size if isinstance(size, int) else None for size in known or ()]
        call = self.calls.parameters(name, stub.qparams, stub.spec, shape)
        return self.calls.fake_quantize(data, call, name, self._real(value))

    def _dequantize(
        self,
        parameters: Parameters,
        quantizer: ir.Node,
        name: str,
        where: ir.Graph,
        *,
        apart: bool,
    ) -> ir.Value:
        """Return the dequantized value in graph ``where``: kernels fuse only within one graph."""
        nodes = self.make.dequantize(quantizer.outputs[0], parameters, name)
        if apart:
            nodes.append(self.calls.keep_apart(nodes[-1].outputs[0], name, parameters.real))
        if where is quantizer.graph:
            where.insert_after(quantizer, nodes)
        else:
            where.insert_before(where[0], nodes)
        return nodes[-1].outputs[0]

    def _take_over_output(self, value: ir.Value, result: ir.Value, indices: set[int]) -> None:
        """Let graph outputs come out of a pair under their own name, in place."""
        outputs, name = value.graph.outputs if value.graph else [], value.name
        result.type, result.shape = value.type, value.shape
        for index in indices:
            outputs[index] = result
        value.name = self.make.initializers.unique_name(f"{name}_float")
        result.name = name


@dataclass(slots=True, eq=False)
class Rounded:
    """A tensor that was quantized, and what makes reals of its codes again where they are read.

    Attributes:
        codes: the codes, or the reals themselves if nothing has to make them.
        dequantize: makes reals of the codes in a graph, None if they are that already.
        name: what new nodes are called after.
    """

    codes: ir.Value
    dequantize: Callable[..., ir.Value] | None = None
    name: str = ""
    _readers: dict[tuple[ir.Graph, bool], ir.Value] = field(default_factory=dict)

    def reader(self, where: ir.Graph, *, apart: bool) -> ir.Value:
        """Return what nodes of a graph read, those that stand apart or the others."""
        if self.dequantize is None:
            return self.codes
        if (where, apart) not in self._readers:
            self._readers[where, apart] = self.dequantize(self.name, where, apart=apart)
        return self._readers[where, apart]

    def output(self) -> ir.Value:
        """Return what the graph that the codes are in can have as an output, of a name of its own.

        Of what nodes read there is a second one: kernels fuse only with what nothing else reads.
        """
        if self.dequantize is None:
            return self.codes
        return self.dequantize(self.name, _home(self.codes), apart=False)

    def for_conversion(self, where: ir.Graph, name: str) -> ir.Value:
        """Return what a conversion in a graph reads: what none but conversions do."""
        if self.dequantize is None:
            return self.codes
        return self.dequantize(name if self._readers else self.name, where, apart=False)


def _home(value: ir.Value) -> ir.Graph:
    producer = value.producer()
    assert producer is not None
    return _graph(producer)


def _insert_after(value: ir.Value, where: ir.Graph, nodes: list[ir.Node]) -> None:
    """Insert nodes of graph ``where`` behind what makes ``value``, there or outside."""
    producer = value.producer()
    if producer is not None and producer.graph is where:
        where.insert_after(producer, nodes)
    else:
        where.insert_before(where[0], nodes)


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
