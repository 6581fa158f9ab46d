"""What makes a file unfit before anything is built from it, all of it said at once and clearly."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from qwrap.errors import ModelError
from qwrap.graph.names import Names
from qwrap.graph.nodes import bodies_of, domain_of, graphs, label, nodes_of
from qwrap.graph.sparse import sparse_problem
from qwrap.graph.texts import texts

Also = Callable[[onnx.ModelProto], Iterable[str]]


def check_proto(
    proto: onnx.ModelProto, where: str, folder: Path | None, also: Also | None = None
) -> None:
    """Refuse a model that cannot be understood, or that would be misunderstood.

    Args:
        proto: the model as read.
        where: what messages call it.
        folder: where its external data must lie. None: it has none, or it was checked before.
        also: finds what else is wrong with a model that is refused, for the same message.

    Raises:
        ModelError: see ``read_model``; it lists all problems.
    """
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{where}: not an ONNX model: it has no graph or imports no opset")
    if unreadable := [text for text in texts(proto) if type(text) is bytes]:
        raise ModelError(f"{where}: text that is not UTF-8: {unreadable}")
    names = Names()
    names.graph(proto.graph)
    for function in proto.functions:
        names.function(function, f"function {function.name!r}")
    problems = [
        *_opset_problems(proto),
        *_tensor_problems(proto, folder),
        *_node_problems(proto),
        *_function_problems(proto),
        *_type_problems(proto.graph),
        *names.problems,
    ]
    if problems:
        refuse(where, [*problems, *(also(proto) if also else ())])


def refuse(where: str, problems: Iterable[str]) -> None:
    """Raise one error for all ``problems``.

    Raises:
        ModelError: always.
    """
    raise ModelError(f"{where}: {'; '.join(dict.fromkeys(problems))}")


# --- opsets --------------------------------------------------------------------------------------


def opsets_of(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    """Return domain -> imported version; that of ai.onnx is the empty one."""
    return {domain_of(entry.domain): entry.version for entry in imports}


def _opset_problems(proto: onnx.ModelProto) -> Iterator[str]:
    newest = onnx.defs.onnx_opset_version()
    scopes = [("", opsets_of(proto.opset_import), [g.node for g in graphs(proto.graph)])]
    scopes += [
        (f"function {f.name!r}: ", opsets_of(f.opset_import), [*nodes_of(f)])
        for f in proto.functions
    ]
    for where, versions, bodies in scopes:
        if not 1 <= versions.get("", 1) <= newest:
            yield (
                f"{where}imports ai.onnx opset {versions['']}; the installed onnx "
                f"{onnx.__version__} knows 1 to {newest}; upgrade onnx or export at an older opset"
            )
        used = {domain_of(node.domain): node for nodes in bodies for node in reversed(nodes)}
        for domain in sorted(set(used) - set(versions)):
            yield (
                f"{where}node {label(used[domain])!r} is of domain {domain or 'ai.onnx'!r}, of "
                "which the model imports no opset; add it to opset_import"
            )


# --- tensors and types ---------------------------------------------------------------------------


def _tensor_problems(proto: onnx.ModelProto, folder: Path | None) -> Iterator[str]:
    for graph in graphs(proto.graph):
        for tensor in graph.initializer:
            if problem := _tensor_problem(tensor, folder):
                yield f"initialiser {tensor.name!r}: {problem}"
        for sparse in graph.sparse_initializer:
            if problem := sparse_problem(sparse):
                yield f"sparse initialiser {sparse.values.name!r}: {problem}"
    for nodes in bodies_of(proto):
        for node in nodes:
            for attribute in node.attribute:
                for problem in _attribute_problems(node, attribute, folder):
                    yield f"node {label(node)!r}: {problem}"


def _attribute_problems(
    node: onnx.NodeProto, attribute: onnx.AttributeProto, folder: Path | None
) -> Iterator[str]:
    one = [attribute.t] if attribute.HasField("t") else []
    for tensor in (*one, *attribute.tensors):
        if problem := _tensor_problem(tensor, folder):
            yield f"tensor {tensor.name!r}: {problem}"
    if not attribute.HasField("sparse_tensor") and not attribute.sparse_tensors:
        return
    if node.op_type != "Constant" or domain_of(node.domain) or attribute.sparse_tensors:
        yield f"attribute {attribute.name!r} holds a sparse tensor; make it dense first"
    elif problem := sparse_problem(attribute.sparse_tensor):
        yield f"attribute {attribute.name!r}: {problem}"


def _type_problems(graph: onnx.GraphProto) -> Iterator[str]:
    for role, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            if kind := _refused_kind(value.type):
                yield (
                    f"graph {role} {value.name!r} holds a {kind}; tensors can cross there, and "
                    "sequences and optionals of them"
                )


def _refused_kind(type_: onnx.TypeProto) -> str | None:
    kind = type_.WhichOneof("value")
    if kind in ("sequence_type", "optional_type"):
        return _refused_kind(getattr(type_, kind).elem_type)
    refused = ("sparse_tensor_type", "map_type", "opaque_type")
    return kind.removesuffix("_type").replace("_", " ") if kind in refused else None


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


def _node_problems(proto: onnx.ModelProto) -> Iterator[str]:
    """Hold every node against the schema of its operator, where onnx knows one."""
    local = {(domain_of(f.domain), f.name): f for f in proto.functions}
    versions = opsets_of(proto.opset_import)
    for graph in graphs(proto.graph):
        for node in graph.node:
            for problem in _held_against_schema(node, versions, local, frozenset()):
                yield f"node {label(node)!r} ({node.op_type}): {problem}"


def _function_problems(proto: onnx.ModelProto) -> Iterator[str]:
    """Do the same in the bodies of functions, whose attributes may be those of the call."""
    local = {(domain_of(f.domain), f.name): f for f in proto.functions}
    counts = Counter((f.domain, f.name, f.overload) for f in proto.functions)
    for (_, name, _), count in counts.items():
        if count > 1:
            yield f"function {name!r} is defined {count} times"
    for f in proto.functions:
        known = frozenset((*f.attribute, *(a.name for a in f.attribute_proto)))
        versions = opsets_of(f.opset_import)
        for nodes in nodes_of(f):
            for node in nodes:
                for problem in _held_against_schema(node, versions, local, known):
                    yield f"function {f.name!r}: node {label(node)!r} ({node.op_type}): {problem}"


def _held_against_schema(
    node: onnx.NodeProto,
    versions: Mapping[str, int],
    local: Mapping[tuple[str, str], onnx.FunctionProto],
    referable: frozenset[str],
) -> Iterator[str]:
    twice = [name for name, n in Counter(a.name for a in node.attribute).items() if n > 1]
    if twice:
        yield f"has attributes {twice} twice"
    for attribute in node.attribute:
        if attribute.ref_attr_name and attribute.ref_attr_name not in referable:
            yield (
                f"attribute {attribute.name!r} refers to {attribute.ref_attr_name!r}, which no "
                "function around it has"
            )
        elif problem := _contradiction(attribute):
            yield f"attribute {attribute.name!r} {problem}"
    domain = domain_of(node.domain)
    version = versions.get(domain, 0)
    if (domain, node.op_type) in local:
        yield from _call_problems(node, local[domain, node.op_type])
        return
    if version < 1:
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, version, domain)
    except onnx.defs.SchemaError:
        if not domain and onnx.defs.has(node.op_type) and node.op_type not in EARLIER:
            yield f"is not in opset {version}"
        return
    yield from _schema_problems(node, schema)


def _call_problems(node: onnx.NodeProto, function: onnx.FunctionProto) -> Iterator[str]:
    """Hold a call against the function of the model that it calls."""
    if len(node.input) > len(function.input):
        yield f"has {len(node.input)} inputs, its function {len(function.input)}"
    if len(node.output) > len(function.output):
        yield f"has {len(node.output)} outputs, its function {len(function.output)}"


EARLIER = ("LayerNormalization",)
"""What onnxruntime's optimizers write in opsets that do not have it yet."""

