"""Which nodes are quantized, and for the rest why not."""

from __future__ import annotations

import onnx_ir as ir

from qwrap.ops.traits import WEIGHTED
from qwrap.quant.placement.cut import time_in_float, worth_it
from qwrap.quant.placement.eligibility import Eligibility
from qwrap.quant.placement.specs import Specs

TOO_DEAR = "an integer kernel would not pay for the conversions around it"
UNNAMED = "not all that it reads and writes was named"
ALONE = "no quantized neighbour on both sides: quantizing it alone would be slower than float"
WEIGHTS_ALONE = "only its weight is quantized"
NO_TIME = 50_000.0  # nanoseconds a run; what a call of onnxruntime costs by itself


class QuantizedNodes:
    """The nodes that are quantized, with all that they read and write.

    Attributes:
        chosen: the nodes, in the order of the graph.
        reasons: of other nodes, why they are not.
        slow: why onnxruntime has no integer kernels for what is asked of the whole model, None if
            it has.
        odd: the same, where it is for the types of the graph.
    """

    def __init__(self, facts: Eligibility, specs: Specs) -> None:
        self.facts, self.specs, self.target = facts, specs, facts.target
        self.graph, self.config, self.types = facts.graph, specs.config, specs.types
        self.reasons: dict[ir.Node, str] = {}
        self.chosen: dict[ir.Node, None] = {}
        self.slow = specs.slow()
        if self.config.scope is None and self._is_for_all():
            self.types.everything = True
        self._find_candidates()
        self._drop_alone()
        self.odd = self._odd_type()
        self.slow = self.odd or self.slow
        scope = self.config.scope or self.target.scope
        if scope == "faster" and not self.types.everything and self.slow is None:
            self._drop_dear()
            self._drop_alone()

    def _is_for_all(self) -> bool:
        """Whether the target wants all in integers, or the user does and speed is of no account.

        That is so where regions are quantized in types of their own, in a graph that takes no time
        worth speaking of: an example, and no network that placement could spoil or slow down.
        """
        if not self.target.is_cpu:
            return self.target.scope == "all"
        if (
            not self.types.has_activations
            or self.config.activation_spec is None
            or self.slow is not None
        ):
            return False
        return time_in_float(self.facts) < NO_TIME

    def _find_candidates(self) -> None:
        for node in self.facts.nodes:
            reason, asked = self.facts.obstacle(node), self.is_surrounded(node)
            everything = self.types.everything or asked
            if reason is not None and everything and self.facts.moved_input(node) is None:
                # An absorbed activation is no node of its own; that is told only once all are.
                reason = self.facts.pairs_obstacle(node)
            if reason is None and self.types.of(node) is None:
                reason = WEIGHTS_ALONE
            if reason is None and self.config.scope == "named" and not asked:
                reason = UNNAMED
            if reason is None:
                self.chosen[node] = None
            else:
                self.reasons[node] = reason
        for node in [n for n in self.chosen if self.facts.absorbed_by(n) in self.chosen]:
            del self.chosen[node]

    def _drop_dear(self) -> None:
        """Leave in float what would not be faster, unless it was asked for."""
        asked = [node for node in self.chosen if self.is_asked(node)]
        kernels = [node for node in self.chosen if self.specs.has_types(node)]
        held = [node for node in kernels if self.is_asked(node)]
        fast = {*worth_it(self.facts, kernels, kernels, held), *asked}
        self.reasons |= {node: TOO_DEAR for node in self.chosen if node not in fast}
        self.chosen = {node: None for node in self.chosen if node in fast}

    def _odd_type(self) -> str | None:
        """Return why there are no integer kernels for the types of the graph, None if there are."""
        if not self.target.is_cpu:
            return None
        values = [v for node in self.chosen for v in self.facts.data_inputs(node)]
        types = {self.graph.type_of(v).dtype for v in values} - {ir.DataType.FLOAT, None}
        names = sorted(t.name.lower() for t in types if t is not None)
        kind = " and ".join(names)
        if not names:
            return None
        reason = f"onnxruntime has no integer kernels between tensors of {kind}"
        if ir.DataType.FLOAT16 in types:
            reason += (
                ", and its optimiser rounds biases to products of two such scales, unless the "
                "session option session.disable_quant_qdq is 1"
            )
        return reason

    def _drop_alone(self) -> None:
        while alone := [n for n in self.chosen if not self._carries(n)]:
            for node in alone:  # dropping one may leave its neighbours alone
                del self.chosen[node]
                self.reasons[node] = ALONE

    def _carries(self, node: ir.Node) -> bool:
        """Whether a node has its own reason to be quantized, or stands between such nodes."""
        if node.op_type in self.target.matrix or self.types.everything or self.is_asked(node):
            return True
        kind = self.specs.of(node).dtype
        inputs = self.facts.data_inputs(node)
        before = [self.writer_of(v) for v in inputs]
        if not any(w is not None and self.specs.of(w).dtype == kind for w in before):
            return False
        return any(self.specs.of(r).dtype == kind for r in self.readers_of(node.outputs[0]))

    def is_asked(self, node: ir.Node) -> bool:
        """Whether the user wants a node quantized, faster or not."""
        return self.types.is_asked(node) or self.is_surrounded(node)

    def is_surrounded(self, node: ir.Node) -> bool:
        """Whether all that a node reads and writes was named, as far as pairs can be on it."""
        named = self.specs.named
        bias = WEIGHTED[node.op_type].bias if node.op_type in WEIGHTED else None
        around = [v for i, v in self.facts.operand_inputs(node) if i != bias] if named else []
        if not around:
            return False
        if node.op_type not in self.target.float_output:
            around += [v for v in node.outputs[1:] if v.name and self.facts.is_real(v)]
            around.append(self.written_by(node))
        return all(value in named for value in around)

    def is_in_pairs(self, node: ir.Node) -> bool:
        """Whether a quantized node has no kernel, whatever the types."""
        return node in self.chosen and self.facts.obstacle(node) is not None

    def writer_of(self, value: ir.Value) -> ir.Node | None:
        """Return the quantized node that a value comes out of, perhaps moved since."""
        node = value.producer()
        if node is None:
            return None
        producer = self.facts.absorbed_by(node)
        for maker in (node, producer):
            if maker in self.chosen:
                return maker
        data = self.facts.moved_input(node)
        return None if data is None else self.writer_of(data)

    def readers_of(self, value: ir.Value) -> list[ir.Node]:
        """Return the quantized nodes that read a value, perhaps moved before."""
        found: list[ir.Node] = []
        for user in value.consumers():
            if user in self.chosen and any(v is value for v in self.facts.operands(user)):
                found.append(user)
                continue
            goes_on = self.facts.moved_input(user) is value or (
                self.facts.absorbed_by(user) in self.chosen
            )
            if goes_on:
                found += [reader for output in user.outputs for reader in self.readers_of(output)]
        return found

    def written_by(self, node: ir.Node) -> ir.Value:
        """Return the first value that a node's kernel writes: behind an absorbed activation."""
        value = node.outputs[0]
        users = value.consumers()
        if len(users) == 1 and self.facts.absorbed_by(users[0]) is node:
            return users[0].outputs[0]
        return value
