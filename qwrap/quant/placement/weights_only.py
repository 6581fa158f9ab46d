"""Weights quantized alone: the file shrinks, and everything computes in float."""

from __future__ import annotations

import onnx_ir as ir

from qwrap.graph.index import OnnxGraph
from qwrap.graph.nodes import STANDARD
from qwrap.model.attributes import attributes_of
from qwrap.ops.traits import WEIGHTED
from qwrap.quant.placement.eligibility import Eligibility
from qwrap.quant.placement.outer import EIGHT_BITS, outer_of
from qwrap.quant.placement.specs import Specs
from qwrap.quant.plan import ConstantPlan, NodePlan, QuantPlan, TensorPlan

UNNAMED = "its weight was not named"
NO_WEIGHT = "has no weight to quantize"
COMPUTED = "its weight is computed at run time"
NO_FLOATS = "its weight is not floating point"
TOO_SMALL = "codes and scales would take as much space as its weight"
NOTE = "weights alone: DequantizeLinear makes floats of them, and all else computes as before"
# Measured: 8, 4 and 2 bits, per column or in blocks of 16 and more.
ROUNDED = (
    "onnxruntime runs a MatMul, or Gemm, behind such a weight as MatMulNBits, which rounds "
    "activations to 8 bits unless the session option session.qdq_matmulnbits_accuracy_level is 1"
)


def place_weights(facts: Eligibility, specs: Specs) -> QuantPlan:
    """Return the plan that quantizes the weights and tables of a graph, and no activation.

    Whether it is faster is not asked: it is done for size.
    """
    plan = QuantPlan(notes=[NOTE])
    if specs.config.first_last_8bit:
        layers = [node for node in facts.nodes if _has_weight(facts, node)]
        specs.wide_layers |= outer_of(facts, layers).layers
    for node in facts.nodes:
        plan.nodes[facts.graph.node_key(node)] = place_weight(plan, facts, specs, node)
    warn_of_rounding(plan, facts.graph)
    return plan


def warn_of_rounding(plan: QuantPlan, graph: OnnxGraph) -> None:
    """Add a note, in place, where onnxruntime rounds what it multiplies with quantized weights."""
    alone = [graph.nodes[key] for key, planned in plan.nodes.items() if planned.role == "weights"]
    if any(map(is_product, alone)):
        plan.notes.append(ROUNDED)


def is_product(node: ir.Node) -> bool:
    """Whether onnxruntime makes a MatMulNBits of ``node`` and a quantized weight."""
    if node.op_type == "Gemm":
        return not attributes_of(node).get("transB", 0)
    return node.op_type == "MatMul"


def place_weight(plan: QuantPlan, facts: Eligibility, specs: Specs, node: ir.Node) -> NodePlan:
    """Quantize the weight or table of a node whose activations are float; return how it runs."""
    key = facts.graph.node_key(node)
    if key in facts.barred:
        return NodePlan(node.op_type, "float", facts.barred[key])
    if specs.config.scope == "named" and not any(v in specs.named for v in node.inputs):
        return NodePlan(node.op_type, "float", UNNAMED)
    if specs.types.keeps_weight(node):
        return NodePlan(node.op_type, "float", "float32 was asked for its weight")
    if facts.is_lookup(node):
        return _place_table(plan, facts, specs, node)
    if node.op_type not in WEIGHTED or node.domain not in STANDARD:
        return NodePlan(node.op_type, "float", NO_WEIGHT)
    index = WEIGHTED[node.op_type].weight
    weight = node.inputs[index]
    if weight is None or not facts.is_stored(weight):
        return NodePlan(node.op_type, "float", COMPUTED)
    if not facts.is_real(weight):
        return NodePlan(node.op_type, "float", NO_FLOATS)
    spec = specs.weight(node)
    if not specs.is_worth_it(weight, spec):
        return NodePlan(node.op_type, "float", TOO_SMALL)
    plan.constants[key, index] = ConstantPlan(value=facts.graph.key(weight), spec=spec)
    return NodePlan(node.op_type, "weights")


def _has_weight(facts: Eligibility, node: ir.Node) -> bool:
    if node.op_type not in WEIGHTED or node.domain not in STANDARD:
        return False
    if facts.graph.node_key(node) in facts.barred:
        return False
    weight = node.inputs[WEIGHTED[node.op_type].weight]
    return weight is not None and facts.is_stored(weight) and facts.is_real(weight)


def _place_table(plan: QuantPlan, facts: Eligibility, specs: Specs, node: ir.Node) -> NodePlan:
    """Quantize a table, and what is fetched from it where that lets its codes be fetched.

    A pair of the table's one scale behind the node changes nothing, and onnxruntime then moves
    codes. Fewer bits want a scale for each row, or block of a row.
    """
    key, table = facts.graph.node_key(node), node.inputs[0]
    assert table is not None
    spec = specs.table(node)
    plan.constants[key, 0] = ConstantPlan(value=facts.graph.key(table), spec=spec)
    if spec.dtype.is_integer and spec.dtype.bits == EIGHT_BITS and spec.axis is None:
        output = facts.graph.key(node.outputs[0])
        if output in plan.tensors:  # in the type of what reads it
            return NodePlan(node.op_type, "weights")
        plan.tensors[output] = TensorPlan(spec=spec, source=output, table=(key, 0))
        return NodePlan(node.op_type, "moves")
    return NodePlan(node.op_type, "weights")
