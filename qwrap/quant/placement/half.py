"""Which nodes compute in half precision, and which of their tensors are of float16."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from qwrap.graph.constants import Array
from qwrap.graph.index import ValueType, bodies, opset_of
from qwrap.graph.nodes import domain_of
from qwrap.model.layout import Layout
from qwrap.ops.traits import QUANTIZED
from qwrap.quant.placement.regions import Types
from qwrap.quant.placement.schemas import Signature, signature_of
from qwrap.quant.plan import HalfPlan, QuantPlan

HALF = "tensor(float16)"
LARGEST = float(np.finfo(np.float16).max)
LOST = 0.01  # of the magnitude of a constant; rounding to normal numbers takes 0.0003 of it
MEASURES = ("Shape", "Size")


def place_half(
    plan: QuantPlan, layout: Layout, types: Types, without: Collection[str] = ()
) -> None:
    """Let the nodes that are to compute in float16 do so where they can, in ``plan``, in place.

    Those in ``without`` stay as they are.
    """
    nodes = {layout.graph.node_key(node): node for node in types.in_half()}
    nodes = {key: node for key, node in nodes.items() if key in plan.nodes and key not in without}
    if not nodes:
        return
    found = _Halves(layout, plan)
    for key, node in nodes.items():
        reason = found.reason(node)
        if reason is None:
            plan.half[key] = found.tensors(node)
            plan.nodes[key] = plan.nodes[key].in_half()
        elif plan.nodes[key].role == "float":
            plan.drop({key: reason})
        else:
            plan.notes.append(f"{key}: {reason}")


class _Halves:
    def __init__(self, layout: Layout, plan: QuantPlan) -> None:
        self.layout, self.graph, self.plan = layout, layout.graph, plan
        self._measured = self._of_shapes_alone()
        self._problems: dict[str, str | None] = {}

    def reason(self, node: ir.Node) -> str | None:
        """Return why a node does not compute in float16, None if it can."""
        if not self._has_floats(node):
            return "nothing of it is float32"
        obstacle = self._obstacle(node)
        if obstacle is None and self.tensors(node) == HalfPlan():
            obstacle = f"{node.op_type} has no float16 at opset {self._opset_of(node)}"
        return None if obstacle is None else f"not in float16: {obstacle}"

    def _has_floats(self, node: ir.Node) -> bool:
        """Whether float32 goes into or comes out of a node."""
        values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.name]
        return any(self._type(v).dtype == ir.DataType.FLOAT for v in values)

    def _opset_of(self, node: ir.Node) -> int:
        return opset_of(self.graph.model, node.domain)

    def _obstacle(self, node: ir.Node) -> str | None:
        if any(True for _ in bodies(node)):
            return "it runs other nodes"
        if self._signature(node) is None:
            return f"no schema says which types {node.op_type} of {node.domain!r} takes"
        if QUANTIZED.fullmatch(node.op_type):
            return "it is quantized already"
        if node in self._measured:
            return "it computes with shapes"
        values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.name]
        unknown = [v.name for v in values if self._type(v).dtype is None]
        if unknown:
            return f"the type of {unknown[0]!r} is not known"
        if any(self._type(v).kind != "tensor" for v in values):
            return "it reads or makes a sequence"
        return self._constant_obstacle(node)

    def tensors(self, node: ir.Node) -> HalfPlan:
        """Return the inputs and outputs of a node that the types of its operator let be float16.

        An output is what the inputs of the same type variable are; one whose type an attribute
        says stays, but for that of Cast.
        """
        signature = self._signature(node)
        if signature is None:
            return HalfPlan()
        able = {name for name, types in signature.allowed.items() if HALF in types}
        inputs = {
            i: _formal(signature.inputs, i)
            for i, v in enumerate(node.inputs)
            if v is not None and self._is_float(v)
        }
        read = {i: name for i, name in inputs.items() if name in able}
        outputs = {
            i: _formal(signature.outputs, i)
            for i, v in enumerate(node.outputs)
            if v.name and self._is_float(v)
        }
        cast = node.op_type == "Cast" and not domain_of(node.domain)
        made = [i for i, name in outputs.items() if cast or name in read.values()]
        return HalfPlan(inputs=tuple(read), outputs=tuple(made))

    def _type(self, value: ir.Value) -> ValueType:
        return self.graph.type_of(value)

    def _is_float(self, value: ir.Value) -> bool:
        kind = self._type(value)
        return kind.dtype == ir.DataType.FLOAT and kind.kind == "tensor"

    def _signature(self, node: ir.Node) -> Signature | None:
        functions = self.graph.model.functions.values()
        if any((f.domain, f.name) == (node.domain, node.op_type) for f in functions):
            return None
        return signature_of(domain_of(node.domain), node.op_type, self._opset_of(node))

    # --- what float16 would spoil ----------------------------------------------------------------

    def _of_shapes_alone(self) -> set[ir.Node]:
        """Return the nodes that compute with nothing but shapes: float16 counts up to 2048."""
        found: set[ir.Node] = set()
        for node, _ in self.layout.placed():
            inputs = [v for v in node.inputs if v is not None and not self._is_constant(v)]
            makers = [v.producer() for v in inputs]
            if node.op_type in MEASURES or (makers and all(maker in found for maker in makers)):
                found.add(node)
        return {node for node in found if node.op_type not in MEASURES}

    def _is_constant(self, value: ir.Value) -> bool:
        return not self.layout.values.is_computed(value) or value.is_initializer()

    def _constant_obstacle(self, node: ir.Node) -> str | None:
        key = self.graph.node_key(node)
        for index in self.tensors(node).inputs:
            value = node.inputs[index]
            assert value is not None
            if (key, index) in self.plan.constants:
                continue
            tensor = self.layout.values.stored.get(self.graph.key(value))
            if tensor is None:
                continue
            name = self.graph.key(value)
            if name not in self._problems:
                self._problems[name] = problem_of(tensor.numpy())
            if self._problems[name] is not None:
                return f"constant {name!r} {self._problems[name]}"
        return None


def problem_of(array: Array) -> str | None:
    """Say what float16 would make of a constant that it cannot hold, None if it can.

    Few small weights may become 0 beside larger ones. Where that takes much of the magnitude of
    all, as of an epsilon of 1e-12, the constant is lost.
    """
    finite = array[np.isfinite(array)].astype(np.float64)
    with np.errstate(over="ignore"):
        half = finite.astype(np.float16).astype(np.float64)
    if np.isinf(half).any():
        return f"has values up to {np.abs(finite).max():.3g}, and float16 ends at {LARGEST:g}"
    size, lost = np.linalg.norm(finite), np.linalg.norm(finite - half)
    if lost > LOST * size:
        least = np.abs(finite[finite != 0]).max()
        return f"is too small for float16: {lost / size:.0%} of it is lost (at most {least:.3g})"
    return None


def _formal(names: Sequence[str], index: int) -> str:
    """Return the type variable, or the type, of an input or output."""
    return names[min(index, len(names) - 1)] if names else ""
