"""The changes that quantizing makes to one graph, collected and then written in one pass."""

from __future__ import annotations

from collections.abc import Callable

from onnx import GraphProto, NodeProto

from qwrap.ort.qdq.uses import GraphUses


class GraphEdit:
    """New nodes and names of one graph, by the tensor they are for.

    Attributes:
        outer: changes of the graph around this one, which knows captured tensors.
        reads: what nodes read in place of a tensor.
        node_reads: what one node does, by ``(id(node), tensor)``; before ``reads``.
        input_reads: what one input does, by ``(id(node), position)``; before both.
        floats: name of the float tensor, where its own name went to a DequantizeLinear.
    """

    def __init__(self, uses: GraphUses, outer: GraphEdit | None = None) -> None:
        self._uses = uses
        self.outer = outer
        self.reads: dict[str, str] = {}
        self.node_reads: dict[tuple[int, str], str] = {}
        self.input_reads: dict[tuple[int, int], str] = {}
        self.floats: dict[str, str] = {}
        self._first: list[NodeProto] = []
        self._after: dict[str, list[NodeProto]] = {}
        self._before: dict[int, list[NodeProto]] = {}

    def insert(self, tensor: str, nodes: list[NodeProto]) -> None:
        """Put nodes behind the one that makes ``tensor``, or first where none does."""
        if self._uses.makers(tensor):
            self._after.setdefault(tensor, []).extend(nodes)
        else:
            self._first.extend(nodes)

    def insert_before(self, node: NodeProto, position: int, added: NodeProto) -> None:
        """Put a node of one input and one output between ``node`` and one of its inputs."""
        source = self.input_reads.get((id(node), position))
        added.input[0] = source or self.read_by(node, node.input[position], as_float=False)
        self.input_reads[id(node), position] = added.output[0]
        self._before.setdefault(id(node), []).append(added)

    def _rename_reads(self, node: NodeProto, as_float: bool) -> None:
        for position, name in enumerate(node.input):
            if name:
                own = self.input_reads.get((id(node), position))
                new = own or self.read_by(node, name, as_float)
                if new != name:
                    node.input[position] = new

    def read_by(self, node: NodeProto, tensor: str, as_float: bool) -> str:
        """Return the name under which ``node`` of this graph or a body reads ``tensor``."""
        here = tensor in self.reads or self._uses.is_local(tensor)
        if self.outer is not None and not here:
            return self.outer.read_by(node, tensor, as_float)
        if as_float:
            return self.floats.get(tensor, tensor)
        own = self.node_reads.get((id(node), tensor))
        return self.reads.get(tensor, tensor) if own is None else own

    def write(
        self, graph: GraphProto, gone: set[int], reads_float: Callable[[NodeProto], bool]
    ) -> None:
        """Rewrite the nodes of ``graph``, in place.

        Args:
            graph: the one that these changes were collected for.
            gone: ``id`` of nodes that are left out.
            reads_float: whether a node reads float tensors whatever others read.
        """
        written = list(self._first)
        for node in self._uses.nodes():
            if id(node) in gone:
                continue
            self._rename_reads(node, reads_float(node))
            behind = [added for name in node.output for added in self._after.get(name, ())]
            for position, name in enumerate(node.output):
                if name in self.floats:
                    node.output[position] = self.floats[name]
            written += [*self._before.get(id(node), ()), node, *behind]
        del graph.node[:]
        graph.node.extend(written)
