"""Whether the operators of a graph take the types they are given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
import onnx_ir as ir

from qwrap.graph.index import ValueType, infer_types, opset_of, walk_nodes
from qwrap.graph.nodes import domain_of

Parameter = onnx.defs.OpSchema.FormalParameter
VARIADIC = onnx.defs.OpSchema.FormalParameterOption.Variadic


def type_problems(model: ir.Model) -> list[str]:
    """Return a line for each node that is given a type its operator does not take.

    Types follow from those of graph inputs and initialisers alone: what a file declares of the
    values between may be out of date. Where a type is not known, nothing is wrong.

    Source: the type constraints of ONNX's operator schemas.
    """
    types = infer_types(model, declared=False)
    local = model.functions
    problems = []
    for node in walk_nodes(model.graph):
        schema = None if node.op_identifier() in local else _schema(node, model)
        if schema is not None:
            name = node.name or f"{node.op_type}:{node.outputs[0].name if node.outputs else ''}"
            problems += [
                f"node {name!r} ({node.op_type}): {problem}"
                for problem in _node_problems(node, schema, types)
            ]
    return problems


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
