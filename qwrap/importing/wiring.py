"""Who reads what in a graph whose pairs are taken out."""

from __future__ import annotations

import onnx_ir as ir

from qwrap.graph.constants import Constants, label
from qwrap.graph.index import bodies
from qwrap.importing.chains import Chain, moved_outputs
from qwrap.importing.reading import is_quantizer
from qwrap.importing.stripped import Stripped, Tap
from qwrap.quant.placement.forms import DEQUANTIZE


class Wiring:
    """Edits one draft, and keeps account of what reads conversions in it.

    Attributes:
        result: what was taken out; ``converted`` and ``Tap.outputs`` are written here.
        freed: constants that may have lost their last reader.
    """

    def __init__(self, draft: ir.Model, constants: Constants, result: Stripped) -> None:
        self.draft, self.constants, self.result = draft, constants, result
        self.freed: list[ir.Value | None] = []

    def redirect(self, node: ir.Node, value: ir.Value, conversion: Tap | None = None) -> None:
        """Let what reads the output of ``node`` read ``value``; graph outputs keep their names.

        Args:
            node: makes reals of codes.
            value: has these reals, or is what they are converted from.
            conversion: the conversion, if it is one.
        """
        result = node.outputs[0]
        if result.is_graph_output():
            output = self._output(node, value, conversion)
            value = output if conversion is None else value
        for use in tuple(result.uses()):
            user, index, source = use.node, use.idx, value
            if conversion is not None and any(True for _ in bodies(user)):
                source = self.identity(value, f"{label(user)}_{index}", user, conversion)
                user.replace_input_with(index, source)
            else:
                self.read(user, index, value, conversion)

    def _output(self, node: ir.Node, value: ir.Value, conversion: Tap | None) -> ir.Value:
        """Let ``value`` be the outputs of the graph that ``node`` makes; return which value is.

        It is a copy where ``value`` cannot be one, or where only the outputs of the whole graph
        can be conversions.
        """
        result = node.outputs[0]
        graph = result.graph
        assert graph is not None
        is_main = graph is self.draft.graph
        indices = {i for i, output in enumerate(graph.outputs) if output is result}
        if not _can_be_output(value, graph) or (conversion is not None and not is_main):
            value = self.identity(value, node.name, node, conversion)
        elif conversion is not None:
            conversion.outputs |= indices
        if is_main:
            value.name = result.name
        value.type, value.shape = result.type or value.type, result.shape or value.shape
        for i in indices:
            graph.outputs[i] = value
        result.name = None
        return value

    def identity(
        self,
        value: ir.Value,
        name: str | None,
        before: ir.Node,
        conversion: Tap | None = None,
        result: str | None = None,
    ) -> ir.Value:
        """Return a copy of a value, or of a conversion of it, made in front of a node."""
        node = ir.Node("", "Identity", [value], num_outputs=1, name=name)
        node.outputs[0].name = result or self.constants.unique_name(f"{value.name}_copy")
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        graph_of(before).insert_before(before, node)
        self.read(node, 0, value, conversion)
        return node.outputs[0]

    def read(self, node: ir.Node, index: int, value: ir.Value, conversion: Tap | None) -> None:
        """Let an input read ``value``, or a conversion of it."""
        node.replace_input_with(index, value)
        if conversion is not None:
            self.result.converted[node, index] = conversion

    def finish_movers(self, chain: Chain) -> None:
        """Let what moved codes move reals, in place."""
        real = chain.reading.real or ir.DataType.FLOAT
        for node in chain.movers:
            for value in moved_outputs(node):
                value.type = ir.TensorType(real)
            if node.op_type == "Pad" and len(node.inputs) > 2 and node.inputs[2] is not None:
                self.freed.append(node.inputs[2])
                node.replace_input_with(2, None)

    def remove(self, node: ir.Node) -> None:
        """Remove a node of a pair, and those that make scales of what is stored, in place."""
        makers = {value.producer() for value in node.inputs[1:] if value is not None}
        self.freed += node.inputs
        self.result.converted.pop((node, 0), None)
        graph_of(node).remove(node, safe=True)
        for maker in makers:
            made = maker is not None and (
                is_quantizer(maker, DEQUANTIZE) or maker.op_type == "Gather"
            )
            if maker is not None and made and not maker.outputs[0].uses():
                self.remove(maker)


def graph_of(node: ir.Node) -> ir.Graph:
    """Return the graph that a node is in."""
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _can_be_output(value: ir.Value, graph: ir.Graph) -> bool:
    """Whether a value may take the place of an output of ``graph``."""
    node = value.producer()
    return node is not None and node.graph is graph and not value.is_graph_output()
