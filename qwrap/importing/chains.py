"""Which QuantizeLinear and DequantizeLinear of a file belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qwrap.graph.constants import label
from qwrap.graph.index import ValueType, walk_nodes
from qwrap.graph.nodes import STANDARD
from qwrap.importing.calls import FAKE_QUANTIZE, is_call, read_call
from qwrap.importing.reading import Reading, UnreadableError, constant_of, is_quantizer, read
from qwrap.model.attributes import attributes_of
from qwrap.ops.traits import PASS_THROUGH
from qwrap.quant.placement.forms import DEQUANTIZE, QUANTIZE

Types = Mapping[ir.Value, ValueType]
FILL = 2  # index of Pad's constant


@dataclass(slots=True, eq=False)
class Chain:
    """A QuantizeLinear, and all that becomes of its codes.

    Attributes:
        quantizer: the node, or the call of a function that dequantizes too.
        reading: how it makes codes.
        movers: nodes that move the codes.
        dequantizers: nodes that make reals of them.
    """

    quantizer: ir.Node
    reading: Reading
    movers: dict[ir.Node, None] = field(default_factory=dict)
    dequantizers: dict[ir.Node, Reading] = field(default_factory=dict)

    @property
    def readings(self) -> Iterator[Reading]:
        """What each node says of the codes."""
        yield self.reading
        yield from self.dequantizers.values()

    @property
    def removed(self) -> Iterator[ir.Node]:
        """The nodes that go, readers first."""
        yield from self.dequantizers
        yield self.quantizer


@dataclass(slots=True, eq=False)
class Chains:
    """What can be imported, in the order of the graph.

    Attributes:
        computed: those of values that are computed.
        floats: those of constants that are stored as floats.
        stored: DequantizeLinear of constants that are stored as codes.
        notes: what stays as it is, and why.
        calls: the same of calls of functions, which nothing computes as they stand.
    """

    computed: list[Chain] = field(default_factory=list)
    floats: list[Chain] = field(default_factory=list)
    stored: dict[ir.Node, Reading] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)


def find_chains(model: ir.Model, types: Types) -> Chains:
    """Return the chains of a model; it is not changed.

    Args:
        model: with functions expanded.
        types: what is known of its values.
    """
    found, taken = Chains(), set[ir.Node]()
    for node in walk_nodes(model.graph):
        if is_call(node):
            _add_call(found, node, model, types)
            continue
        reason = _add(found, node, types)
        if reason:
            found.notes.append(f"{label(node)} stays as it is: {reason}")
    for chain in (*found.computed, *found.floats):
        taken.update(chain.dequantizers)
    for node in walk_nodes(model.graph):
        if is_quantizer(node, DEQUANTIZE) and node not in taken and _is_computed(node):
            found.notes.append(f"{label(node)} stays as it is: its codes are computed")
    return found


def _add(found: Chains, node: ir.Node, types: Types) -> str:
    """Add what a node begins to ``found``, in place; return why it cannot be, if so."""
    is_stored = is_quantizer(node, DEQUANTIZE) and constant_of(node.inputs[0]) is not None
    try:
        if is_quantizer(node, QUANTIZE):
            _add_chain(found, node, types)
        elif is_stored and not _makes_scales(node):
            _add_stored(found, node, types)
    except UnreadableError as error:
        return str(error)
    return ""


def _add_call(found: Chains, node: ir.Node, model: ir.Model, types: Types) -> None:
    """Add the call of one of qwrap's functions to ``found``, in place."""
    value, result = node.inputs[0], node.outputs[0]
    is_constant = constant_of(value) is not None
    try:
        reading = read_call(node, model, _kind(value, types))
        if is_constant and result.is_graph_output():
            raise UnreadableError("it makes a graph output of a constant")
    except UnreadableError as error:
        found.calls.append(f"{label(node)}: {error}")
        return
    if not is_call(node, FAKE_QUANTIZE):
        found.stored[node] = reading
    elif is_constant:
        found.floats.append(Chain(node, reading))
    else:
        found.computed.append(Chain(node, reading))


