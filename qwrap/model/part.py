"""A part of a model, between tensors, as a model of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import onnx_ir as ir
from torch import nn

from qwrap.errors import ModelError
from qwrap.graph.index import OnnxGraph, ValueType, bodies, read_values
from qwrap.model.points import OutputPoint, Point, ValuePoint
from qwrap.model.wrapped import WrappedModel


def part_of(
    model: WrappedModel, inputs: Sequence[str], outputs: Sequence[str], *, shared: bool
) -> WrappedModel:
    """Return what computes ``outputs`` from ``inputs``, with the keys that the whole model has.

    What does not come from ``inputs`` comes from the model's own graph inputs: those that are
    needed are inputs of the part too, behind the given ones. Nodes that run graphs stay whole.
    The given inputs are taken as they are read, behind what sits on them in the model, unless
    they are inputs of the model.

    Args:
        model: not modified.
        inputs: value keys of the main graph.
        outputs: the same; those on which something sits come out behind it.
        shared: whether parameters and buffers are the model's own, and what sits on points or
            computes nodes of the part does so there too: the same modules. Else the part is that
            of ``model.graph`` with the weights stored there, and nothing sits in it.

    Raises:
        ModelError: a key is none of a tensor in the main graph, or a node that is needed makes one
            of ``inputs`` beside another output.
    """
    graph = OnnxGraph(_cut(model.graph, inputs, outputs))
    settings = model.layout.settings
    if not shared:
        device = next(
            (tensor.device for tensor in chain(model.parameters(), model.buffers())), None
        )
        return WrappedModel(graph, settings).train(model.training).to(device)
    stored = {key: model.stored(key) for key in graph.values}
    tensors = {key: tensor for key, tensor in stored.items() if tensor is not None}
    part = WrappedModel(graph, settings, tensors).train(model.training)
    _attach(part, model, inputs, outputs)
    return part


def _attach(
    part: WrappedModel, model: WrappedModel, inputs: Iterable[str], outputs: Sequence[str]
) -> None:
    """Put on ``part``, in place, what sits on the same places of ``model``."""
    own_inputs = {ValuePoint(model.graph.key(value)) for value in model.graph.inputs}
    behind = {ValuePoint(key) for key in inputs} - own_inputs
    places: dict[Point, Point] = {point: point for point in part.layout.points}
    places = {point: own for point, own in places.items() if not isinstance(point, OutputPoint)}
    ends = {model.graph.key(value): i for i, value in enumerate(model.graph.outputs)}
    places |= {
        OutputPoint(ends[key]): OutputPoint(i) for i, key in enumerate(outputs) if key in ends
    }
    taps: dict[Point, nn.Module] = {
        places[point]: model.tap(point)
        for point in model.attached
        if point in places and point not in behind
    }
    nodes = part.graph.nodes
    part.attach(taps, {key: kernel for key, kernel in model.kernels.items() if key in nodes})
    substitutes = {key: model.substitute(key) for key in model.replaced if key in nodes}
    if substitutes:
        part.put_substitutes(substitutes)


# --- the graph -----------------------------------------------------------------------------------


def _cut(graph: OnnxGraph, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """Return a model of the nodes between; names are the keys of ``graph``."""
    whole = graph.model.graph
    given, wanted = ([_value(graph, key) for key in keys] for keys in (inputs, outputs))
    nodes, sources = _needed(given, wanted)
    _check(graph, nodes, given)
    ordered = [node for node in whole if node in nodes]
    constants = [value for value in sources if value.is_initializer()]
    further = [v for v in graph.inputs if v in sources and v not in given]
    view = ir.GraphView(
        [*given, *further],
        wanted,
        nodes=ordered,
        initializers=constants,
        opset_imports=dict(whole.opset_imports),
        name=whole.name,
    )
    copy = view.clone()
    _name(copy, ordered, graph)
    _name_values(copy.inputs, view.inputs, graph)
    return ir.Model(copy, ir_version=graph.model.ir_version)


def _value(graph: OnnxGraph, key: str) -> ir.Value:
    value = graph.values.get(key)
    producer = None if value is None else value.producer()
    holder = None if value is None else value.graph if producer is None else producer.graph
    if value is None or holder is not graph.model.graph:
        raise ModelError(f"{key!r} is no tensor of the main graph; a part begins and ends at such")
    return value


def _needed(
    given: Iterable[ir.Value], wanted: Iterable[ir.Value]
) -> tuple[set[ir.Node], dict[ir.Value, None]]:
    """Return the nodes between, and the values they read that no node makes."""
    nodes: set[ir.Node] = set()
    sources: dict[ir.Value, None] = {}
    seen, waiting = set(given), list(wanted)
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if node is None:
            sources[value] = None
        elif node not in nodes:
            nodes.add(node)
            waiting.extend(read_values(node))
    return nodes, sources


def _check(graph: OnnxGraph, nodes: set[ir.Node], given: Iterable[ir.Value]) -> None:
    for value in given:
        producer = value.producer()
        if producer is not None and producer in nodes:
            raise ModelError(
                f"node {graph.node_key(producer)!r} makes {graph.key(value)!r}, an input of the "
                "part, and another tensor that the part needs; let all of its outputs be inputs"
            )


def _name(copy: Iterable[ir.Node], nodes: Iterable[ir.Node], graph: OnnxGraph) -> None:
    """Name copies of ``nodes``, and what they make, by their keys in ``graph``, in place."""
    for new, old in zip(copy, nodes, strict=True):
        new.name = graph.node_key(old)
        _name_values(new.outputs, old.outputs, graph)
        for (_, inner), (_, body) in zip(bodies(new), bodies(old), strict=True):
            _name_values(
                (*inner.inputs, *inner.initializers.values()),
                (*body.inputs, *body.initializers.values()),
                graph,
            )
            _name(inner, body, graph)


def _name_values(copies: Iterable[ir.Value], values: Iterable[ir.Value], graph: OnnxGraph) -> None:
    for new, old in zip(copies, values, strict=True):
        if old.name:
            new.name = graph.key(old)
            _declare(new, graph.type_of(old))


def _declare(value: ir.Value, known: ValueType) -> None:
    """Let a value without a declared type have the one that is known, in place."""
    if known.dtype is None:
        return
    if value.type is None:
        value.type = _type(known.kind, ir.TensorType(known.dtype))
    if value.shape is None and known.shape is not None:
        value.shape = ir.Shape(known.shape)


def _type(kind: str, tensor: ir.TensorType) -> ir.TypeProtocol:
    if kind == "tensor":
        return tensor
    return ir.SequenceType(tensor) if kind == "sequence" else ir.OptionalType(tensor)
