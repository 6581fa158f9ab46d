"""A model whose weights and nodes give way to quantized ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.errors import ModelError
from qwrap.graph.constants import Constants
from qwrap.graph.external import FileTensor
from qwrap.graph.index import FLOATS, Types, ValueType, infer_types
from qwrap.graph.nodes import STANDARD
from qwrap.model.tensors import from_numpy, to_torch

Array = npt.NDArray[Any]
Store = Callable[[str, Array], ir.TensorProtocol]
MICROSOFT = "com.microsoft"


def in_memory(name: str, array: Array) -> ir.TensorProtocol:
    """Keep what is to be an initialiser in memory."""
    return ir.tensor(np.ascontiguousarray(array), name=name)


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant float tensor that a node reads.

    Attributes:
        value: of the initialiser or of the Constant node.
        tensor: its data, perhaps in a file.
        graph: where it is defined, and where what replaces it goes.
        turned: whether the node reads its transpose.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    graph: ir.Graph
    turned: bool = False

    @property
    def name(self) -> str:
        """What names of its quantized parts begin with."""
        return self.value.name or ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions, as the node reads it."""
        sizes = tuple(int(n) for n in self.tensor.shape.numpy())
        return sizes[::-1] if self.turned else sizes

    def read(self) -> Tensor:
        """Return a copy in memory of its own, which goes when the copy goes.

        Raises:
            ModelError: the data cannot be read.
        """
        values = self._read()
        return values.T if self.turned else values

    def _read(self) -> Tensor:
        tensor = self.tensor
        if not isinstance(tensor, FileTensor) or not tensor.is_plain:
            return torch.as_tensor(to_torch(tensor))
        # Not a view of the mapped file, whose pages would count as this process's memory for good.
        raw, end = np.empty(tensor.nbytes, np.uint8), 0
        try:
            for block in tensor.file.blocks(tensor.start, tensor.nbytes):
                raw[end : end + len(block)] = np.frombuffer(block, np.uint8)
                end += len(block)
        except OSError as error:
            raise ModelError(f"tensor {self.name!r}: its data cannot be read: {error}") from error
        array = raw.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy())
        return torch.as_tensor(from_numpy(array, tensor.dtype, self.name))


class Draft:
    """Replaces nodes of ``model``, in place, and keeps what was made of a weight for its others.

    Attributes:
        model: being edited.
        made: what was made of weights, by whatever distinguishes it: of one weight one copy.
    """

    def __init__(
        self, model: ir.Model, store: Store = in_memory, *, through_transpose: bool = True
    ) -> None:
        self.model, self.made = model, dict[Any, Any]()
        self._through_transpose = through_transpose
        self._constants, self._store = Constants(model), store
        self._types: Types = {}

    def weight(self, value: ir.Value | None) -> Weight | None:
        """Return the float constant that ``value`` is, None if it is none.

        It may lie behind Identity, and as a matrix, if the draft looks there, behind Transpose.
        """
        turned = False
        while value is not None and (producer := self._mover(value)) is not None:
            turned ^= producer.op_type == "Transpose"
            value = producer.inputs[0]
        tensor = self._constants.tensor(value)
        if value is None or tensor is None or tensor.dtype not in FLOATS or not value.name:
            return None
        producer = value.producer()
        graph = value.graph if producer is None else producer.graph
        return Weight(value, tensor, graph, turned) if isinstance(graph, ir.Graph) else None

    def type_of(self, value: ir.Value) -> ValueType:
        """Return what is known of a value."""
        return self._types.get(value, ValueType())

    def learn_types(self) -> None:
        """Infer types and shapes; afterwards nodes may be there that inference does not know."""
        self._types = infer_types(self.model)

    # --- what is new -----------------------------------------------------------------------------

    def constant(self, graph: ir.Graph, name: str, array: Array) -> ir.Value:
        """Make an initialiser called ``name``, or like it if something is called that."""
        name = self._constants.unique_name(name)
        return self._constants.add_tensor(graph, self._store(name, array))

    def constant_in(self, graph: ir.Graph, value: ir.Value) -> ir.Value:
        """Return an initialiser as one of ``graph``; in a file, its data is there once."""
        if value.graph is graph:
            return value
        tensor, name = value.const_value, self._constants.unique_name(value.name or "")
        assert tensor is not None
        if not isinstance(tensor, ir.ExternalTensor):
            return self._constants.add_tensor(graph, in_memory(name, tensor.numpy()))
        same = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=name,
            base_dir=tensor.base_dir,
        )
        return self._constants.add_tensor(graph, same)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        output: str,
        *,
        name: str = "",
        domain: str = "",
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Node:
        """Make a node with one output, called ``output`` or like it; it is in no graph yet."""
        value = ir.Value(name=self._constants.unique_name(output))
        given = [ir.AttrInt64(key, number) for key, number in (attributes or {}).items()]
        if domain:
            self.model.opset_imports.setdefault(domain, 1)
        return ir.Node(domain, op_type, inputs, given, outputs=[value], name=name)

    def replace(self, node: ir.Node, nodes: Sequence[ir.Node]) -> None:
        """Put ``nodes`` in the place of ``node``, in place; the last one makes its output."""
        graph, old, new = node.graph, node.outputs[0], nodes[-1].outputs[0]
        assert isinstance(graph, ir.Graph)
        for added in nodes:
            added.metadata_props.update(node.metadata_props)
        inputs = tuple(node.inputs)
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [old], [new])
        if old in self._types:
            self._types[new] = self._types[old]
        self._drop(inputs)

    def _drop(self, values: Sequence[ir.Value | None]) -> None:
        """Remove constants that nothing reads any more, and what moved them to the node."""
        for value in values:
            producer = None if value is None else self._mover(value)
            if value is None or producer is None:
                self._constants.drop_unused([value])
            elif not value.uses() and not value.is_graph_output():
                graph, inputs = producer.graph, tuple(producer.inputs)
                assert isinstance(graph, ir.Graph)
                graph.remove(producer, safe=True)
                self._drop(inputs)

    def _mover(self, value: ir.Value) -> ir.Node | None:
        """Return the node behind which ``value`` is a constant as well, if it is a known one."""
        node = value.producer()
        if node is None or node.domain not in STANDARD or node.graph is None:
            return None
        if node.op_type == "Transpose" and self._through_transpose:
            perm = node.attributes.get("perm")
            source = self._constants.tensor(node.inputs[0])
            is_matrix = source is not None and len(source.shape.numpy()) == 2
            swaps = perm is None or list(perm.as_ints()) == [1, 0]
            return node if is_matrix and swaps else None
        return node if node.op_type == "Identity" else None
