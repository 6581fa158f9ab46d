"""Follows the channels of a model's tensors from what makes them to what takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qwrap.graph.constants import Constants, label
from qwrap.graph.divisible import Divisible, Layer, Share
from qwrap.graph.index import ValueType, infer_types, walk_nodes
from qwrap.graph.kernel import LAYERS, Kernel, integer
from qwrap.graph.moves import Unclear
from qwrap.graph.nodes import STANDARD
from qwrap.graph.slots import Numbers, Settled, Slots

SHAPES = ("Shape", "Size")  # read a tensor, but not its values
CONTRIB = frozenset(
    ("com.microsoft", name)
    for name in (
        "EmbedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    )
)


class Trace:
    """Numbers the channels of each tensor, and notes what keeps them from being divided."""

    def __init__(
        self, model: ir.Model, fixed: Mapping[ir.Value, str], rules: Mapping[str, Rule]
    ) -> None:
        self.model, self.fixed, self.rules = model, fixed, rules
        self.constants = Constants(model)
        self.types = _with_channels(model, self.constants)
        self.slots, self.places = Slots(), dict[ir.Value, Numbers]()
        self.layers: list[Layer] = []
        self.shares: list[Share] = []
        self.makers: list[ir.Node] = []

    def run(self) -> Divisible:
        """Return what can be divided."""
        for node in walk_nodes(self.model.graph):
            self._visit(node)
        for value, place in self.places.items():
            if value.is_graph_output():
                self.slots.pin(place, f"is graph output {value.name!r}")
            if value in self.fixed:
                self.slots.pin(place, self.fixed[value])
        return self._settled(self.slots.settle())

    def _settled(self, found: Settled) -> Divisible:
        classes = np.append(found.classes, -1)  # for the number -1: no slot
        layers = [
            Layer(each.node, each.kernel, classes[each.inputs], classes[each.outputs])
            for each in self.layers
        ]
        shares = [Share(s.node, s.index, classes[s.place], s.multiplied) for s in self.shares]
        places = {value: classes[place] for value, place in self.places.items()}
        runs = [found.classes[start:stop] for start, stop in found.runs]
        left = list(zip(self.makers, found.reasons, strict=True))
        return Divisible(found.count, layers, shares, places, runs, left)

    def _visit(self, node: ir.Node) -> None:
        for value in node.inputs:  # a body may run any number of times, or never
            if value in self.places and _graph_of(value) is not node.graph:
                self.pin(value, f"{label(node)} reads {value.name!r} from inside a body")
        known = node.domain in STANDARD or (node.domain, node.op_type) in CONTRIB
        rule = self.rules.get(node.op_type) if known else None
        try:
            if rule is not None:
                rule(self, node)
            elif node.op_type not in SHAPES:
                self.pin_inputs(node, f"is read by {label(node)}")
        except Unclear as reason:
            self.pin_inputs(node, f"{reason} ({label(node)})")

    # --- what rules use --------------------------------------------------------------------------

    def place(self, node: ir.Node, index: int) -> Numbers | None:
        """Return the slots of an input, None if there is none that could be divided."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None or _graph_of(value) is not node.graph:
            return None
        place = self.places.get(value)
        return None if place is None or self.slots.stays(place) else place

    def pin(self, value: ir.Value | None, reason: str) -> None:
        """Let a tensor stay as it is."""
        if value is not None and value in self.places:
            self.slots.pin(self.places[value], reason)

    def pin_inputs(self, node: ir.Node, reason: str) -> None:
        """Let all inputs of a node stay as they are."""
        for value in node.inputs:
            self.pin(value, reason)

    def rank(self, node: ir.Node) -> int:
        """Return the number of dimensions of a node's first output."""
        rank = self.types.get(node.outputs[0], ValueType()).rank
        if rank is None:
            raise Unclear("its number of dimensions is not known")
        return rank

    def fresh(self, node: ir.Node, count: int) -> Numbers:
        """Return slots for what a node makes."""
        self.makers.append(node)
        return self.slots.fresh(count)

    def obstacle(self, node: ir.Node, index: int) -> str:
        """Return why a constant that a node reads must not be changed, "" for no reason."""
        value = node.inputs[index]
        assert value is not None
        if not self.constants.is_float(value):
            return f"input {value.name!r} of {label(node)} is no constant"
        if len(value.uses()) > 1 or value.is_graph_output():
            return f"{value.name!r} of {label(node)} is read elsewhere too"
        return self.fixed.get(value, "")

    def share(self, node: ir.Node, index: int, place: Numbers, *, multiplied: bool = False) -> None:
        """Divide a constant as the tensor it becomes part of, or let that stay."""
        if reason := self.obstacle(node, index):
            self.slots.pin(place, reason)
            return
        array = self.constants.array(node.inputs[index])
        assert array is not None
        if array.any():
            self.shares.append(Share(node, index, place, multiplied))

    def passed(self, node: ir.Node, place: Numbers, rank: int | None = None) -> None:
        """Let the first output of a node have the slots of its input, aligned to the right."""
        rank = place.ndim if rank is None else rank
        self.places[node.outputs[0]] = place.reshape([1] * (rank - place.ndim) + [*place.shape])


def _graph_of(value: ir.Value) -> object:
    producer = value.producer()
    return value.graph if producer is None else producer.graph


def _with_channels(model: ir.Model, constants: Constants) -> dict[ir.Value, ValueType]:
    """Return the types of all values, with sizes that follow from the weights that read them."""
    types = infer_types(model)
    for node in walk_nodes(model.graph):
        value = node.inputs[0] if node.op_type in LAYERS and len(node.inputs) > 1 else None
        tensor = constants.tensor(node.inputs[1]) if value is not None else None
        kernel = None if tensor is None else Kernel.of(node, tuple(tensor.shape.numpy()))
        known = types.get(value, ValueType()) if value is not None else ValueType()
        if value is None or kernel is None or known.shape is None or integer(node, "transA", 0):
            continue
        shape, axis = list(known.shape), 1 if node.op_type.startswith("Conv") else -1
        if not isinstance(shape[axis], int):
            shape[axis] = kernel.inputs
            types[value] = replace(known, shape=tuple(shape))
    return types


Rule = Callable[[Trace, ir.Node], None]
"""Gives the outputs of a node their slots, and pins those inputs that must stay."""
