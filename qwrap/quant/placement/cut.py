"""Which nodes are worth an integer kernel: a minimum cut over kernel and conversion costs."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import onnx_ir as ir

from qwrap.graph.index import ValueType
from qwrap.model.attributes import attributes_of
from qwrap.quant.placement.cost import (
    Shape,
    dequantize_cost,
    float_cost,
    integer_cost,
    integer_layout_cost,
    quantize_cost,
)
from qwrap.quant.placement.eligibility import Eligibility
from qwrap.quant.placement.mincut import NEVER, Network

JOINED = ("Add", "HardSigmoid", "LeakyRelu", "Sigmoid", "Tanh")
NOMINAL = 64  # size of a dimension that is known only at run time; the first counts as 1
MARGIN = 1.3  # an integer kernel costs accuracy, and the estimates are off by as much
SLACK = 1.2  # how much slower a whole network in integers may be than the fastest split


def worth_it(
    facts: Eligibility,
    candidates: Sequence[ir.Node],
    most: Collection[ir.Node],
    held: Collection[ir.Node] = (),
) -> list[ir.Node]:
    """Return those of ``candidates`` whose integer kernels make the whole graph fastest.

    Every candidate, and every node that only moves values, runs either way; a tensor that goes
    from a float producer to an integer consumer costs a QuantizeLinear, one that goes the other
    way a DequantizeLinear. The cheapest split is a minimum cut.

    Where that leaves weights float, and the split ``most``, with as much as possible in integers,
    is hardly slower, that one is taken: the file is smaller, and between its first and its last
    convolution nothing is rounded but in integer kernels, which can be simulated exactly.

    Args:
        facts: the graph.
        candidates: nodes that integer kernels can take.
        most: those of them that would be taken if time did not matter.
        held: those that are taken in any case.
    """
    cut = _Cut(facts, candidates, MARGIN, held=held)
    chosen = cut.network.source_side()
    fastest = [node for node in candidates if cut.numbers[node] in chosen]
    if not any(n.op_type in facts.target.matrix for n in set(most) - set(fastest)):
        return fastest
    whole = cost_of(facts, candidates, most)
    near = whole <= SLACK * cost_of(facts, candidates, fastest)
    return list(most) if near and MARGIN * whole <= cost_of(facts, candidates, ()) else fastest


def cost_of(
    facts: Eligibility, candidates: Sequence[ir.Node], integer: Collection[ir.Node]
) -> float:
    """Return the estimated nanoseconds of ``candidates`` with just ``integer`` in integers."""
    cut = _Cut(facts, candidates, margin=1.0, forced=integer)
    cut.network.source_side()
    return cut.network.cost


def time_in_float(facts: Eligibility) -> float:
    """Return the estimated nanoseconds of the whole graph in float."""
    nodes = [n for n in facts.nodes if any(facts.is_real(v) for v in n.outputs)]
    return sum(float_cost(*_sizes(facts, node)) for node in nodes)


def _sizes(
    facts: Eligibility, node: ir.Node
) -> tuple[str, list[Shape], Shape, Shape | None, int, int]:
    """Return what the cost of a node is estimated from, see ``float_cost``."""
    inputs = [nominal_shape(facts.graph.type_of(v)) for v in node.inputs if v is not None]
    output = nominal_shape(facts.graph.type_of(node.outputs[0]))
    weight = inputs[1] if node.op_type in facts.target.matrix else None
    attributes = attributes_of(node)
    group, window = attributes.get("group", 1), math.prod(attributes.get("kernel_shape", (9,)))
    return node.op_type, inputs, output, weight, group, window


class _Cut:
    def __init__(
        self,
        facts: Eligibility,
        candidates: Sequence[ir.Node],
        margin: float,
        forced: Collection[ir.Node] | None = None,
        held: Collection[ir.Node] = (),
    ) -> None:
        self.held = set(held)
        self.facts, self.graph = facts, facts.graph
        self.margin, self.forced, self.candidates = margin, forced, set(candidates)
        self.network = Network()
        self.numbers: dict[ir.Node, int] = {}
        for node in candidates:
            self.numbers[node] = self._add(node)
        for node in facts.nodes:
            producer = facts.absorbed_by(node)
            if producer in self.numbers and producer is not None:
                self.numbers[node] = self.numbers[producer]
            elif node not in self.numbers and facts.moved_input(node) is not None:
                self.numbers[node] = self._add(node)
        values = [v for node in facts.nodes for v in node.outputs if facts.is_real(v)]
        for value in (*self.graph.inputs, *values):
            self._connect(value)

    def _add(self, node: ir.Node) -> int:
        sizes = _sizes(self.facts, node)
        as_integer, as_float = integer_cost(*sizes) * self.margin, float_cost(*sizes)
        if node in self.held:
            as_float = NEVER
        if self.forced is not None and node in self.candidates:
            as_integer, as_float = (as_integer, NEVER) if node in self.forced else (NEVER, as_float)
        conv = self._joined_conv(node)
        if conv is None:
            return self.network.add_node(as_integer, as_float)
        number = self.network.add_node(as_integer, 0.0)
        self.network.add_edge(self.numbers[conv], number, as_float)
        return number

    def _joined_conv(self, node: ir.Node) -> ir.Node | None:
        """Return the Conv that onnxruntime fuses ``node`` into, if both are float."""
        if node.op_type not in JOINED:
            return None
        producers = [v.producer() for v in node.inputs if v is not None and len(v.uses()) == 1]
        convs = [p for p in producers if p is not None and p.op_type == "Conv"]
        return next((conv for conv in convs if conv in self.numbers), None)

    def _connect(self, value: ir.Value) -> None:
        """Add what conversions of ``value`` cost: at most one each way."""
        producer = value.producer()
        source = None if producer is None else self.numbers.get(producer)
        readers = [u for u in value.consumers() if u.op_type not in ("Shape", "Size")]
        absorbed = [self.facts.absorbed_by(u) is producer for u in readers]
        if producer is not None and any(absorbed):
            return  # the tensor never exists in integers
        users = {self.numbers[u] for u in readers if self._takes_codes(u, value)}
        shape = self._shape(value)
        elements = math.prod(shape)
        # Integer convolutions have the channels last; onnxruntime transposes at their borders.
        layout = integer_layout_cost(elements) if len(shape) > 3 else 0.0
        if users:
            self._quantize(source, users, quantize_cost(elements) + layout)
        if source is not None and producer is not None:
            all_integer = all(self._takes_codes(u, value) for u in readers)
            fixed = not all_integer or value.is_graph_output()
            writes_float = producer.op_type in self.facts.target.float_output
            if not (writes_float and not users):
                self._dequantize(source, users, fixed, dequantize_cost(elements) + layout)

    def _takes_codes(self, user: ir.Node, value: ir.Value) -> bool:
        if user not in self.numbers:
            return False
        if self.facts.moved_input(user) is value:
            return True
        return any(v is value for v in self.facts.operands(user))

    def _quantize(self, source: int | None, users: set[int], cost: float) -> None:
        pair = self.network.add_node(cost if source is None else 0.0, 0.0)
        if source is not None:
            self.network.add_edge(pair, source, cost)
        for user in users:
            self.network.add_edge(user, pair, NEVER)

    def _dequantize(self, source: int, users: set[int], fixed: bool, cost: float) -> None:
        pair = self.network.add_node(NEVER if fixed else 0.0, 0.0)
        self.network.add_edge(source, pair, cost)
        for user in users:
            self.network.add_edge(pair, user, NEVER)

    def _shape(self, value: ir.Value) -> Shape:
        return nominal_shape(self.graph.type_of(value))


def nominal_shape(kind: ValueType) -> Shape:
    """Return a shape with a plausible size for every dimension that is not known."""
    sizes = kind.shape if kind.shape is not None else (None, None, None)
    return tuple(
        size if isinstance(size, int) and size > 0 else (1 if axis == 0 else NOMINAL)
        for axis, size in enumerate(sizes)
    )
