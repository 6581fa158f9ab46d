"""Who makes and who reads each tensor of one graph."""

from __future__ import annotations

from onnx import GraphProto, NodeProto

from qwrap.graph import subgraphs
from qwrap.ort.graphs.scopes import captured_names


class GraphUses:
    """Makers and readers of the tensors of a graph, by name.

    Nodes that others append to the graph are taken up when the next question is asked. The
    messages are held, so that ``id(node)`` tells them apart for as long as this object lives.

    Attributes:
        inputs: names of graph inputs and initializers.
        outputs: names of graph outputs.
        captured: names that bodies of nodes read from this graph or those around it.
    """

    def __init__(self, graph: GraphProto) -> None:
        self._graph = graph
        self._nodes: list[NodeProto] = []
        self._makers: dict[str, list[NodeProto]] = {}
        self._readers: dict[str, list[NodeProto]] = {}
        self.inputs = {value.name for value in (*graph.input, *graph.initializer)}
        self.outputs = {value.name for value in graph.output}
        self.captured: set[str] = set()
        self._refresh()

    def nodes(self) -> list[NodeProto]:
        """Return the nodes, in graph order."""
        self._refresh()
        return self._nodes

    def makers(self, name: str) -> list[NodeProto]:
        """Return the nodes that make a tensor; several where activations were folded away."""
        self._refresh()
        return self._makers.get(name, [])

    def readers(self, name: str) -> list[NodeProto]:
        """Return the nodes that read a tensor, once for each input that does."""
        self._refresh()
        return self._readers.get(name, [])

    @property
    def reads(self) -> set[str]:
        """Names that nodes of this graph, or bodies in them, read."""
        return self._readers.keys() | self.captured

    def is_local(self, name: str) -> bool:
        """Whether this graph, not one around it, has the tensor."""
        return name in self.inputs or bool(self.makers(name))

    def is_made_output(self, name: str) -> bool:
        """Whether the tensor is a graph output that a node of this graph makes."""
        return name in self.outputs and bool(self.makers(name))

    def rename_output(self, old: str, new: str, keep: NodeProto | None = None) -> None:
        """Let those that make ``old`` make ``new``, in place; not the node ``keep``."""
        renamed = [node for node in self.makers(old) if node is not keep]
        self._makers[old] = [node for node in self._makers[old] if node is keep]
        for node in renamed:
            self._makers.setdefault(new, []).append(node)
            for index, name in enumerate(node.output):
                if name == old:
                    node.output[index] = new

    def reread(self, node: NodeProto, old: str, new: str) -> None:
        """Note that ``node`` now reads ``new`` in place of ``old``."""
        place = next(place for place, reader in enumerate(self.readers(old)) if reader is node)
        del self._readers[old][place]
        self._readers.setdefault(new, []).append(node)

    def _refresh(self) -> None:
        count = len(self._graph.node)
        if count == len(self._nodes):
            return
        self._nodes = list(self._graph.node)
        self._makers, self._readers, self.captured = {}, {}, set()
        for node in self._nodes:
            for name in filter(None, node.output):
                self._makers.setdefault(name, []).append(node)
            for name in filter(None, node.input):
                self._readers.setdefault(name, []).append(node)
            for body in subgraphs(node):
                self.captured |= captured_names(body)
