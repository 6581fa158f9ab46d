"""What exporters write in several nodes and torch computes in one call.

A plain float model then reads and writes its activations as often as the network it came from.
Where anything taps or replaces nodes, every node runs by itself: quantization sees the graph as it
is. So do nodes whose inner values are watched. Both ways agree to float rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache

import onnx_ir as ir
import torch.nn.functional as F
from torch import Tensor

from qwrap.graph.nodes import STANDARD
from qwrap.model.layout import Layout
from qwrap.model.points import Program
from qwrap.model.scopes import Region


@dataclass(frozen=True, slots=True)
class Fusion:
    """Nodes that run as one call.

    Attributes:
        nodes: in any order but for the first, which makes the result.
        function: computes it.
        inputs: what the function takes.
    """

    nodes: tuple[ir.Node, ...]
    function: Callable[..., Tensor]
    inputs: tuple[ir.Value, ...]

    def hidden(self, layout: Layout) -> set[str]:
        """Return the values that nothing but these nodes would see."""
        return {layout.graph.key(v) for node in self.nodes[1:] for v in node.outputs}


Item = ir.Node | Region | Fusion
Readers = Callable[[ir.Value], frozenset[ir.Node]]


def silu(x: Tensor) -> Tensor:
    """Return ``x * sigmoid(x)``."""
    return F.silu(x)


def gelu(x: Tensor) -> Tensor:
    """Return ``x * (1 + erf(x / sqrt(2))) / 2``."""
    return F.gelu(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``x @ weight + bias``."""
    return F.linear(x, weight.t(), bias)


def with_fusions(
    region: Region, layout: Layout, program: Program, replaced: Collection[str] = ()
) -> list[Item]:
    """Return the items of a region, with a ``Fusion`` where its last node was if nothing looks.

    Nodes with keys in ``replaced`` are computed by something else and stay apart.
    """
    if program.taps or program.kernels:
        return list(region.items)
    own = {item for item in region.items if isinstance(item, ir.Node)}
    readers = cache(_readers)  # the same value, with all its readers, comes up at each of them
    result: list[Item] = []
    for item in region.items:
        found = _find(item, layout, readers) if isinstance(item, ir.Node) else None
        result.append(item)
        watched = found is not None and not program.watchers.keys().isdisjoint(found.hidden(layout))
        apart = found is not None and any(layout.graph.node_key(n) in replaced for n in found.nodes)
        if found is not None and not (watched or apart) and own.issuperset(found.nodes):
            own.difference_update(found.nodes)
            result[-1] = found
    return [item for item in result if not isinstance(item, ir.Node) or item in own]


def _find(last: ir.Node, layout: Layout, readers: Readers) -> Fusion | None:
    if last.attributes or last.domain not in STANDARD:  # the attributes of opset 6 broadcast
        return None
    for match in MATCHES.get(last.op_type, ()):
        found = match(last, layout)
        if found is not None and _is_closed(found, layout, readers):
            return found
    return None


def _readers(value: ir.Value) -> frozenset[ir.Node]:
    return frozenset(value.consumers())


def _is_closed(fusion: Fusion, layout: Layout, readers: Readers) -> bool:
    """Whether nothing else reads what the inner nodes make, and all of them run on tensors."""
    for node in fusion.nodes:
        if layout.graph.node_key(node) not in layout.values.operators:
            return False
    return all(
        not value.is_graph_output() and readers(value) <= set(fusion.nodes)
        for node in fusion.nodes[1:]
        for value in node.outputs
    )


def _orders(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Yield the two inputs of a commutative node in both orders."""
    a, b = node.inputs
    if a is not None and b is not None:
        yield a, b
        yield b, a


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    is_it = node is not None and node.op_type == op_type and node.domain in STANDARD
    return node if is_it else None


def _beside(node: ir.Node | None, number: float, layout: Layout) -> ir.Value | None:
    """Return the input of a commutative node whose other input is the constant ``number``."""
    for value, other in () if node is None else _orders(node):
        if _is_number(other, number, layout):
            return value
    return None


def _is_number(value: ir.Value | None, number: float, layout: Layout) -> bool:
    """Whether a value is a constant of rank 0 that is not trained, near ``number``."""
    array = None if value is None else layout.values.small_constant(value)
    if value is None or array is None or array.ndim:
        return False
    slot = layout.slots.get(layout.graph.key(value))
    is_trained = slot is not None and slot.trainable
    return not is_trained and math.isclose(array, number, rel_tol=1e-6)


def _silu(last: ir.Node, _: Layout) -> Fusion | None:
    for x, gate in _orders(last):
        sigmoid = _made_by(gate, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x:
            return Fusion((last, sigmoid), silu, (x,))
    return None


def _gelu(last: ir.Node, layout: Layout) -> Fusion | None:
    """Match ``(x * (erf(x / sqrt(2)) + 1)) * 0.5``, as torch writes it."""
    product = _made_by(_beside(last, 0.5, layout), "Mul")
    for x, total in () if product is None else _orders(product):
        add = _made_by(total, "Add")
        erf = _made_by(_beside(add, 1.0, layout), "Erf")
        div = None if erf is None else _made_by(erf.inputs[0], "Div")
        if product is None or add is None or erf is None or div is None:
            continue
        if div.inputs[0] is x and _is_number(div.inputs[1], math.sqrt(2), layout):
            return Fusion((last, product, add, erf, div), gelu, (x,))
    return None


def _linear(last: ir.Node, layout: Layout) -> Fusion | None:
    """Match a product with a stored matrix plus a stored vector of its width."""
    for product, bias in _orders(last):
        matmul = _made_by(product, "MatMul")
        x, weight = (None, None) if matmul is None else matmul.inputs
        if matmul is None or x is None or weight is None:
            continue
        matrix, vector = _stored_shape(weight, layout), _stored_shape(bias, layout)
        if len(matrix) == 2 and vector == matrix[1:]:
            return Fusion((last, matmul), linear, (x, weight, bias))
    return None


def _stored_shape(value: ir.Value, layout: Layout) -> tuple[int, ...]:
    """Return the shape of a float initialiser, () if the value is none."""
    tensor = layout.values.stored.get(layout.graph.key(value))
    if tensor is None or not tensor.dtype.is_floating_point():
        return ()
    return tuple(tensor.shape.numpy())


MATCHES: dict[str, tuple[Callable[[ir.Node, Layout], Fusion | None], ...]] = {
    "Add": (_linear,),
    "Mul": (_silu, _gelu),
}
