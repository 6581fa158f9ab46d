"""Nodes with attributes that no operator can follow, found before anything is inferred of them."""

from __future__ import annotations

import itertools

import onnx_ir as ir

from qwrap.graph.index import opset_of, walk_nodes
from qwrap.graph.nodes import domain_of
from qwrap.model.attributes import complaints_of
from qwrap.ops import find


def refused_nodes(model: ir.Model) -> dict[ir.Node, str]:
    """Return what is wrong with each node whose attributes cannot be what they are.

    Nodes of the functions of the model are looked at too, but for those with an attribute of the
    call, whose value is not known before the call is expanded.
    """
    bodies = (walk_nodes(function.graph) for function in model.functions.values())
    refused = {}
    for node in itertools.chain(walk_nodes(model.graph), *bodies):
        if node.op_identifier() in model.functions:
            continue
        domain = domain_of(node.domain)
        operator = find(domain, node.op_type, opset_of(model, domain))
        refers = any(attribute.is_ref() for attribute in node.attributes.values())
        if operator is not None and not refers and (complaints := complaints_of(node, operator)):
            name = node.name or f"{node.op_type}:{node.outputs[0].name if node.outputs else ''}"
            refused[node] = "; ".join(f"node {name!r} ({node.op_type}): {c}" for c in complaints)
    return refused
