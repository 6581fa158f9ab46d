"""A ModelProto with the look-ups and edits that quantizers need."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qwrap.ort.errors import InvalidModelError, QuantizationError
from qwrap.ort.files.proto_file import write_proto
from qwrap.ort.graphs.gemm_split import split_gemms
from qwrap.ort.graphs.name_index import NameIndex
from qwrap.ort.graphs.scopes import node_reads, rename_reads
from qwrap.ort.graphs.topology import sort_nodes
from qwrap.ort.graphs.unused import drop_unused

__all__ = ["ONNXModel"]

_FLOATS = {
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.BFLOAT16,
}


class ONNXModel:
    """A model that is edited in place, with what is found by name found without scans.

    The message may be edited by others too; what was indexed is looked at before it is used.

    Attributes:
        model: the message, which the caller goes on owning.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._initializers = NameIndex(lambda: self.model.graph.initializer)
        self._inputs = NameIndex(lambda: self.model.graph.input)
        self._outputs = NameIndex(lambda: self.model.graph.output)
        self._values = NameIndex(lambda: self.model.graph.value_info)

    # --- the message -----------------------------------------------------------------------------

    def nodes(self) -> Any:
        """Return the nodes of the main graph, as the message has them."""
        return self.model.graph.node

    def initializer(self) -> Any:
        """Return the initializers of the main graph, as the message has them."""
        return self.model.graph.initializer

    def graph(self) -> onnx.GraphProto:
        """Return the main graph."""
        return self.model.graph

    def ir_version(self) -> int:
        """Return the version of the file format."""
        return int(self.model.ir_version)

    def opset_import(self) -> Any:
        """Return the operator sets that the model imports, as the message has them."""
        return self.model.opset_import

    def set_opset_import(self, domain: str, version: int) -> None:
        """Let the model import ``version`` of ``domain``, in place."""
        for opset in self.model.opset_import:
            if opset.domain == domain:
                opset.version = version
                return
        self.model.opset_import.append(helper.make_opsetid(domain, version))

    # --- nodes -----------------------------------------------------------------------------------

    def remove_node(self, node: onnx.NodeProto) -> None:
        """Remove ``node``, in place; nothing if the graph does not have it."""
        if node in self.model.graph.node:
            self.model.graph.node.remove(node)

    def remove_nodes(self, nodes_to_remove: Iterable[onnx.NodeProto]) -> None:
        """Remove nodes, in place, in one pass."""
        leaving: dict[tuple[str, ...], list[onnx.NodeProto]] = {}
        for node in nodes_to_remove:
            leaving.setdefault((node.name, *node.output), []).append(node)
        graph = self.model.graph
        gone = []
        for position, node in enumerate(graph.node):
            candidates = leaving.get((node.name, *node.output), [])
            match = next((i for i, c in enumerate(candidates) if c == node), None)
            if match is not None:
                del candidates[match]
                gone.append(position)
        for position in reversed(gone):
            del graph.node[position]

    def add_node(self, node: onnx.NodeProto) -> None:
        """Append a copy of ``node``, in place.

        Raises:
            RuntimeError: it dequantizes from a float type.
        """
        self.model.graph.node.append(self._check_node(node))

    def add_nodes(self, nodes_to_add: Iterable[onnx.NodeProto]) -> None:
        """Append copies of nodes, in place."""
        for node in nodes_to_add:
            self.add_node(node)

    def find_node_by_name(
        self, node_name: str, new_nodes_list: Sequence[onnx.NodeProto], graph: onnx.GraphProto
    ) -> onnx.NodeProto | None:
        """Return the node of that name in ``graph`` or among new nodes."""
        candidates = (*graph.node, *new_nodes_list)
        return next((node for node in candidates if node.name == node_name), None)

    def get_largest_node_name_suffix(self, node_name_prefix: str) -> int:
        """Return the largest number behind the prefix in names of nodes; -1 if there is none.

        For nodes ``my_prefix_0`` and ``my_prefix_3`` and the prefix ``my_prefix_`` it is 3.
        """
        return _largest_suffix(self.model.graph.node, node_name_prefix)

    def topological_sort(self) -> None:
        """Put each node after those whose outputs it or a body in it reads, in place.

        Raises:
            InvalidModelError: nodes wait for each other or for what nothing makes.
        """
        sort_nodes(self.model.graph)

    def replace_gemm_with_matmul(self) -> None:
        """Replace each Gemm with alpha = beta = 1 and transA = 0 by MatMul and Add, in place.

        Bodies included. A weight that others read too keeps its values for them.
        """
        split_gemms(self.model.graph)
        self._initializers.forget()
        self._inputs.forget()

    # --- initializers ----------------------------------------------------------------------------

    def initializer_extend(self, inits: Sequence[onnx.TensorProto]) -> None:
        """Append initializers, in place.

        Raises:
            QuantizationError: there is none to add, or a float8 one holds a NaN (a ``ValueError``).
        """
        if len(inits) == 0:
            raise QuantizationError("initializer_extend() was given an empty list")
        self.model.graph.initializer.extend([self._check_init(init) for init in inits])

    def add_initializer(self, tensor: onnx.TensorProto) -> None:
        """Append an initializer, in place, unless there is one of its name."""
        if tensor.name not in self._initializers:
            self.model.graph.initializer.append(self._check_init(tensor))

    def get_initializer(self, name: str) -> onnx.TensorProto | None:
        """Return the initializer of that name."""
        return self._initializers.get(name)

    def get_initializer_name_set(self) -> set[str]:
        """Return the names of all initializers."""
        return {tensor.name for tensor in self.model.graph.initializer}

    def get_largest_initializer_name_suffix(self, initializer_name_prefix: str) -> int:
        """Return the largest number behind the prefix in names of initializers, or -1."""
        return _largest_suffix(self.model.graph.initializer, initializer_name_prefix)

    def remove_initializer(self, tensor: onnx.TensorProto) -> None:
        """Remove an initializer and the graph input of its name, in place."""
        self.remove_initializers([tensor])

    def remove_initializers(self, init_to_remove: Iterable[onnx.TensorProto]) -> None:
        """Remove initializers and the graph inputs of their names, in place."""
        gone = self._initializers.discard(init_to_remove)
        inputs = [self._inputs.get(name) for name in {tensor.name for tensor in gone}]
        self._inputs.discard([value for value in inputs if value is not None])

    def find_nodes_by_initializer(
        self, graph: onnx.GraphProto, initializer: onnx.TensorProto
    ) -> list[onnx.NodeProto]:
        """Return the nodes of ``graph`` that read ``initializer``, once for each input."""
        return [node for node in graph.node for name in node.input if name == initializer.name]

    def clean_initializers(self) -> tuple[onnx.GraphProto, set[str]]:
        """Remove unused initializers, in place, those of bodies included.

        Returns:
            The main graph; names that it reads and nothing makes.
        """
        missing = drop_unused(self.model.graph)
        self._initializers.forget()
        self._inputs.forget()
        return self.model.graph, missing

    def remove_unused_constant(self) -> None:
        """Remove Constant nodes and initializers that nothing reads, in place."""
        graph = self.model.graph
        read = {name for node in graph.node for name in node_reads(node)}
        read |= {value.name for value in graph.output}
        self.remove_nodes([
            n for n in graph.node if n.op_type == "Constant" and n.output[0] not in read
        ])
        self.remove_initializers([t for t in graph.initializer if t.name not in read])

    def get_constant_value(self, output_name: str) -> NDArray[Any] | None:
        """Return what a Constant node or an initializer of that name holds."""
        tensor = self.get_initializer(output_name)
        if tensor is None:
            nodes = (n for n in self.model.graph.node if n.op_type == "Constant")
            node = next((n for n in nodes if n.output[0] == output_name), None)
            values = () if node is None else node.attribute
            tensor = next((a.t for a in values if a.name == "value"), None)
        return None if tensor is None else numpy_helper.to_array(tensor)

    # --- values ----------------------------------------------------------------------------------

    def find_graph_input(self, input_name: str) -> onnx.ValueInfoProto | None:
        """Return the graph input of that name."""
        return self._inputs.get(input_name)

    def find_graph_output(self, output_name: str) -> onnx.ValueInfoProto | None:
        """Return the graph output of that name."""
        return self._outputs.get(output_name)

    def is_graph_output(self, output_name: str) -> bool:
        """Whether the main graph has such an output."""
        return output_name in self._outputs

    def is_graph_input(self, tensor_name: str) -> bool:
        """Whether the main graph has such an input."""
        return tensor_name in self._inputs

    def get_tensor_type(self, tensor_name: str) -> Any:
        """Return what the file declares of a value, a ``TypeProto.Tensor``; None if nothing."""
        for index in (self._values, self._inputs, self._outputs):
            found = index.get(tensor_name)
            if found is not None:
                return found.type.tensor_type
        return None

    def get_non_initializer_inputs(self) -> set[str]:
        """Return the names of graph inputs that no initializer gives a default."""
        return {value.name for value in self.model.graph.input} - self.get_initializer_name_set()

    # --- neighbours ------------------------------------------------------------------------------

    def input_name_to_nodes(self) -> dict[str, list[onnx.NodeProto]]:
        """Return the nodes that read each value, once for each input."""
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.model.graph.node:
            for name in node.input:
                if name:
                    readers.setdefault(name, []).append(node)
        return readers

    def output_name_to_node(self) -> dict[str, onnx.NodeProto]:
        """Return the node that makes each value."""
        return {name: node for node in self.model.graph.node for name in node.output if name}

    def get_children(
        self,
        node: onnx.NodeProto,
        input_name_to_nodes: Mapping[str, list[onnx.NodeProto]] | None = None,
    ) -> list[onnx.NodeProto]:
        """Return the nodes that read outputs of ``node``."""
        readers = self.input_name_to_nodes() if input_name_to_nodes is None else input_name_to_nodes
        return [reader for name in node.output for reader in readers.get(name, ())]

    def get_parents(
        self,
        node: onnx.NodeProto,
        output_name_to_node: Mapping[str, onnx.NodeProto] | None = None,
    ) -> list[onnx.NodeProto]:
        """Return the nodes that make the inputs of ``node``."""
        makers = self.output_name_to_node() if output_name_to_node is None else output_name_to_node
        return [makers[name] for name in node.input if name in makers]

    def get_parent(
        self,
        node: onnx.NodeProto,
        idx: int,
        output_name_to_node: Mapping[str, onnx.NodeProto] | None = None,
    ) -> onnx.NodeProto | None:
        """Return the node that makes input ``idx`` of ``node``."""
        makers = self.output_name_to_node() if output_name_to_node is None else output_name_to_node
        return makers.get(node.input[idx]) if idx < len(node.input) else None

    # --- renames ---------------------------------------------------------------------------------

    @staticmethod
    def replace_node_input(node: onnx.NodeProto, old_input_name: str, new_input_name: str) -> None:
        """Let ``node``, and the bodies in it, read another value, in place."""
        rename_reads(node, old_input_name, new_input_name)

    def replace_input_of_all_nodes(self, old_input_name: str, new_input_name: str) -> None:
        """Let all that read one value read another one, in place; bodies included."""
        for node in self.model.graph.node:
            rename_reads(node, old_input_name, new_input_name)

    def replace_input_of_nodes(
        self, old_input_name: str, new_input_name: str, node_names_set: Iterable[str]
    ) -> None:
        """Let the nodes of these names, and the bodies in them, read another value, in place."""
        names = set(node_names_set)
        for node in self.model.graph.node:
            if node.name in names:
                rename_reads(node, old_input_name, new_input_name)

    @staticmethod
    def replace_node_output(
        node: onnx.NodeProto, old_output_name: str, new_output_name: str
    ) -> None:
        """Rename an output of ``node``, in place; those that read it are left alone."""
        for index, name in enumerate(node.output):
            if name == old_output_name:
                node.output[index] = new_output_name

    def replace_output_of_all_nodes(self, old_output_name: str, new_output_name: str) -> None:
        """Rename an output of whichever node makes it, in place."""
        for node in self.model.graph.node:
            self.replace_node_output(node, old_output_name, new_output_name)

    def replace_output_of_nodes(
        self, old_output_name: str, new_output_name: str, node_names_set: Iterable[str]
    ) -> None:
        """Rename an output of the nodes of these names, in place."""
        names = set(node_names_set)
        for node in self.model.graph.node:
            if node.name in names:
                self.replace_node_output(node, old_output_name, new_output_name)

    # --- the file --------------------------------------------------------------------------------

    def save_model_to_file(
        self, output_path: str | os.PathLike[str], use_external_data_format: bool = False
    ) -> None:
        """Sort the nodes, in place, and write the model, all of it or nothing.

        Args:
            output_path: the file to make or replace.
            use_external_data_format: put weights into ``<name>.data`` beside it, which happens by
                itself to what is too large for one message. The model in memory keeps its weights.

        Raises:
            InvalidModelError: nodes wait for each other or for what nothing makes.
            ExportError: the folder does not exist or cannot be written to.
        """
        self.topological_sort()
        for tensor in self.model.graph.initializer:
            self._check_init(tensor)
        write_proto(self.model, output_path, external=use_external_data_format or None)

    def _check_init(self, init: onnx.TensorProto) -> onnx.TensorProto:
        if init.data_type == onnx.TensorProto.FLOAT8E4M3FN and init.HasField("raw_data"):
            codes = np.frombuffer(init.raw_data, np.uint8)
            if ((codes & 127) == 127).any():
                raise QuantizationError(f"Initializer {init.name!r} has nan.")
        return init

    def _check_node(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """Refuse a DequantizeLinear from a float type: such a bias is cast, not dequantized."""
        if node.op_type == "DequantizeLinear" and len(node.input) > 2:
            zero_point = self.get_initializer(node.input[2])
            if zero_point is not None and zero_point.data_type in _FLOATS:
                kind = onnx.TensorProto.DataType.Name(zero_point.data_type)
                raise InvalidModelError(
                    f"node '{node.name}': Unsupported DequantizeLinear operator, dequantization "
                    f"from {kind}."
                )
        return node


def _largest_suffix(named: Iterable[Any], prefix: str) -> int:
    """Return the largest integer behind ``prefix`` in the names; -1 if there is none."""
    largest = -1
    for element in named:
        if element.name.startswith(prefix):
            try:
                largest = max(largest, int(element.name[len(prefix) :]))
            except ValueError:
                continue
    return largest
