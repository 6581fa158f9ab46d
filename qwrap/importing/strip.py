"""Take the pairs out of a quantized graph, and remember what they were."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.dtypes import INT32
from qwrap.export.quantizers import as_array
from qwrap.graph.constants import Constants, label
from qwrap.graph.index import bodies
from qwrap.graph.nodes import STANDARD
from qwrap.importing.calls import is_call
from qwrap.importing.chains import Chain, Chains, moved_outputs
from qwrap.importing.reading import Reading, Source, UnreadableError, constant_of, is_quantizer
from qwrap.importing.stripped import Stored, Stripped, Tap, Use, moves_reals
from qwrap.model.tensors import to_torch
from qwrap.numerics import dequantize
from qwrap.quant.placement.forms import DEQUANTIZE

NAMES = ("_quantized", "_DequantizeLinear_Output")
"""What tools put behind the name of a float weight to name its codes, or what comes of them."""

SMALL = 4096
"""Elements up to which floats are kept beside the module's own; else codes make them again."""


class Stripper:
    """Edits one draft: a copy of the graph of the file."""

    def __init__(self, draft: ir.Model, found: Chains) -> None:
        self.draft, self.found = draft, found
        self.constants = Constants(draft)
        self.result = Stripped()
        self._freed: list[ir.Value | None] = []
        self._pending = {chain.quantizer: chain for chain in found.computed}
        self._stored: list[Stored] = []

    def strip(self) -> Stripped:
        """Take out all that was found, in place, but for biases; return what it was."""
        for node, reading in self.found.stored.items():
            if reading.spec.dtype is not INT32 and (reason := self._try(node, reading)):
                self.found.notes.append(f"{label(node)} stays as it is: {reason}")
        for chain in self.found.floats:
            self._take_floats(chain)
        for chain in self.found.computed:
            if chain.quantizer in self._pending:
                self._take_group(chain)
        return self.result

    def clean_up(self) -> None:
        """Drop the constants that nothing reads any more, in place."""
        self.constants.drop_unused(dict.fromkeys(self._freed))

    # --- constants -------------------------------------------------------------------------------

    def _try(self, node: ir.Node, reading: Reading) -> str:
        try:
            self.take_codes(node, reading)
        except UnreadableError as error:
            return str(error)
        return ""

    def take_codes(self, node: ir.Node, reading: Reading) -> Stored:
        """Let what reads a constant behind ``node`` read floats, in place.

        Raises:
            UnreadableError: they are not finite.
        """
        codes = node.inputs[0]
        assert codes is not None
        stored = self._same_codes(codes, reading) or self._floats_of(node, codes, reading)
        stored.readings.append(reading)
        stored.codes.append(Source(node, 0, codes, "codes"))
        for use in self._uses(node.outputs[0]):
            use[0].replace_input_with(use[1], stored.value)
            if reading.spec.dtype is not INT32:
                self.result.constants[use] = stored
        self._remove(node)
        return stored

    def _same_codes(self, codes: ir.Value, reading: Reading) -> Stored | None:
        same = (s for s in self._stored if s.codes and s.codes[0].value is codes)
        return next((s for s in same if s.reading.equals(reading)), None)

    def _floats_of(self, node: ir.Node, codes: ir.Value, reading: Reading) -> Stored:
        tensor = constant_of(codes)
        assert tensor is not None
        reals = _reals(tensor, reading)
        if not np.isfinite(reals.numpy()).all():
            raise UnreadableError("it makes no finite numbers")
        home = codes.graph if codes.is_initializer() else _home(codes)
        assert isinstance(home, ir.Graph)
        value = self.constants.add(home, self._name(node.outputs[0], codes), reals.numpy())
        if reals.size > SMALL:
            value.const_value = ir.LazyTensor(
                partial(_reals, tensor, reading),
                reals.dtype,
                ir.Shape(reals.shape.numpy()),
                name=value.name,
            )
        stored = Stored(value, _ends(to_torch(tensor)))
        self._stored.append(stored)
        return stored

    def _name(self, result: ir.Value, codes: ir.Value) -> str:
        """Return what the weight was called before it was quantized, as far as names tell."""
        for value, suffix in zip((codes, result), NAMES, strict=True):
            name = value.name or ""
            stem = name.removesuffix(suffix)
            if stem not in (name, "", result.name):
                return self.constants.unique_name(stem)
        return result.name or self.constants.unique_name("weight")

    def _take_floats(self, chain: Chain) -> None:
        value = chain.quantizer.inputs[0]
        assert value is not None
        stored = next(
            (s for s in self._stored if s.value is value and s.reading.equals(chain.reading)), None
        )
        if stored is None:
            stored = Stored(value)
            self._stored.append(stored)
        stored.readings += chain.readings
        quantizer = chain.quantizer.outputs[0]
        for use in self._uses(quantizer):
            if use[0] in chain.movers:
                use[0].replace_input_with(use[1], value)
                self.result.constants[use] = stored
        if is_call(chain.quantizer):
            self._read_floats(quantizer, stored)
        for node in chain.dequantizers:
            if node.inputs[0] is quantizer:
                self._read_floats(node.outputs[0], stored)
            else:
                self._redirect(node, node.inputs[0])
        self._finish_movers(chain)
        for node in chain.removed:
            self._remove(node)

    def _read_floats(self, value: ir.Value, stored: Stored) -> None:
        for use in self._uses(value):
            use[0].replace_input_with(use[1], stored.value)
            self.result.constants[use] = stored

    def _uses(self, value: ir.Value) -> list[Use]:
        """Return what reads a constant; control flow, which has no points, through an Identity.

        Any other Identity goes, as it does in onnxruntime.
        """
        uses = []
        while copies := [use.node for use in value.uses() if _is_copy(use.node)]:
            for node in copies:
                node.outputs[0].replace_all_uses_with(value)
                _graph(node).remove(node, safe=True)
        for use in tuple(value.uses()):
            node, index = use.node, use.idx
            if any(True for _ in bodies(node)):
                through = self._identity(value, f"{label(node)}_{index}", node)
                node.replace_input_with(index, through)
                producer = through.producer()
                assert producer is not None
                node, index = producer, 0
            uses.append((node, index))
        return uses

    # --- activations -----------------------------------------------------------------------------

    def _take_group(self, first: Chain) -> None:
        """Take out the chains of the value that ``first`` quantizes."""
        value = first.quantizer.inputs[0]
        assert value is not None
        uses = tuple(value.uses())
        groups: list[list[Chain]] = []
        for use in uses:
            if use.node in self._pending and use.idx == 0:
                _add_to(groups, self._pending.pop(use.node))
        others = len(uses) > sum(map(len, groups)) or value.is_graph_output()
        source = self._source_of(value)
        for group in groups:
            reading = group[0].reading
            if source is not None and self.result.taps[source].reading.equals(reading):
                if value is not source:
                    self.result.moved[value] = source
                self._take(group, value, source)
            elif value not in self.result.taps and len(groups) == 1 and not others:
                self.result.taps[value] = Tap(reading)
                self._take(group, value, value)
            else:
                self._take_apart(group, value)

    def _source_of(self, value: ir.Value) -> ir.Value | None:
        """Return the tapped value whose codes ``value`` can have, if it was only moved since."""
        known = self.result.source_of(value)
        node = value.producer()
        if known is not None or node is None or not moves_reals(node, value):
            return known
        source = self.result.source_of(node.inputs[0]) if node.inputs[0] is not None else None
        per_tensor = source is not None and self.result.taps[source].reading.spec.axis is None
        return source if per_tensor else None

    def _take_apart(self, group: list[Chain], value: ir.Value) -> None:
        """Give the readers of some pairs a value of their own, for others read ``value`` too."""
        by_graph: dict[object, list[Chain]] = {}
        for chain in group:
            by_graph.setdefault(chain.quantizer.graph, []).append(chain)
        for chains in by_graph.values():
            first = chains[0]
            direct = (n for n in first.dequantizers if n.inputs[0] is first.quantizer.outputs[0])
            result = next((n.outputs[0].name for n in direct), first.quantizer.outputs[0].name)
            own = self._identity(value, first.quantizer.name, first.quantizer, result)
            self.result.taps[own] = Tap(first.reading)
            self._take(chains, own, own)

    def _take(self, group: list[Chain], value: ir.Value, source: ir.Value) -> None:
        """Let all that read what comes out of the pairs in ``group`` read ``value``."""
        self.result.taps[source].chains += group
        self.result.readers[value] = sum(map(_count_readers, group))
        for chain in group:
            for use in tuple(chain.quantizer.outputs[0].uses()):
                if use.node in chain.movers:
                    use.node.replace_input_with(use.idx, value)
            if is_call(chain.quantizer):
                self._redirect(chain.quantizer, value)
            for mover in chain.movers:
                self.result.moved |= dict.fromkeys(moved_outputs(mover), source)
            for node in chain.dequantizers:
                codes = node.inputs[0]
                self._redirect(node, value if codes is chain.quantizer.outputs[0] else codes)
            self._finish_movers(chain)
            for node in chain.removed:
                self._remove(node)

    def _finish_movers(self, chain: Chain) -> None:
        """Let what moved codes move reals, in place."""
        real = chain.reading.real or ir.DataType.FLOAT
        for node in chain.movers:
            for value in moved_outputs(node):
                value.type = ir.TensorType(real)
            if node.op_type == "Pad" and len(node.inputs) > 2 and node.inputs[2] is not None:
                self._freed.append(node.inputs[2])
                node.replace_input_with(2, None)

    def _redirect(self, node: ir.Node, value: ir.Value | None) -> None:
        """Let what reads the output of ``node`` read ``value``; graph outputs keep their names."""
        result = node.outputs[0]
        assert value is not None
        graph = result.graph
        if result.is_graph_output() and graph is not None:
            if not _can_be_output(value, graph):
                value = self._identity(value, node.name, node)
            if graph is self.draft.graph:
                value.name = result.name
            value.type, value.shape = result.type or value.type, result.shape or value.shape
            for i, output in enumerate(graph.outputs):
                if output is result:
                    graph.outputs[i] = value
            result.name = None
        result.replace_all_uses_with(value)

    def _identity(
        self, value: ir.Value, name: str | None, before: ir.Node, result: str | None = None
    ) -> ir.Value:
        """Return a copy of a value, made in front of a node."""
        node = ir.Node("", "Identity", [value], num_outputs=1, name=name)
        node.outputs[0].name = result or self.constants.unique_name(f"{value.name}_copy")
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        _graph(before).insert_before(before, node)
        return node.outputs[0]

    def _remove(self, node: ir.Node) -> None:
        """Remove a node of a pair, and those that make scales of what is stored, in place."""
        makers = {value.producer() for value in node.inputs[1:] if value is not None}
        self._freed += node.inputs
        _graph(node).remove(node, safe=True)
        for maker in makers:
            made = maker is not None and (
                is_quantizer(maker, DEQUANTIZE) or maker.op_type == "Gather"
            )
            if maker is not None and made and not maker.outputs[0].uses():
                self._remove(maker)


