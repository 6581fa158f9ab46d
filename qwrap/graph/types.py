"""Whether the operators of a graph take the types they are given."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from types import MappingProxyType

import onnx
import onnx_ir as ir

from qwrap.graph.index import ValueType, infer_strictly, opset_of, walk_nodes
from qwrap.graph.nodes import STANDARD, domain_of

Parameter = onnx.defs.OpSchema.FormalParameter
VARIADIC = onnx.defs.OpSchema.FormalParameterOption.Variadic


def type_problems(model: ir.Model, refused: Container[ir.Node] = ()) -> list[str]:
    """Return a line for each node that its operator's schema cannot follow.

    Such is one that is given a type its operator does not take, and one whose attributes do not
    fit the shapes: an axis out of range, a list of the wrong length. Where a type or shape is not
    known, nothing is wrong. onnxruntime refuses the same nodes, for it asks the same schemas.

    Args:
        model: not modified.
        refused: nodes that are known to be wrong, about which the schema is not asked: shape
            inference crashes over some attributes.

    Source: the type constraints and the shape inference of ONNX's operator schemas.
    """
    types, complaints = infer_strictly(model, refused)
    local = model.functions
    problems = []
    for node in walk_nodes(model.graph):
        schema = None if node.op_identifier() in local else _schema(node, model)
        found = [] if schema is None else [*_node_problems(node, schema, types)]
        if node.domain in (*STANDARD, "com.microsoft"):
            found += _restated(node, types)
        name = node.name or f"{node.op_type}:{node.outputs[0].name if node.outputs else ''}"
        problems += [f"node {name!r} ({node.op_type}): {problem}" for problem in found]
    return problems or [*_complaints(model, complaints)]


RESTATED: Mapping[str, tuple[str, int, int]] = MappingProxyType({
    **dict.fromkeys(("Conv", "ConvTranspose", "ConvInteger"), ("kernel_shape", 1, 2)),
    **dict.fromkeys(("DeformConv", "FusedConv", "NhwcConv"), ("kernel_shape", 1, 2)),
    **dict.fromkeys(("NhwcFusedConv", "ConvTransposeWithDynamicPads"), ("kernel_shape", 1, 2)),
    "QLinearConv": ("kernel_shape", 3, 2),
    **dict.fromkeys(("RNN", "GRU", "LSTM"), ("hidden_size", 2, 2)),
})
"""Operator to an attribute that repeats the end of a shape, of which input, and from which axis."""


def _restated(node: ir.Node, types: Mapping[ir.Value, ValueType]) -> Iterator[str]:
    """Say where an attribute that repeats what a shape says anyway says something else."""
    if node.op_type not in RESTATED:
        return
    name, index, start = RESTATED[node.op_type]
    attribute, inputs = node.attributes.get(name), node.inputs
    value = inputs[index] if index < len(inputs) else None
    shape = None if value is None else types.get(value, ValueType()).shape
    if attribute is None or attribute.is_ref() or value is None or shape is None:
        return
    is_list = attribute.type == ir.AttributeType.INTS
    said = list(attribute.as_ints()) if is_list else [attribute.as_int()]
    there = shape[start:]
    differs = any(isinstance(n, int) and m != n for m, n in zip(said, there, strict=False))
    if len(said) != len(there) or differs:
        yield f"{name}={said if is_list else said[0]}, but {value.name!r} has shape {[*shape]}"


FLOW = ("If", "Loop", "Scan")
SHAPE_ERROR = "[ShapeInferenceError]"
PLACE = re.compile(r"\(op_type:(\w+)(?:, node name: ([^\n]*?))?\): ")


def _complaints(model: ir.Model, found: str) -> Iterator[str]:
    """Yield a line for each node of ``model`` that onnx complains about.

    Nodes inside of functions are left out, those of schemas too: onnx does not pass them all that
    it knows of the call, and finds mistakes where there are none. So is what it says of branches
    that disagree, for one may hold what nobody knows, and of data that it failed to propagate.
    """
    nodes = {
        (node.op_type, node.name or f"{node.op_type}:{node.outputs[0].name}")
        for node in walk_nodes(model.graph)
        if node.domain in STANDARD and node.outputs
    }
    for line in found.split("\n"):
        places = [*PLACE.finditer(line)]
        if not places or any(place[1] not in FLOW for place in places[:-1]):
            continue
        inner, said = places[-1], line[places[-1].end() :]
        # Types are looked at above; where onnx does not know one, it takes it for another. Where a
        # name inside of a body is that of a value outside, it mixes up what it knows of their data.
        sound = said.startswith(SHAPE_ERROR) and "already exists" not in said
        if sound and inner[1] not in FLOW and (inner[1], inner[2]) in nodes:
            yield f"node {inner[2]!r} ({inner[1]}): {said.removeprefix(SHAPE_ERROR).strip()}"


def _schema(node: ir.Node, model: ir.Model) -> onnx.defs.OpSchema | None:
    domain = domain_of(node.domain)
    try:
        return onnx.defs.get_schema(node.op_type, opset_of(model, domain), domain)
    except onnx.defs.SchemaError:
        return None


def _node_problems(
    node: ir.Node, schema: onnx.defs.OpSchema, types: Mapping[ir.Value, ValueType]
) -> Iterator[str]:
    bound: dict[str, tuple[str, str]] = {}  # type variable -> type, and the input that had it
    for index, value in enumerate(node.inputs):
        found = None if value is None else _text(types.get(value))
        parameter = _parameter(schema, index)
        if found is None or parameter is None or value is None:
            continue
        where = f"input {parameter.name!r} ({value.name!r}) is {found}"
        if found not in parameter.types:
            yield f"{where}; expected {', '.join(sorted(parameter.types))}"
            continue
        if not parameter.is_homogeneous:
            continue
        other, first = bound.setdefault(parameter.type_str, (found, value.name or ""))
        if other != found:
            yield f"{where}, but {first!r} is {other}; expected the same type"


def _parameter(schema: onnx.defs.OpSchema, index: int) -> Parameter | None:
    if index < len(schema.inputs):
        return schema.inputs[index]
    last = schema.inputs[-1] if schema.inputs else None
    return last if last is not None and last.option == VARIADIC else None


def _text(known: ValueType | None) -> str | None:
    """Return a type as schemas write it, None if it is not known."""
    if known is None or known.dtype is None or known.kind == "optional":
        return None
    tensor = f"tensor({known.dtype.name.lower()})"
    return f"seq({tensor})" if known.kind == "sequence" else tensor
