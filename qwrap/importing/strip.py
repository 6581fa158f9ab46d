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
from qwrap.importing.reading import Reading, Source, UnreadableError, constant_of
from qwrap.importing.stripped import Stored, Stripped, Tap, Use, moves_reals
from qwrap.importing.wiring import Wiring, graph_of
from qwrap.model.tensors import to_torch
from qwrap.numerics import dequantize

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
        self.wiring = Wiring(draft, self.constants, self.result)
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
        self.constants.drop_unused(dict.fromkeys(self.wiring.freed))

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
        self.wiring.remove(node)
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
                codes = node.inputs[0]
                assert codes is not None
                self.wiring.redirect(node, codes)
        self.wiring.finish_movers(chain)
        for node in chain.removed:
            self.wiring.remove(node)

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
                graph_of(node).remove(node, safe=True)
        for use in tuple(value.uses()):
            node, index = use.node, use.idx
            if any(True for _ in bodies(node)):
                through = self.wiring.identity(value, f"{label(node)}_{index}", node)
                node.replace_input_with(index, through)
                producer = through.producer()
                assert producer is not None
                node, index = producer, 0
            uses.append((node, index))
        return uses

    # --- activations -----------------------------------------------------------------------------

    def _take_group(self, first: Chain) -> None:
        """Take out the chains of what ``first`` quantizes: a value, or a conversion of it."""
        value, known = first.quantizer.inputs[0], self.result.converted
        assert value is not None
        read = known.get((first.quantizer, 0))
        uses = [use for use in value.uses() if known.get((use.node, use.idx)) is read]
        groups: list[list[Chain]] = []
        for use in uses:
            if use.node in self._pending and use.idx == 0:
                _add_to(groups, self._pending.pop(use.node))
        others = len(uses) > sum(map(len, groups)) or value.is_graph_output()
        is_free = len(groups) == 1 and not others
        has_codes = self.result.source_of(value) is not None
        source = read or self._source_of(value)
        for group in groups:
            reading = group[0].reading
            if source is not None and source.reading.equals(reading):
                if self.result.source_of(value) is None:
                    self.result.moved[value] = source
                self._take(group, value, source)
            elif has_codes and read is None:
                self._take_conversion(group, value)
            elif is_free and not has_codes:
                self.result.taps[value] = Tap(value, reading)
                self._take(group, value, self.result.taps[value])
            else:
                self._take_apart(group, value, read)

    def _source_of(self, value: ir.Value) -> Tap | None:
        """Return the tap whose codes ``value`` can have, if it was only moved since."""
        known = self.result.source_of(value)
        node = value.producer()
        if known is not None or node is None or not moves_reals(node, value):
            return known
        source = self.result.read_by(node, 0)
        return source if source is not None and source.reading.spec.axis is None else None

    def _take_conversion(self, group: list[Chain], value: ir.Value) -> None:
        """Take out pairs that read what comes out of the pairs of ``value``."""
        conversion = Tap(value, group[0].reading)
        self.result.conversions.append(conversion)
        self._take(group, value, conversion)

    def _take_apart(self, group: list[Chain], value: ir.Value, read: Tap | None) -> None:
        """Give the readers of some pairs a value of their own, for others read ``value`` too.

        Args:
            group: the pairs.
            value: what they quantize.
            read: the conversion of it that they quantize, if it is one; no plan says so.
        """
        by_graph: dict[object, list[Chain]] = {}
        for chain in group:
            by_graph.setdefault(chain.quantizer.graph, []).append(chain)
        for chains in by_graph.values():
            first = chains[0]
            direct = (n for n in first.dequantizers if n.inputs[0] is first.quantizer.outputs[0])
            result = next((n.outputs[0].name for n in direct), first.quantizer.outputs[0].name)
            own = self.wiring.identity(value, first.quantizer.name, first.quantizer, read, result)
            if read is not None:
                self.found.notes.append(
                    f"{label(first.quantizer)} converts what was converted already: it is taken "
                    f"for the quantization of a copy, {own.name!r}"
                )
            self.result.taps[own] = Tap(own, first.reading)
            self._take(chains, own, self.result.taps[own])

    def _take(self, group: list[Chain], value: ir.Value, tap: Tap) -> None:
        """Let all that read what comes out of the pairs in ``group`` read ``value``.

        Args:
            group: the pairs.
            value: what they quantize.
            tap: where their scale goes: on the value, or on its readers as a conversion.
        """
        tap.chains += group
        count = sum(map(_count_readers, group))
        conversion = None if self.result.source_of(value) is tap else tap
        if conversion is None:
            self.result.readers[value] = count
        else:
            conversion.count += count
        for chain in group:
            for use in tuple(chain.quantizer.outputs[0].uses()):
                if use.node in chain.movers:
                    self.wiring.read(use.node, use.idx, value, conversion)
            if is_call(chain.quantizer):
                self.wiring.redirect(chain.quantizer, value, conversion)
            for mover in chain.movers:
                self.result.moved |= dict.fromkeys(moved_outputs(mover), tap)
            for node in chain.dequantizers:
                codes = node.inputs[0]
                assert codes is not None
                if codes is chain.quantizer.outputs[0]:
                    self.wiring.redirect(node, value, conversion)
                else:
                    self.wiring.redirect(node, codes)
            self.wiring.finish_movers(chain)
            for node in chain.removed:
                self.wiring.remove(node)


def _home(value: ir.Value) -> ir.Graph:
    producer = value.producer()
    assert producer is not None, "a constant is an initialiser or comes out of a node"
    return graph_of(producer)


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