def _home(value: ir.Value) -> ir.Graph:
    producer = value.producer()
    assert producer is not None, "a constant is an initialiser or comes out of a node"
    return _graph(producer)


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _reals(codes: ir.TensorProtocol, reading: Reading) -> ir.TensorProtocol:
    """Return what codes stand for."""
    values = dequantize(to_torch(codes), reading.qparams, reading.spec.dtype)
    return ir.tensor(as_array(values, reading.real or ir.DataType.FLOAT))


def _ends(codes: Tensor) -> tuple[float, float] | None:
    if not codes.numel() or codes.is_floating_point():
        return None
    codes = codes.to(torch.int32)  # torch has no minimum of uint16
    return float(codes.min()), float(codes.max())


def _count_readers(chain: Chain) -> int:
    """Return how many inputs and outputs read the reals, and what moves codes as a second one."""
    values = [node.outputs[0] for node in chain.dequantizers]
    return 2 * len(chain.movers) + sum(len(v.uses()) + v.is_graph_output() for v in values)


def _add_to(groups: list[list[Chain]], chain: Chain) -> None:
    """Put a chain to those that make the same codes, in place."""
    for group in groups:
        if group[0].reading.equals(chain.reading):
            group.append(chain)
            return
    groups.append([chain])


def _is_copy(node: ir.Node) -> bool:
    plain = node.op_type == "Identity" and node.domain in STANDARD
    return plain and not node.outputs[0].is_graph_output()


def _can_be_output(value: ir.Value, graph: ir.Graph) -> bool:
    """Whether a value may take the place of an output of ``graph``."""
    node = value.producer()
    return node is not None and node.graph is graph and not value.is_graph_output()
