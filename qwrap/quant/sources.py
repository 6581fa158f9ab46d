"""Which scale a value has: its own, or that of the tensor it was moved from."""

from __future__ import annotations

from collections import defaultdict

import onnx_ir as ir

from qwrap.graph.index import OnnxGraph
from qwrap.quant.plan import QuantPlan


def source_of(plan: QuantPlan, graph: OnnxGraph, value: ir.Value) -> str | None:
    """Return the key of the tensor whose scale ``value`` has, None if it is not quantized."""
    tensor = plan.tensors.get(graph.key(value))
    return None if tensor is None else tensor.source


def written_by(plan: QuantPlan, graph: OnnxGraph, node: ir.Node) -> ir.Value:
    """Return the value that a node's kernel writes: behind an absorbed activation."""
    value = node.outputs[0]
    for user in value.consumers():
        planned = plan.nodes.get(graph.node_key(user))
        if planned is not None and planned.role == "absorbed":
            return user.outputs[0]
    return value


def integer_users(plan: QuantPlan, graph: OnnxGraph) -> dict[str, set[str]]:
    """Return for every source tensor the integer nodes that read or write its codes."""
    users: dict[str, set[str]] = defaultdict(set)
    for key, planned in plan.nodes.items():
        if planned.role in ("integer", "pairs"):
            node = graph.nodes[key]
            inputs = [(i, v) for i, v in enumerate(node.inputs) if v is not None]
            read = [plan.read_by(key, i, graph.key(v)) for i, v in inputs]
            for source in (*read, source_of(plan, graph, written_by(plan, graph, node))):
                if source is not None:
                    users[source].add(key)
    return users
