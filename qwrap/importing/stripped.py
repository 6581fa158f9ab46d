"""What was taken out of a quantized graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qwrap.graph.nodes import STANDARD
from qwrap.importing.chains import Chain, moved_outputs
from qwrap.importing.reading import Reading, Source, constant_of
from qwrap.model.attributes import attributes_of
from qwrap.ops.traits import PASS_THROUGH

Use = tuple[ir.Node, int]


@dataclass(slots=True, eq=False)
class Tap:
    """What pairs of the file make of a value: its codes, or what some of its readers get instead.

    Attributes:
        value: the tensor.
        reading: how it is quantized.
        chains: the pairs.
        count: how many inputs and outputs read what comes out of them.
        outputs: of a conversion, which graph outputs it is.
    """

    value: ir.Value
    reading: Reading
    chains: list[Chain] = field(default_factory=list)
    count: int = 0
    outputs: set[int] = field(default_factory=set)

    @property
    def readings(self) -> Iterator[Reading]:
        """What each node of the pairs said."""
        for chain in self.chains:
            yield from chain.readings


@dataclass(slots=True, eq=False)
class Stored:
    """A constant that the file quantizes.

    Attributes:
        value: the float initialiser that it is now.
        readings: what each of its nodes said; all the same.
        codes: where its codes are, none if the file holds floats.
        ends: smallest and largest code, None if they are no integers.
    """

    value: ir.Value
    ends: tuple[float, float] | None = None
    readings: list[Reading] = field(default_factory=list)
    codes: list[Source] = field(default_factory=list)

    @property
    def reading(self) -> Reading:
        """How it is quantized."""
        return self.readings[0]


@dataclass(slots=True, eq=False)
class Stripped:
    """What was taken out of a graph, by what is left.

    Attributes:
        taps: value -> how it is quantized.
        moved: value that was moved -> the tap whose scale it has.
        conversions: what some readers of a value get, which has codes of another kind itself.
        converted: (node, input) -> the conversion that it reads.
        constants: (node, input) -> the constant that it reads.
        readers: value with a pair -> how many inputs and outputs read what comes out of it.
        biases: likewise those of int32, with the tap of the activation that goes with it and the
            input of the weight.
    """

    taps: dict[ir.Value, Tap] = field(default_factory=dict)
    moved: dict[ir.Value, Tap] = field(default_factory=dict)
    conversions: list[Tap] = field(default_factory=list)
    converted: dict[Use, Tap] = field(default_factory=dict)
    constants: dict[Use, Stored] = field(default_factory=dict)
    readers: dict[ir.Value, int] = field(default_factory=dict)
    biases: dict[Use, tuple[Stored, Tap, Use]] = field(default_factory=dict)

    def source_of(self, value: ir.Value) -> Tap | None:
        """Return the tap whose scale ``value`` has, where it is no conversion that is read."""
        return self.taps.get(value) or self.moved.get(value)

    def read_by(self, node: ir.Node, index: int) -> Tap | None:
        """Return the tap whose scale an input reads, None if it reads floats."""
        value = node.inputs[index] if len(node.inputs) > index else None
        if value is None:
            return None
        return self.converted.get((node, index)) or self.source_of(value)

    def uses_of(self, conversion: Tap) -> list[Use]:
        """Return the inputs that read a conversion, in the order in which they read its value."""
        uses = [(use.node, use.idx) for use in conversion.value.uses()]
        return [use for use in uses if self.converted.get(use) is conversion]

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let what is known of a value be known of another one, in place."""
        self.taps = {new if v is old else v: tap for v, tap in self.taps.items()}
        self.moved = {new if v is old else v: tap for v, tap in self.moved.items()}
        self.readers = {new if v is old else v: count for v, count in self.readers.items()}
        for tap in (*self.taps.values(), *self.conversions):
            if tap.value is old:
                tap.value = new

    def stored_use(self, node: ir.Node, index: int) -> Use | None:
        """Return where the constant that a node computes with is read, perhaps to be moved."""
        use: Use = node, index
        while use not in self.constants:
            value = use[0].inputs[use[1]] if len(use[0].inputs) > use[1] else None
            maker = None if value is None else value.producer()
            if maker is None or value is None or not moves_reals(maker, value):
                return None
            use = maker, 0
        return use


def moves_reals(node: ir.Node, output: ir.Value) -> bool:
    """Whether an output of a node holds values of its first input, and nothing else but 0."""
    if _keeps_apart(node):
        return True
    known = PASS_THROUGH.get(node.op_type)
    if known is None or known.data != (0,) or node.domain not in STANDARD:
        return False
    if output not in moved_outputs(node):
        return False
    if not known.holds(attributes_of(node)):
        return False
    if known.adds_input is None or len(node.inputs) <= known.adds_input:
        return True
    fill = node.inputs[known.adds_input]
    tensor = constant_of(fill)
    return fill is None or (tensor is not None and not tensor.numpy().any())


def _keeps_apart(node: ir.Node) -> bool:
    """Whether a node takes the larger of its input and -inf, as ``export`` has it do in places."""
    if node.op_type != "Max" or node.domain not in STANDARD or len(node.inputs) != 2:
        return False
    tensor = constant_of(node.inputs[1])
    return tensor is not None and bool(np.isneginf(tensor.numpy().astype(np.float32)).all())
