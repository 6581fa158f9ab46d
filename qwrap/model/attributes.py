"""The attributes of nodes, as operators take them."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qwrap.model.expressions import keyword_names
from qwrap.model.tensors import to_torch
from qwrap.ops import Operator


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """Return the attributes of a node as Python values; tensors stay onnx_ir tensors."""
    return {
        name: attribute.value
        for name, attribute in node.attributes.items()
        if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    }


def tensors_to_torch(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes with tensors as torch tensors."""
    return {
        name: to_torch(value) if isinstance(value, ir.TensorProtocol) else value
        for name, value in attributes.items()
    }


def complaints_of(node: ir.Node, operator: Operator) -> list[str]:
    """Return what ``operator`` cannot follow of a node."""
    function = operator.prepare or operator.function
    unknown = set(operator.keywords(node.attributes)) - keyword_names(function)
    if unknown:
        return [f"attributes {sorted(unknown)} are not implemented"]
    return operator.refusals(attributes_of(node), node.inputs)
