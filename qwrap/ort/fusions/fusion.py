"""The base of fusions: find patterns around a node, and replace each by another node."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from qwrap.graph import subgraphs
from qwrap.ort.errors import QuantizationError
from qwrap.ort.graphs.scopes import captured_names
from qwrap.ort.onnx_model import ONNXModel

Readers = Mapping[str, Sequence[onnx.NodeProto]]
Makers = Mapping[str, onnx.NodeProto]


class Fusion:
    """Replaces a pattern wherever it is found in the main graph.

    Attributes:
        model: what is changed.
        fused_op_type: operator that replaces the pattern.
        search_op_type: operator of the node from which the pattern is looked for.
        nodes_to_remove: nodes of the patterns found.
        nodes_to_add: what replaces them.
    """

    def __init__(self, model: ONNXModel, fused_op_type: str, search_op_type: str) -> None:
        self.search_op_type = search_op_type
        self.fused_op_type = fused_op_type
        self.model = model
        self.nodes_to_remove: list[onnx.NodeProto] = []
        self.nodes_to_add: list[onnx.NodeProto] = []
        self._new_node_name_prefix = f"{fused_op_type}_fused_{search_op_type}_"
        self._new_node_name_suffix: int | None = None
        self._needed: set[str] | None = None

    def fuse(
        self, node: onnx.NodeProto, input_name_to_nodes: Any, output_name_to_node: Any
    ) -> None:
        """Look for the pattern around ``node``; say what to remove and to add, in place.

        Raises:
            NotImplementedError: the class does not say how.
        """
        raise NotImplementedError(f"{type(self).__name__}.fuse() does not exist")

    def apply(self) -> bool:
        """Replace the pattern wherever it is found, in place; return whether it was found."""
        readers, makers = self.model.input_name_to_nodes(), self.model.output_name_to_node()
        for node in self.model.nodes():
            if node.op_type == self.search_op_type and node.domain in ("", "ai.onnx"):
                self.fuse(node, readers, makers)
        self.model.remove_nodes(self.nodes_to_remove)
        self.model.add_nodes(self.nodes_to_add)
        updated = bool(self.nodes_to_remove or self.nodes_to_add)
        if updated:
            self.model.remove_unused_constant()
        return updated

    def create_unique_node_name(self) -> str:
        """Return a name for a new node that no other has."""
        if self._new_node_name_suffix is None:
            largest = self.model.get_largest_node_name_suffix(self._new_node_name_prefix)
            self._new_node_name_suffix = largest + 1
        name = f"{self._new_node_name_prefix}{self._new_node_name_suffix}"
        self._new_node_name_suffix += 1
        return name

    def replace(
        self,
        nodes: Sequence[onnx.NodeProto],
        fused: onnx.NodeProto,
        input_name_to_nodes: Readers,
        output_name_to_node: Makers,
    ) -> bool:
        """Let ``fused`` take the place of ``nodes``, if nothing else needs what they compute."""
        taken = any(known == node for known in self.nodes_to_remove for node in nodes)
        needed = self._needed_elsewhere() - set(fused.output)
        if (
            taken
            or any(name in needed for node in nodes for name in node.output)
            or not self.is_safe_to_fuse_nodes(
                nodes, fused.output, input_name_to_nodes, output_name_to_node
            )
        ):
            return False
        self.nodes_to_remove.extend(nodes)
        self.nodes_to_add.append(fused)
        return True

    def _needed_elsewhere(self) -> set[str]:
        """Return what the graph gives out, and what bodies in it read."""
        if self._needed is None:
            graph = self.model.graph()
            self._needed = {value.name for value in graph.output}
            for node in graph.node:
                for body in subgraphs(node):
                    self._needed |= captured_names(body)
        return self._needed

    @staticmethod
    def is_safe_to_fuse_nodes(
        nodes_to_remove: Sequence[onnx.NodeProto],
        keep_outputs: Sequence[str],
        input_name_to_nodes: Readers,
        output_name_to_node: Makers,
    ) -> bool:
        """Whether no node outside ``nodes_to_remove`` reads what they make and others do not."""
        del output_name_to_node
        names = {name for node in nodes_to_remove for name in node.output} - set(keep_outputs)
        readers = [reader for name in names for reader in input_name_to_nodes.get(name, ())]
        return all(reader in nodes_to_remove for reader in readers)

    # --- what nodes and values say ---------------------------------------------------------------

    @staticmethod
    def get_node_attribute(node: onnx.NodeProto, attribute_name: str) -> Any:
        """Return the value of an attribute, None if it is not given."""
        for attribute in node.attribute:
            if attribute.name == attribute_name:
                return helper.get_attribute_value(attribute)
        return None

    @staticmethod
    def input_index(node_output: str, child_node: onnx.NodeProto) -> int:
        """Return which input of ``child_node`` reads ``node_output``; -1 if none."""
        names = list(child_node.input)
        return names.index(node_output) if node_output in names else -1

    @staticmethod
    def tensor_shape_to_list(tensor_type: Any) -> list[int | str]:
        """Return the dimensions of a tensor type: sizes, symbols, or ``?``."""
        return [
            d.dim_value if d.HasField("dim_value") else d.dim_param or "?"
            for d in tensor_type.shape.dim
        ]

    def get_constant_input(
        self, node: onnx.NodeProto
    ) -> tuple[int, NDArray[Any]] | tuple[None, None]:
        """Return the first constant input of ``node``, with its index."""
        for index, name in enumerate(node.input):
            value = self.model.get_constant_value(name)
            if value is not None:
                return index, value
        return None, None

    def find_constant_input(
        self, node: onnx.NodeProto, expected_value: float, delta: float = 0.000001
    ) -> int:
        """Return which input is a constant of about that single value; -1 if none."""
        index, value = self.get_constant_input(node)
        if index is None or value is None or value.size != 1:
            return -1
        return index if abs(float(value.reshape(())) - expected_value) < delta else -1

    def has_constant_input(
        self, node: onnx.NodeProto, expected_value: float, delta: float = 0.000001
    ) -> bool:
        """Whether an input of ``node`` is a constant of about that single value."""
        return self.find_constant_input(node, expected_value, delta) >= 0

    def is_constant_with_specified_rank(self, output_name: str, rank: int) -> bool:
        """Whether a value is a constant with ``rank`` dimensions."""
        value = self.model.get_constant_value(output_name)
        return value is not None and np.ndim(value) == rank

    # --- paths -----------------------------------------------------------------------------------

    def match_first_parent(
        self,
        node: onnx.NodeProto,
        parent_op_type: str,
        output_name_to_node: Makers | None = None,
        exclude: Sequence[onnx.NodeProto] = (),
    ) -> tuple[onnx.NodeProto | None, int | None]:
        """Return the first node of a type that makes an input of ``node``, and which input."""
        makers = (
            self.model.output_name_to_node()
            if output_name_to_node is None
            else (output_name_to_node)
        )
        for index, name in enumerate(node.input):
            parent = makers.get(name)
            if parent is not None and parent.op_type == parent_op_type and parent not in exclude:
                return parent, index
        return None, None

    def match_parent(
        self,
        node: onnx.NodeProto,
        parent_op_type: str,
        input_index: int | None = None,
        output_name_to_node: Makers | None = None,
        exclude: Sequence[onnx.NodeProto] = (),
        return_indice: list[int | None] | None = None,
    ) -> onnx.NodeProto | None:
        """Return the node of a type that makes an input of ``node``.

        Args:
            node: whose input it is.
            parent_op_type: its type.
            input_index: which input; None for the first that fits.
            output_name_to_node: the node that makes each value, if the caller has it.
            exclude: nodes that do not fit.
            return_indice: takes in which input it was, where ``input_index`` is None.
        """
        makers = (
            self.model.output_name_to_node()
            if output_name_to_node is None
            else (output_name_to_node)
        )
        if input_index is None:
            parent, index = self.match_first_parent(node, parent_op_type, makers, exclude)
            if return_indice is not None:
                return_indice.append(index)
            return parent
        parent = self.model.get_parent(node, input_index, makers)
        fits = parent is not None and parent.op_type == parent_op_type and parent not in exclude
        return parent if fits else None

    def match_parent_path(
        self,
        node: onnx.NodeProto,
        parent_op_types: Sequence[str],
        parent_input_index: Sequence[int | None] | None = None,
        output_name_to_node: Makers | None = None,
        return_indice: list[int | None] | None = None,
    ) -> list[onnx.NodeProto] | None:
        """Return the nodes found going up from ``node``, one of each type; None if one is not.

        Raises:
            QuantizationError: there are more types than inputs to follow, or fewer.
        """
        indices = (
            [None] * len(parent_op_types)
            if parent_input_index is None
            else (list(parent_input_index))
        )
        if len(indices) != len(parent_op_types):
            raise QuantizationError(
                f"{len(parent_op_types)} operator types, but {len(indices)} input indices"
            )
        makers = (
            self.model.output_name_to_node()
            if output_name_to_node is None
            else (output_name_to_node)
        )
        found: list[onnx.NodeProto] = []
        for op_type, index in zip(parent_op_types, indices, strict=True):
            below = found[-1] if found else node
            parent = self.match_parent(below, op_type, index, makers, return_indice=return_indice)
            if parent is None:
                return None
            found.append(parent)
        return found

    def match_parent_paths(
        self,
        node: onnx.NodeProto,
        paths: Sequence[tuple[Sequence[str], Sequence[int | None]]],
        output_name_to_node: Makers,
    ) -> tuple[int, list[onnx.NodeProto] | None, list[int | None] | None]:
        """Return which path is found first, its nodes and the inputs taken; -1 if none."""
        for number, (op_types, indices) in enumerate(paths):
            taken: list[int | None] = []
            found = self.match_parent_path(node, op_types, indices, output_name_to_node, taken)
            if found:
                return number, found, taken
        return -1, None, None

    def find_first_child_by_type(
        self,
        node: onnx.NodeProto,
        child_type: str,
        input_name_to_nodes: Any = None,
        recursive: bool = True,
    ) -> onnx.NodeProto | None:
        """Return a node of a type that reads what ``node`` computes, or, further down, others."""
        readers = (
            self.model.input_name_to_nodes()
            if input_name_to_nodes is None
            else (input_name_to_nodes)
        )
        waiting = deque(self.model.get_children(node, readers))
        seen: set[int] = set()
        while waiting:
            child = waiting.pop()
            if child.op_type == child_type:
                return child
            if recursive and id(child) not in seen:
                seen.add(id(child))
                waiting.extendleft(self.model.get_children(child, readers))
        return None
