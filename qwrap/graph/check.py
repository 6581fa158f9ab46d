"""What makes a file unfit before anything is built from it, said once and clearly."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from qwrap.errors import ModelError

STANDARD = ("", "ai.onnx")


def check_proto(proto: onnx.ModelProto, where: str, folder: Path | None) -> None:
    """Refuse a model that cannot be understood, or that would be misunderstood.

    Args:
        proto: the model as read.
        where: what messages call it.
        folder: where its external data must lie. None: it has none, or it was checked before.

    Raises:
        ModelError: see ``read_model``.
    """
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{where}: not an ONNX model: it has no graph or imports no opset")
    if unreadable := [
        text for g in graphs(proto.graph) for text in _names(g) if type(text) is bytes
    ]:
        raise ModelError(f"{where}: names that are not UTF-8: {unreadable}")
    sparse = [t.values.name for g in graphs(proto.graph) for t in g.sparse_initializer]
    if sparse:
        raise ModelError(
            f"{where}: sparse initialisers {sparse} are not supported; make them dense first"
        )
    versions = _check_opsets(proto, where)
    problems = [*_tensor_problems(proto.graph, folder), *_node_problems(proto, versions)]
    if problems:
        raise ModelError(f"{where}: " + "; ".join(problems))
    _check_names(proto.graph, where, frozenset())


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield ``graph`` and all graphs inside it."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from graphs(inner)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs that ``node`` holds in its attributes."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH or attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


# --- opsets --------------------------------------------------------------------------------------


def _check_opsets(proto: onnx.ModelProto, where: str) -> dict[str, int]:
    versions = {_domain(entry.domain): entry.version for entry in proto.opset_import}
    newest = onnx.defs.onnx_opset_version()
    if not 1 <= versions.get("", 1) <= newest:
        raise ModelError(
            f"{where}: imports ai.onnx opset {versions['']}; the installed onnx {onnx.__version__} "
            f"knows 1 to {newest}; upgrade onnx or export at an older opset"
        )
    used = {_domain(n.domain): n for g in graphs(proto.graph) for n in reversed(g.node)}
    for domain in sorted(set(used) - set(versions)):
        raise ModelError(
            f"{where}: node {label(used[domain])!r} is of domain {domain or 'ai.onnx'!r}, of which "
            "the model imports no opset; add it to opset_import"
        )
    return versions


def _domain(domain: str) -> str:
    return "" if domain in STANDARD else domain


def label(node: onnx.NodeProto) -> str:
    """Return the name of a node, or what else it can be found by."""
    return node.name or f"{node.op_type}:{next(iter(node.output), '')}"


# --- tensors -------------------------------------------------------------------------------------


def _tensor_problems(graph: onnx.GraphProto, folder: Path | None) -> Iterator[str]:
    for inner in graphs(graph):
        for tensor in inner.initializer:
            if problem := _tensor_problem(tensor, folder):
                yield f"initialiser {tensor.name!r}: {problem}"
        for node in inner.node:
            for attribute in node.attribute:
                for tensor in (
                    *([attribute.t] if attribute.HasField("t") else ()),
                    *attribute.tensors,
                ):
                    if problem := _tensor_problem(tensor, folder):
                        yield f"node {label(node)!r}: tensor {tensor.name!r}: {problem}"


def _tensor_problem(tensor: onnx.TensorProto, folder: Path | None) -> str | None:
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        return f"unknown element type {tensor.data_type}"
    if dtype == ir.DataType.UNDEFINED or any(n < 0 for n in tensor.dims):
        return f"element type {dtype.name}, shape {list(tensor.dims)}"
    if dtype == ir.DataType.STRING:
        return None
    size = packed_size(tensor)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if folder is None:
            stub = location == "-" and entries.get("length") == "0"  # see ``without_weights``
            return (
                None
                if stub
                else (f"its data is in {location!r}; pass the model's path instead of a ModelProto")
            )
        try:
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
        except ValueError:
            return f"offset or length of {location!r} is not a number"
        return external_problem(location, offset, length, size, folder)
    if tensor.HasField("raw_data") and len(tensor.raw_data) != size:
        return f"{len(tensor.raw_data)} bytes of data for {size}"
    return None


def packed_size(tensor: onnx.TensorProto) -> int:
    """Return how many bytes the data of a tensor takes as stored; 0 for text."""
    if tensor.data_type == onnx.TensorProto.STRING:
        return 0
    bits: int = math.prod(tensor.dims) * int(ir.DataType(tensor.data_type).bitwidth)
    return -(-bits // 8)


def external_problem(
    location: str, offset: int, length: int, size: int, folder: Path
) -> str | None:
    """Say why ``size`` bytes cannot be read from file ``location`` beside the model, or None."""
    try:
        root = folder.resolve()
        file = (folder / location).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # symlink loops, NUL characters
        return f"external location {location!r} cannot be followed: {error}"
    if not location or Path(location).is_absolute() or not file.is_relative_to(root):
        return f"external location {location!r} leaves the model's folder; put the file beside it"
    if not file.is_file():
        return f"external file {location!r} is missing; put it beside the model"
    if length not in (0, size):
        return f"external length {length} in {location!r}, but its shape needs {size} bytes"
    available = file.stat().st_size
    if offset < 0 or offset + size > available:
        return (
            f"external file {location!r} is too short: {available} bytes, needed are {size} "
            f"from {offset} on; it is cut off or belongs to another model"
        )
    return None


# --- nodes ---------------------------------------------------------------------------------------


def _node_problems(proto: onnx.ModelProto, versions: dict[str, int]) -> Iterator[str]:
    """Hold every node against the schema of its operator, where onnx knows one."""
    local = {(_domain(f.domain), f.name) for f in proto.functions}
    for graph in graphs(proto.graph):
        for node in graph.node:
            domain = _domain(node.domain)
            if (domain, node.op_type) in local:
                continue
            try:
                schema = onnx.defs.get_schema(node.op_type, versions[domain], domain)
            except onnx.defs.SchemaError:
                continue
            for problem in _schema_problems(node, schema):
                yield f"node {label(node)!r} ({node.op_type}): {problem}"


def _schema_problems(node: onnx.NodeProto, schema: onnx.defs.OpSchema) -> Iterator[str]:
    if not schema.min_input <= len(node.input) <= schema.max_input:
        yield f"has {len(node.input)} inputs, expected {schema.min_input} to {schema.max_input}"
    if not schema.min_output <= len(node.output) <= schema.max_output:
        yield f"has {len(node.output)} outputs, expected {schema.min_output} to {schema.max_output}"
    for index, parameter in enumerate(schema.inputs[: schema.min_input]):
        required = parameter.option != onnx.defs.OpSchema.FormalParameterOption.Optional
        if required and index < len(node.input) and not node.input[index]:
            yield f"leaves out its input {parameter.name!r}"
    given = {attribute.name: attribute for attribute in node.attribute}
    for name, attribute in given.items():
        known = schema.attributes.get(name)
        kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
        if attribute.ref_attr_name:
            yield f"attribute {name!r} refers to one of a function, outside of any function"
        elif known is None:
            yield f"has no attribute {name!r}"
        elif kind != (expected := str(known.type).rpartition(".")[2]):
            yield f"attribute {name!r} is of type {kind}, expected {expected}"
    for name, known in schema.attributes.items():
        if known.required and name not in given:
            yield f"lacks its attribute {name!r}"


def _names(graph: onnx.GraphProto) -> Iterator[object]:
    """Yield all names; protobuf hands over as bytes what is not UTF-8."""
    for named in (*graph.input, *graph.output, *graph.initializer):
        yield named.name
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


# --- names ---------------------------------------------------------------------------------------


def _check_names(graph: onnx.GraphProto, where: str, outer: frozenset[str]) -> set[str]:
    """Refuse values that are made twice, or used before (or without) being made.

    A subgraph may make a value of a name that the graph around it also has, and means its own
    from there on; it may not do so after it has read the outer one.

    Returns:
        The names that ``graph`` reads from the graphs around it.
    """
    initializers = Counter(t.name for t in graph.initializer)
    declared = Counter(v.name for v in graph.input)
    twice = [name for counts in (initializers, declared) for name, n in counts.items() if n > 1]
    if twice:
        raise ModelError(f"{where}: initialisers or graph inputs {twice} appear twice")
    own = {*initializers, *declared}
    captured: set[str] = set()
    for node in graph.node:
        reads = {name for name in node.input if name}
        for inner in subgraphs(node):
            reads |= _check_names(inner, where, outer | own)
        captured |= reads - own
        missing = sorted(captured - outer)
        if missing:
            raise ModelError(
                f"{where}: node {label(node)!r} reads {missing}, which nothing before it produces"
            )
        made = Counter(name for name in node.output if name)
        again = [name for name, n in made.items() if n > 1 or name in own or name in captured]
        if again:
            raise ModelError(
                f"{where}: node {label(node)!r} produces {again}, which already exists"
            )
        own.update(made)
    captured |= {v.name for v in graph.output} - own
    if missing := sorted(captured - outer):
        raise ModelError(f"{where}: graph outputs {missing} are produced by no node")
    return captured
