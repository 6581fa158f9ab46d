"""Put the body of a function where it is called: the model's own functions and those of schemas.

Names inside become ``<name of the call>/<name in the function>``; outputs keep the names they have
outside. Nodes that came out of a function carry its name in their metadata, under ``FUNCTION``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

import onnx
import onnx_ir as ir

from qwrap.errors import ModelError
from qwrap.graph.constants import Constants
from qwrap.graph.index import ValueType, infer_types, opset_of, walk_nodes
from qwrap.graph.nodes import STANDARD

FUNCTION = "qwrap.function"
DEEPEST = 64  # functions that call functions

Wanted = Callable[[ir.Node], bool]
Types = Mapping[ir.Value, ValueType]


def _none(_: ir.Node) -> bool:
    return False


def expand_functions(model: ir.Model, wanted: Wanted, kept: Wanted = _none) -> ir.Model:
    """Return ``model``, or where it calls functions a copy in which they are expanded.

    Args:
        model: not modified.
        wanted: whether the body that the schema of a node's operator has shall replace it. Calls of
            the model's own functions are always replaced.
        kept: but for these calls.

    Raises:
        ModelError: functions call each other in a circle, or mean other revisions of operators
            than the model does.

    Source: ONNX IR specification, "Functions".
    """
    if not any(_has_body(node, model, wanted, kept) for node in walk_nodes(model.graph)):
        return model
    copy = model.clone()
    for _ in range(DEEPEST):
        calls = [node for node in walk_nodes(copy.graph) if _has_body(node, copy, wanted, kept)]
        if not calls:
            break
        types: Types = infer_types(copy) if any(map(_needs_types, calls)) else {}
        names = Constants(copy)
        found = [(node, _function(node, copy, types)) for node in calls]
        if all(function is None for _, function in found):
            break  # left for the caller to refuse by name
        for node, function in found:
            if function is not None:
                _inline(node, function, copy, names)
    else:
        called = {n.op_type for n in walk_nodes(copy.graph) if _has_body(n, copy, wanted, kept)}
        raise ModelError(f"functions call each other without end: {sorted(called)}")
    used = {node.op_identifier() for node in walk_nodes(copy.graph)}
    for identifier in copy.functions.keys() - used:
        del copy.functions[identifier]
    return copy


# --- finding functions ---------------------------------------------------------------------------


def _has_body(node: ir.Node, model: ir.Model, wanted: Wanted, kept: Wanted) -> bool:
    if node.op_identifier() in model.functions:
        return not kept(node)
    schema = _schema(node, model)
    if schema is None or not (schema.has_function or schema.has_context_dependent_function):
        return False
    return wanted(node)


def _schema(node: ir.Node, model: ir.Model) -> Any:  # what onnx declares of it lacks functions
    domain = "" if node.domain in STANDARD else node.domain
    try:
        return onnx.defs.get_schema(node.op_type, opset_of(model, domain), domain)
    except onnx.defs.SchemaError:
        return None


def _needs_types(node: ir.Node) -> bool:
    return onnx.defs.has(node.op_type, "" if node.domain in STANDARD else node.domain)


def _function(node: ir.Node, model: ir.Model, types: Types) -> ir.Function | None:
    """Return a function that the caller may take apart, None if there is none for these types."""
    own = model.functions.get(node.op_identifier())
    if own is not None:
        return own.clone()
    schema = _schema(node, model)
    assert schema is not None
    proto = _schema_function(schema, node, opset_of(model, node.domain), types)
    if proto is None:
        return None
    function = _from_proto(proto)
    for name, attribute in schema.attributes.items():
        if attribute.default_value.name and name not in node.attributes:
            function.attributes[name] = ir.from_proto(attribute.default_value)
    return function


def _from_proto(proto: onnx.FunctionProto) -> ir.Function:
    """Read a function; outputs that it was built without, as nobody reads them, are empty."""
    made = {*proto.input, *(name for node in proto.node for name in node.output)}
    for name in proto.output:
        if name not in made:
            proto.node.append(onnx.helper.make_node("Optional", [], [name]))
    function = ir.from_proto(proto)
    assert isinstance(function, ir.Function)
    return function


def _schema_function(
    schema: Any, node: ir.Node, opset: int, types: Types
) -> onnx.FunctionProto | None:
    """Return the body for ``opset``: the newest that was written for one no newer."""
    versions = [v for v in schema.function_opset_versions if v <= opset]
    dependent = [v for v in schema.context_dependent_function_opset_versions if v <= opset]
    try:
        if versions:
            text = schema.get_function_with_opset_version(max(versions))
        elif dependent:
            inputs = [_type_proto(v, types).SerializeToString() for v in node.inputs]
            text = schema.get_context_dependent_function_with_opset_version(
                max(dependent), ir.to_proto(node).SerializeToString(), inputs
            )
        else:
            return None
    except (RuntimeError, onnx.shape_inference.InferenceError):
        return None
    proto = onnx.FunctionProto.FromString(text)
    return proto if proto.node else None


def _type_proto(value: ir.Value | None, types: Types) -> onnx.TypeProto:
    known = types.get(value) if value is not None else None
    if known is None or known.dtype is None:
        return onnx.TypeProto()
    if known.kind != "tensor":
        element = onnx.helper.make_tensor_type_proto(int(known.dtype), None)
        make = {
            "sequence": onnx.helper.make_sequence_type_proto,
            "optional": onnx.helper.make_optional_type_proto,
        }
        return make[known.kind](element)
    return onnx.helper.make_tensor_type_proto(int(known.dtype), known.shape)


# --- inlining ------------------------------------------------------------------------------------


def _inline(call: ir.Node, function: ir.Function, model: ir.Model, names: Constants) -> None:
    _check_opsets(call, function, model)
    _bind_attributes(call, function)
    prefix = names.unique_name(call.name or f"{call.op_type}_{call.outputs[0].name}")
    nodes = list(function)
    for node in walk_nodes(function.graph):
        node.name = names.unique_name(f"{prefix}/{node.name or node.op_type}")
        node.metadata_props.setdefault(FUNCTION, f"{function.domain}::{function.name}")
        for key, text in call.metadata_props.items():
            node.metadata_props.setdefault(key, text)
        for value in _named_in(node):
            value.name = names.unique_name(f"{prefix}/{value.name}")
    inputs = dict(zip_longest(function.inputs, call.inputs))
    results = list(function.outputs)
    function.graph.outputs.clear()
    for formal, actual in inputs.items():
        _replace(formal, actual)
    graph = call.graph
    assert isinstance(graph, ir.Graph)
    function.graph.remove(nodes)
    graph.insert_before(call, nodes)
    taken: set[ir.Value] = set()
    for outer, result in zip(call.outputs, results, strict=False):
        inner = inputs.get(result, result)
        if not outer.name or inner is None:
            continue
        if inner in taken or inner.producer() not in nodes:
            identity = ir.Node("", "Identity", [inner], name=f"{prefix}/{outer.name}")
            graph.insert_before(call, identity)
            inner = identity.outputs[0]
        taken.add(inner)
        inner.type, inner.shape = outer.type or inner.type, outer.shape or inner.shape
        outer.replace_all_uses_with(inner, replace_graph_outputs=True)
        outer.name, inner.name = None, outer.name
    graph.remove(call, safe=True)


def _named_in(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the values that ``node`` and the borders of its bodies name."""
    yield from (value for value in node.outputs if value.name)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            body = attribute.as_graph()
            yield from (value for value in body.inputs if value.name)
            yield from (v for v in body.initializers.values() if not v.is_graph_input())