def _is_computed(node: ir.Node) -> bool:
    """Whether a node reads what no QuantizeLinear made, over which a note tells already."""
    value = node.inputs[0]
    maker = None if value is None else value.producer()
    return constant_of(value) is None and not is_quantizer(maker, QUANTIZE)


def _makes_scales(node: ir.Node) -> bool:
    """Whether a DequantizeLinear only serves another one, as for NVFP4."""
    uses = node.outputs[0].uses()
    kinds = (QUANTIZE, DEQUANTIZE)
    return bool(uses) and all(
        use.idx == 1 and any(is_quantizer(use.node, kind) for kind in kinds) for use in uses
    )


def _kind(value: ir.Value | None, types: Types) -> ValueType:
    tensor = constant_of(value)
    if tensor is not None:
        return ValueType(tensor.dtype, tuple(int(n) for n in tensor.shape.numpy()))
    return ValueType() if value is None else types.get(value, ValueType())


# --- constants -----------------------------------------------------------------------------------


def _add_stored(found: Chains, node: ir.Node, types: Types) -> None:
    reading = read(node, _kind(node.inputs[0], types))
    if node.outputs[0].is_graph_output():
        raise UnreadableError("it makes a graph output of a constant")
    found.stored[node] = reading


# --- chains --------------------------------------------------------------------------------------


def _add_chain(found: Chains, node: ir.Node, types: Types) -> None:
    value = node.inputs[0]
    reading = read(node, _kind(value, types))
    chain = Chain(node, reading)
    _follow(chain, node.outputs[0], types)
    if not chain.dequantizers:
        raise UnreadableError("nothing makes reals of its codes again")
    maker = None if value is None else value.producer()
    if constant_of(value) is None:
        if maker in found.stored:
            raise UnreadableError("it quantizes a constant that is stored as codes")
        found.computed.append(chain)
        return
    if any(n.outputs[0].is_graph_output() for n in chain.dequantizers):
        raise UnreadableError("it makes a graph output of a constant")
    found.floats.append(chain)


def _follow(chain: Chain, codes: ir.Value, types: Types) -> None:
    """Find what reads codes, in place of ``chain``.

    Raises:
        UnreadableError: something computes with them.
    """
    if codes.is_graph_output():
        raise UnreadableError("its codes are a graph output")
    for use in codes.uses():
        node = use.node
        if is_quantizer(node, DEQUANTIZE) and use.idx == 0:
            found = read(node, _kind(codes, types))
            if not found.equals(chain.reading):
                raise UnreadableError(f"{label(node)} gives its codes another meaning")
            if chain.reading.real not in (None, found.real):
                raise UnreadableError(f"{label(node)} makes another type of its codes")
            chain.dequantizers[node] = found
        elif use.idx == 0 and _moves(node, chain.reading):
            chain.movers[node] = None
            for value in moved_outputs(node):
                _follow(chain, value, types)
        else:
            raise UnreadableError(f"{label(node)} computes with its codes")


def _moves(node: ir.Node, reading: Reading) -> bool:
    """Whether a node moves codes of one scale, so that it may as well move what they stand for."""
    known = PASS_THROUGH.get(node.op_type)
    if known is None or known.data != (0,) or node.domain not in STANDARD:
        return False
    if reading.spec.axis is not None or not known.holds(attributes_of(node)):
        return False
    return not known.adds_zero or _fills_with_zero(node, reading)


def _fills_with_zero(node: ir.Node, reading: Reading) -> bool:
    """Whether what a Pad puts around codes stands for 0, which it puts around reals by itself."""
    if attributes_of(node).get("mode", "constant") != "constant":
        return True
    value = node.inputs[FILL] if len(node.inputs) > FILL else None
    tensor = constant_of(value)
    if value is not None and tensor is None:
        return False
    fill = 0 if tensor is None else np.asarray(tensor.numpy()).astype(np.float32).reshape(-1)[0]
    return float(fill) == float(reading.qparams.zero_point[0])


def moved_outputs(node: ir.Node) -> list[ir.Value]:
    """Return the outputs that hold values of the first input."""
    count = None if node.op_type == "Split" else 1
    return [value for value in node.outputs[:count] if value.name]
