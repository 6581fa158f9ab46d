"""Which tensors are quantized around the nodes that are, and which of them are converted."""

from __future__ import annotations

import onnx_ir as ir

from qwrap.config import QuantSpec
from qwrap.dtypes import QuantType
from qwrap.quant.placement.conversions import Chosen, Tree, Use, choose_types
from qwrap.quant.placement.eligibility import Eligibility
from qwrap.quant.placement.nodes import QuantizedNodes
from qwrap.quant.placement.specs import Specs
from qwrap.quant.plan import Conversion, QuantPlan, TensorPlan


class QuantizedTensors:
    """The tensors that quantized nodes read and write, and those that these were moved from.

    Attributes:
        lookups: the nodes that fetch rows of tables to be read as activations are.
        wanted: the tensors, each behind what it was moved from.
    """

    def __init__(self, facts: Eligibility, specs: Specs, nodes: QuantizedNodes) -> None:
        self.facts, self.specs, self.nodes = facts, specs, nodes
        self.graph, self.config, self.target = facts.graph, specs.config, facts.target
        self.lookups = self._lookups()
        self.wanted: dict[ir.Value, None] = {}
        self.chosen = Chosen()

    def _lookups(self) -> list[ir.Node]:
        """Return the nodes that fetch rows of tables to be read as activations are."""
        named, found = self.specs.named, list[ir.Node]()
        for node in filter(self.facts.is_lookup, self.facts.nodes):
            table = node.inputs[0]
            said = named.constants.get(table) if table is not None else None
            by_name = said is not None or self.config.scope != "named"
            by_row = said is not None and said.axis is not None  # no scale for what is fetched
            if by_name and not by_row and self.specs.types.of(node) is not None:
                found.append(node)
        return found

    def source(self, value: ir.Value) -> ir.Value:
        """Return the tensor that ``value`` was moved from."""
        node = value.producer()
        moved = None if node is None else self.facts.moved_input(node)
        if moved is None:
            return value
        if self.nodes.writer_of(moved) is None and not self.specs.named.follows(self.facts, value):
            return value
        return self.source(moved)

    def find(self) -> None:
        """Find the tensors that are quantized, and in which types, in place."""
        for node in self.nodes.chosen:
            for value in self.facts.data_inputs(node):
                self._want(value)
            for value in self._written(node):
                self._want(value)
        for value in self.specs.named.activations:
            if not any(self.facts.absorbed_by(u) in self.nodes.chosen for u in value.consumers()):
                self._want(value)
        tables = {node.outputs[0]: self.specs.table(node) for node in self.lookups}
        roots = [v for v in (*self.wanted, *tables) if self.source(v) is v]
        self.chosen = choose_types(
            (self._tree(root), tables.get(root) or self._writer_spec(root))
            for root in dict.fromkeys(roots)
        )

    def _writer_spec(self, value: ir.Value) -> QuantSpec | None:
        """Return how a value is quantized: as was said, or as what writes it; None if it is float.

        What is named without a type is of the usual one, if nothing quantized writes or reads it.
        """
        said, writer = self.specs.named.base(value), self.nodes.writer_of(value)
        if said is not None:
            return said
        if writer is not None:
            return self.specs.of(writer)
        alone = value in self.specs.named and not self.nodes.readers_of(value)
        usual = alone or self.specs.named.is_pinned(value)
        return self.config.activation_spec if usual else None

    def _want(self, value: ir.Value) -> None:
        if value in self.wanted:
            return
        node = value.producer()
        if node is not None and self.source(value) is not value:
            moved = self.facts.moved_input(node)
            assert moved is not None
            self._want(moved)
        self.wanted[value] = None
        if node is not None and node.op_type == "Split" and self.source(value) is not value:
            for other in node.outputs:  # the kernel wants all of them quantized alike
                self._want(other)

    def _written(self, node: ir.Node) -> list[ir.Value]:
        """Return the outputs of a quantized node that get pairs."""
        if self.nodes.is_in_pairs(node):
            return [v for v in node.outputs if v.name and self.facts.is_real(v)]
        value = self.nodes.written_by(node)
        always = node.op_type not in self.target.float_output or self.specs.types.everything
        return [value] if always or self.nodes.readers_of(value) else []

    def _tree(self, value: ir.Value, moved: bool = False) -> Tree:
        """Return what becomes of a quantized tensor.

        Args:
            value: the tensor.
            moved: whether it was moved from one of which it was said who reads it in which type.
                As with onnxruntime's tool, that then holds for its readers, regions apart.
        """
        named, types = self.specs.named, self.specs.types
        said = named.is_pinned(value)
        tree = Tree(value, pinned=said or moved, converted=named.converted(value))
        for use in value.uses():
            node, index = use.node, use.idx
            seen = named.receives(node, value) and named.is_seen(node, index)
            received = tree.converted if seen else None
            if (
                node not in self.nodes.chosen
                and index == 0
                and self.facts.moved_input(node) is value
            ):
                results = [v for v in node.outputs if v in self.wanted]
                outputs = [self._tree(v, tree.pinned) for v in results if self.source(v) is not v]
                if outputs:
                    asked = None if said else self._asked_of_mover(node, outputs)
                    tree.movers.append(((node, index), received or asked, outputs))
                    continue
            if received is not None:
                tree.readers.append(((node, index), received))
            elif said or (moved and not types.is_chosen(node)):
                continue
            elif self._is_read(node, index, value):
                tree.readers.append(((node, index), self.specs.of(node)))
        return tree

    def _is_read(self, node: ir.Node, index: int, value: ir.Value) -> bool:
        """Whether a quantized node reads a tensor as its codes."""
        return node in self.nodes.chosen and (index, value) in self.facts.operand_inputs(node)

    def _asked_of_mover(self, node: ir.Node, outputs: list[Tree]) -> QuantSpec | None:
        """Return in which type a node has to move its input, None for any."""
        said = [self.specs.named.base(output.value) for output in outputs]
        asked = self.specs.of(node) if self.specs.types.is_chosen(node) else None
        return next((spec for spec in said if spec is not None), asked)

    def add_to(self, plan: QuantPlan) -> None:
        """Write the plans of all tensors but those of tables into ``plan``, in place."""
        for value in self.wanted:
            self._add(plan, value)

    def _add(self, plan: QuantPlan, value: ir.Value) -> None:
        key, node = self.graph.key(value), value.producer()
        if key in plan.tensors or value not in self.chosen.bases:
            return
        spec, source, fixed = self.chosen.bases[value], key, None
        if node is not None and self.source(value) is not value:
            moved = self.facts.moved_input(node)
            assert moved is not None
            kind = self.chosen.received(moved, node, 0)
            tensor = plan.tensors[self.graph.key(moved)]
            source = tensor.source if kind is None else self._conversion_key(moved, kind)
            spec = tensor.spec if kind is None else self._converted(moved, kind)[0]
        else:
            spec = self.specs.activation(value, spec)
            fixed = self.specs.fixed(node, spec)
        plan.tensors[key] = TensorPlan(
            spec=spec, source=source, fixed=fixed, conversions=self.conversions(value)
        )

    # --- conversions -----------------------------------------------------------------------------

    def conversions(self, value: ir.Value) -> tuple[Conversion, ...]:
        """Return what some readers of a quantized tensor get instead."""
        found = []
        outputs = self.specs.named.outputs(value)
        for kind in self.chosen.converted.get(value, {}):
            spec, uses = self._converted(value, kind)
            consumers = tuple((self.graph.node_key(node), index) for node, index in uses)
            key = self._conversion_key(value, kind)
            found.append(Conversion(key=key, spec=spec, consumers=consumers, outputs=outputs))
        return tuple(found)

    def _converted(self, value: ir.Value, kind: QuantType) -> tuple[QuantSpec, list[Use]]:
        spec, uses = self.chosen.converted[value][kind]
        return self.specs.activation(value, spec), uses

    def _conversion_key(self, value: ir.Value, kind: QuantType) -> str:
        key = f"{self.graph.key(value)}_convert"
        if len(self.chosen.converted[value]) > 1:
            key = f"{key}_{kind}"
        while key in self.graph.values:
            key += "_"
        return key
