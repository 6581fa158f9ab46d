"""Operators that nothing computes, or not so, of a model that cannot even be built."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from qwrap.graph.check import opsets_of
from qwrap.graph.nodes import domain_of, graphs, label
from qwrap.model.attributes import complaints_of
from qwrap.model.host import HOST_OPERATORS
from qwrap.model.values import COUNTS, FLOW, explain
from qwrap.ops import Operator, find

BUILT_IN = frozenset((*FLOW, *COUNTS, *HOST_OPERATORS, "Constant", "Shape"))


def missing_operators(proto: onnx.ModelProto, has_libraries: bool = False) -> Iterator[str]:
    """Yield a line for each node with an operator that surely nothing computes.

    The model it is asked about is broken, so that onnxruntime cannot be asked for kernels: it may
    have one for what onnx has a schema of, for its own domains, and with libraries for any other.
    """
    versions = opsets_of(proto.opset_import)
    local = {(domain_of(f.domain), f.name) for f in proto.functions}
    for graph in graphs(proto.graph):
        for node in graph.node:
            domain = domain_of(node.domain)
            built_in = not domain and node.op_type in BUILT_IN
            version = versions.get(domain, 0)
            if built_in or version < 1 or (domain, node.op_type) in local:
                continue
            perhaps = domain.startswith("com.microsoft") or (domain and has_libraries)
            if perhaps or _has_schema(node, domain, version):
                continue
            if find(domain, node.op_type, version) is None:
                yield explain(label(node), domain, node.op_type, version)


def unfit_nodes(proto: onnx.ModelProto, has_libraries: bool = False) -> Iterator[str]:
    """Yield the lines of ``missing_operators``, and one for each attribute that cannot be followed.

    For a model that cannot be built; of one that can, ``refused_nodes`` says the latter.
    """
    yield from missing_operators(proto, has_libraries)
    versions = opsets_of(proto.opset_import)
    local = {(domain_of(f.domain), f.name) for f in proto.functions}
    for graph in graphs(proto.graph):
        for node in graph.node:
            domain = domain_of(node.domain)
            operator = find(domain, node.op_type, versions.get(domain, 0))
            if operator is not None and (domain, node.op_type) not in local:
                yield from _complaints(node, operator)


def _complaints(node: onnx.NodeProto, operator: Operator) -> Iterator[str]:
    """Say what an operator cannot follow of the attributes of a node."""
    if any(a.ref_attr_name or a.HasField("g") or a.graphs for a in node.attribute):
        return
    alone = onnx.NodeProto(op_type=node.op_type, domain=node.domain, attribute=node.attribute)
    try:
        complaints = complaints_of(ir.serde.deserialize_node(alone), operator)
    except (ir.serde.SerdeError, ValueError, TypeError):
        return  # an attribute of another type than the schema's, which others say
    for complaint in complaints:
        yield f"node {label(node)!r} ({node.op_type}): {complaint}"


def _has_schema(node: onnx.NodeProto, domain: str, version: int) -> bool:
    try:
        onnx.defs.get_schema(node.op_type, version, domain)
    except onnx.defs.SchemaError:
        return False
    return True