FIELDS = {
    onnx.AttributeProto.FLOAT: "f",
    onnx.AttributeProto.INT: "i",
    onnx.AttributeProto.STRING: "s",
    onnx.AttributeProto.TENSOR: "t",
    onnx.AttributeProto.GRAPH: "g",
    onnx.AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    onnx.AttributeProto.TYPE_PROTO: "tp",
}
LISTS = ("floats", "ints", "strings", "tensors", "graphs", "sparse_tensors", "type_protos")


def _contradiction(attribute: onnx.AttributeProto) -> str | None:
    """Say why an attribute is not what its type says. None of a list may be empty, so may it."""
    kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
    own = FIELDS.get(attribute.type, kind.lower())
    held = [name for name in FIELDS.values() if attribute.HasField(name)]
    held += [name for name in LISTS if getattr(attribute, name)]
    if wrong := [name for name in held if name != own]:
        return f"is of type {kind}, but holds {wrong}"
    by_default = attribute.type in (1, 2, 3)  # a zero or empty text need not be written
    if (
        own in FIELDS.values()
        and own not in held
        and not by_default
        and not attribute.ref_attr_name
    ):
        return f"is of type {kind}, but holds none"
    return None


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
        if known is None:
            yield f"has no attribute {name!r}"
        elif kind != (expected := str(known.type).rpartition(".")[2]):
            yield f"attribute {name!r} is of type {kind}, expected {expected}"
    for name, known in schema.attributes.items():
        if known.required and name not in given:
            yield f"lacks its attribute {name!r}"
    parts = given.get("num_outputs")
    if node.op_type == "Split" and parts is not None and parts.i != len(node.output):
        yield f"num_outputs={parts.i}, but it has {len(node.output)} outputs"
    yield from _body_problems(node)
    if node.op_type == "Constant" and domain_of(node.domain) == "" and len(given) != 1:
        yield f"has {len(given)} attributes, expected exactly one"


def _body_problems(node: onnx.NodeProto) -> Iterator[str]:
    """Hold the bodies of control flow against the inputs and outputs of their node."""
    if domain_of(node.domain):
        return
    for attribute in node.attribute:
        gives, takes = len(attribute.g.output), len(attribute.g.input)
        if node.op_type == "If" and (gives != len(node.output) or takes):
            yield (
                f"{attribute.name} has {takes} inputs and {gives} outputs, expected 0 and "
                f"{len(node.output)}"
            )
        elif node.op_type == "Loop" and attribute.name == "body":
            if gives - 1 < len(node.output) or takes != len(node.input) or gives < takes - 1:
                yield (
                    f"its body has {takes} inputs and {gives} outputs, the node {len(node.input)} "
                    f"inputs and {len(node.output)} outputs"
                )
        elif node.op_type == "Scan" and attribute.name == "body" and gives < len(node.output):
            yield f"its body has {gives} outputs, the node {len(node.output)}"