def _replace(formal: ir.Value, actual: ir.Value | None) -> None:
    if actual is not None:
        formal.replace_all_uses_with(actual, replace_graph_outputs=True)
        return
    for use in tuple(formal.uses()):
        use.node.replace_input_with(use.idx, None)


def _bind_attributes(call: ir.Node, function: ir.Function) -> None:
    """Replace references to the function's attributes by what the call says, or the default."""
    for node in walk_nodes(function.graph):
        for name, attribute in list(node.attributes.items()):
            if not attribute.is_ref():
                continue
            of = attribute.ref_attr_name or ""
            given = call.attributes.get(of, function.attributes.get(of))
            del node.attributes[name]
            if given is not None and given.value is not None:
                node.attributes[name] = ir.Attr(name, given.type, given.value)


def _check_opsets(call: ir.Node, function: ir.Function, model: ir.Model) -> None:
    """Import the domains of ``function``; refuse one in which an operator means something else."""
    for domain, version in function.opset_imports.items():
        name = "" if domain in STANDARD else domain
        if name not in model.opset_imports and domain not in model.opset_imports:
            model.opset_imports[domain] = version
        ours = opset_of(model, name)
        for node in walk_nodes(function.graph):
            same_domain = ("" if node.domain in STANDARD else node.domain) == name
            if ours == version or not same_domain:
                continue
            if not _means_the_same(node.op_type, name, *sorted((ours, version))):
                raise ModelError(
                    f"node {call.name or call.outputs[0].name!r}: function {function.name!r} uses "
                    f"{node.op_type} as of opset {version}, which is another one in the model's "
                    f"opset {ours}; export the model at opset {version}"
                )


def _means_the_same(op_type: str, domain: str, older: int, newer: int) -> bool:
    """Whether the newer revision does what the older does, but for more types and options."""
    try:
        a, b = (onnx.defs.get_schema(op_type, opset, domain) for opset in (older, newer))
    except onnx.defs.SchemaError:
        return not onnx.defs.has(op_type, domain)
    added = [attribute for name, attribute in b.attributes.items() if name not in a.attributes]
    inputs = [[(p.name, str(p.option)) for p in schema.inputs] for schema in (a, b)]
    same = all(
        name in b.attributes
        and attribute.default_value.SerializeToString()
        == b.attributes[name].default_value.SerializeToString()
        for name, attribute in a.attributes.items()
    )
    optional = str(onnx.defs.OpSchema.FormalParameterOption.Optional)
    more = inputs[1][len(inputs[0]) :]
    return (
        same
        and not any(attribute.required for attribute in added)
        and inputs[1][: len(inputs[0])] == inputs[0]
        and all(option == optional for _, option in more)
    )
