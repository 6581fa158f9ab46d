"""Put codes in the place of the float values of a cache."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from qwrap.graph.constants import Constants
from qwrap.graph.index import walk_nodes
from qwrap.kv_cache.codes import Chain, Code
from qwrap.kv_cache.fold import Folds
from qwrap.kv_cache.grids import Grids, Lie
from qwrap.kv_cache.operators import give_codes
from qwrap.kv_cache.route import asks_shape, data_inputs
from qwrap.kv_cache.way import Way

_SHAPE_ENDS = ("start", "end")

Use = tuple[ir.Node, int]


class Rewriter:
    """Edits one draft, in place."""

    def __init__(self, model: ir.Model, constants: Constants, grids: Grids) -> None:
        self._model, self._constants = model, constants
        self._folds = Folds(grids, constants)

    def rewrite(self, way: Way, code: Code) -> None:
        """Let the ends of a cache be codes, in place; their names stay."""
        if way.form == "codes":
            self._carry(way, code)
        elif way.form == "operator":
            give_codes(way, code, self._model, self._constants)
            for value in way.pair.values:
                self._retype(value, way.lies[value], code)
        else:
            self._requantize(way, code)

    def _chain(self, value: ir.Value) -> Chain:
        return Chain(self._model, self._constants, value.name or "cache")

    # --- codes beside codes ----------------------------------------------------------------------

    def _carry(self, way: Way, code: Code) -> None:
        route = way.route
        moving = {(node, i) for node in route.nodes for i in data_inputs(node)}
        for value in route.values:
            uses = [use for use in value.uses() if tuple(use) not in moving]
            self._read(value, way.lies[value], code, uses)
        for node in route.nodes:
            self._write_inputs(way, node, code)
        for value in route.values:
            self._retype(value, way.lies[value], code)

    def _write_inputs(self, way: Way, node: ir.Node, code: Code) -> None:
        """Make codes of what ``node`` puts beside those of the past."""
        if node.op_type == "If":
            self._write_bodies(way, node, code)
            return
        graph = _graph(node)
        for index in data_inputs(node):
            value = node.inputs[index]
            if value is None or value in way.route.values:
                continue
            chain = self._chain(value)
            codes = code.write(chain, value, way.lies[value])
            graph.insert_before(node, chain.nodes)
            node.replace_input_with(index, codes)

    def _write_bodies(self, way: Way, node: ir.Node, code: Code) -> None:
        for attribute in node.attributes.values():
            if attribute.type != ir.AttributeType.GRAPH:
                continue
            body = attribute.as_graph()
            for index, output in enumerate(node.outputs):
                value = body.outputs[index]
                if output in way.route.values and value not in way.route.values:
                    chain = self._chain(value)
                    codes = code.write(chain, value, way.lies[value])
                    body.extend(chain.nodes)
                    body.outputs[index] = codes
                    codes.type = ir.TensorType(code.stored)

    # --- the whole cache anew --------------------------------------------------------------------

    def _requantize(self, way: Way, code: Code) -> None:
        past, present = way.pair.past, way.pair.present
        if present is not None:
            self._write_output(present, way.lies[present], code)
        if past is not None:
            lie = way.lies[past]
            self._read(past, lie, code, list(past.uses()))
            self._retype(past, lie, code)

    def _write_output(self, value: ir.Value, lie: Lie, code: Code) -> None:
        """Let a graph output be the codes of what it was."""
        graph, name = self._model.graph, value.name or ""
        chain = self._chain(value)
        value.name = self._constants.unique_name(f"{name}_float")
        codes = code.write(chain, value, lie)
        graph.extend(chain.nodes)
        graph.outputs[list(graph.outputs).index(value)] = codes
        codes.name, codes.shape, codes.doc_string = name, value.shape, value.doc_string
        codes.metadata_props.update(value.metadata_props)
        self._retype(codes, lie, code)

    # --- values ----------------------------------------------------------------------------------

    def _read(self, value: ir.Value, lie: Lie, code: Code, uses: Iterable[Use]) -> None:
        """Give what reads ``value`` the float values of its codes, once a graph."""
        wanted = [use for use in uses if not asks_shape(use[0])]
        owner = _owner(value, self._model.graph)
        groups: dict[ir.Graph, list[Use]] = {}
        for node, index in wanted:
            groups.setdefault(_graph(node), []).append((node, index))
        if owner in groups:  # bodies read it from there
            groups = {owner: [use for group in groups.values() for use in group]}
        for graph, group in groups.items():
            chain, grid = self._chain(value), code.grid(lie)
            factors = None if grid is None else self._folds.factors(group, grid)
            read = code.read if factors is None else code.steps
            made = read(chain, value, lie)
            self._place(graph, value, chain)
            for node, index in group:
                node.replace_input_with(index, made)
            for factor in factors or ():
                self._folds.apply(factor, self._chain(value), code.real)
        for body, index in self._given_out(value):
            chain = self._chain(value)
            made = code.read(chain, value, lie)
            body.extend(chain.nodes)
            made.type = ir.TensorType(code.real)
            body.outputs[index] = made

    def _place(self, graph: ir.Graph, value: ir.Value, chain: Chain) -> None:
        producer = value.producer()
        if producer is not None and producer.graph is graph:
            graph.insert_after(producer, chain.nodes)
        else:
            graph.insert_before(graph[0], chain.nodes)

    def _given_out(self, value: ir.Value) -> list[tuple[ir.Graph, int]]:
        """Return the bodies that give out ``value`` as it came in."""
        if not value.is_graph_output() or not value.is_graph_input():
            return []
        bodies = [
            attribute.as_graph()
            for node in walk_nodes(self._model.graph)
            for attribute in node.attributes.values()
            if attribute.type == ir.AttributeType.GRAPH
        ]
        return [(b, i) for b in bodies for i, v in enumerate(b.outputs) if v is value]

    def _unpack_shape(self, node: ir.Node, rank: int, axis: int) -> None:
        """Let a Shape of packed codes say what the shape of the values is."""
        ends = [node.attributes[n].as_int() if n in node.attributes else None for n in _SHAPE_ENDS]
        factors = np.where(np.arange(rank) == axis, 2, 1)[slice(*ends)]
        shape, chain = node.outputs[0], self._chain(node.outputs[0])
        readers = list(shape.uses())
        made = chain.op("Mul", [shape, chain.constant("packed", factors)])
        _graph(node).insert_after(node, chain.nodes)
        for reader, index in readers:
            reader.replace_input_with(index, made)

    def _retype(self, value: ir.Value, lie: Lie, code: Code) -> None:
        value.type = ir.TensorType(code.stored)
        axis = code.packed_axis(lie)
        if axis is None:
            return
        for node, _ in value.uses():
            if asks_shape(node):
                self._unpack_shape(node, lie.rank, axis)
        if value.shape is None:
            return
        sizes: list[int | ir.SymbolicDim | None] = list(value.shape)
        size = sizes[axis]
        sizes[axis] = size // 2 if isinstance(size, int) else None
        value.shape = ir.Shape(sizes)


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _owner(value: ir.Value, main: ir.Graph) -> ir.Graph:
    producer = value.producer()
    return main if producer is None else _graph(producer)
