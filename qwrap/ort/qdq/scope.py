"""One graph that is being quantized, and the graphs around it and in it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, numpy_helper

from qwrap.graph import graphs as all_graphs
from qwrap.ort.base_quantizer import BaseQuantizer
from qwrap.ort.errors import InvalidModelError
from qwrap.ort.graphs.scopes import made_names
from qwrap.ort.graphs.tensor_names import (
    add_dequant_output_suffix,
    add_quant_input_suffix,
    add_quant_output_suffix,
)
from qwrap.ort.numbers.code_types import Array
from qwrap.ort.numbers.quantization_params import QuantizationParams
from qwrap.ort.onnx_model import ONNXModel
from qwrap.ort.qdq.edit import GraphEdit
from qwrap.ort.qdq.folding import FoldedActivations
from qwrap.ort.qdq.marks import (
    QDQBiasQuantInfo,
    QDQTensorQuantInfo,
    QDQTensorQuantizedValue,
    QDQTensorQuantParams,
)
from qwrap.ort.qdq.sharing import TensorScales
from qwrap.ort.qdq.uses import GraphUses

_SUFFIXES = (add_quant_input_suffix, add_quant_output_suffix, add_dequant_output_suffix)

logger = logging.getLogger(__name__)

_NUMPY: dict[int, Any] = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}


class QuantizedGraph(BaseQuantizer):
    """What is known and decided about the tensors of one graph.

    A body of If, Loop or Scan has a quantizer of its own, whose ``parent`` is that of the graph
    around it. Tensors belong to the graph that makes them; what a body says of a captured one is
    kept there.

    Attributes:
        uses: makers and readers of the graph's tensors.
        node_count: nodes that the float graph has.
        edit: changes to the graph.
        scales: initializers of scales and zero points.
        folded: activations that were folded into codes.
        bodies: quantizers of the bodies of a node, by its ``id``.
        unfused: ``id`` of nodes that onnxruntime may not fuse -> the input that is kept from it.
        bias_codes: names of the codes of biases that were written, None for those left float.
        refused: why tensors cannot be quantized, by name.
        quantized_nodes: nodes for which an operator class was called.
        current_node: the one for which it is being called.
    """

    quantization_params: dict[str, QDQTensorQuantParams]
    block_size: int
    dedicated_qdq_pair: bool
    add_qdq_pair_to_weight: bool
    qdq_op_domain: str | None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._taken: set[str] = set()
        for graph in all_graphs(self.model.graph()):
            self._taken |= made_names(graph)
        self.refused: dict[str, str] = {}
        self._excluded = frozenset(self.nodes_to_exclude or ())
        self._begin()

    def _begin(self) -> None:
        """Forget what is known of a graph, for another one."""
        self.tensors_to_quantize: dict[str, QDQTensorQuantInfo] = {}
        self.bias_to_quantize: dict[str, QDQBiasQuantInfo] = {}
        self.nodes_to_remove: list[NodeProto] = []
        self.tensor_to_its_receiving_nodes: dict[str, list[NodeProto]] = {}
        self.tensor_to_producing_dq: dict[str, NodeProto] = {}
        self.initializer_quant_params: dict[str, QuantizationParams] = {}
        self.quantized_value_map: dict[str, QDQTensorQuantizedValue] = {}
        self.unfused: dict[int, int] = {}
        self.bias_codes: dict[str, str | None] = {}
        self.quantized_nodes: list[NodeProto] = []
        self.current_node: NodeProto | None = None
        self.bodies: dict[int, list[Any]] = {}
        self.uses = GraphUses(self.model.graph())
        self.node_count = len(self.uses.nodes())
        self.edit = GraphEdit(self.uses, None if self.parent is None else self.parent.edit)
        self.scales = TensorScales(self)
        self.folded = FoldedActivations(self)
        self._dropped: list[TensorProto] = []
        self._numbers: dict[str, int] = {}
        self._stems: dict[str, str] = {}

    def for_body(self, model: ONNXModel) -> Any:
        """Return a quantizer, with the same settings, for a body in this graph.

        Args:
            model: whose main graph is a copy of the body.
        """
        body = copy.copy(self)
        body.parent = self
        body.model = model
        graph = model.graph()
        own = {value.name: value for value in (*graph.value_info, *graph.output, *graph.input)}
        body.value_infos = {**self.value_infos, **own}
        body.initializers = {**self.initializers, **{t.name: t for t in graph.initializer}}
        body._begin()
        return body

    def ranged_names(self) -> list[str]:
        """Return the tensors that have a range; in a body, those that it makes."""
        names = [] if self.tensors_range is None else list(self.tensors_range)
        return [name for name in names if self.parent is None or self.uses.is_local(name)]

    def graphs(self) -> Iterator[Any]:
        """Yield this quantizer and those of the bodies in its graph, outer ones first."""
        yield self
        for quantizers in self.bodies.values():
            for body in quantizers:
                yield from body.graphs()

    # --- tensors ---------------------------------------------------------------------------------

    def owner_of(self, name: str) -> Any:
        """Return the quantizer of the graph that has the tensor; this one if none does."""
        quantizer: Any = self
        while quantizer is not None and not quantizer.uses.is_local(name):
            quantizer = quantizer.parent
        return self if quantizer is None else quantizer

    def find_initializer(self, name: str) -> TensorProto | None:
        """Return the initializer of that name, of this graph or of one around it."""
        found: TensorProto | None = self.owner_of(name).model.get_initializer(name)
        return found

    def require_initializer(self, name: str) -> TensorProto:
        """Return the initializer of that name.

        Raises:
            InvalidModelError: there is none.
        """
        found = self.find_initializer(name)
        if found is None:
            raise InvalidModelError(f"the model has no initializer '{name}'")
        return found

    def is_input_a_initializer(self, input_name: str) -> bool:
        """Return whether a tensor is a constant, of this graph or of one around it."""
        return self.find_initializer(input_name) is not None

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is an initializer, or made of one by DequantizeLinear."""
        node = self.owner_of(name).tensor_to_producing_dq.get(name)
        return self.is_input_a_initializer(name if node is None else node.input[0])

    def is_quantizable(self, name: str) -> bool:
        """Whether a tensor is of float32 or float16; an unknown type is none, with a warning."""
        if name in self.refused:
            logger.warning("tensor '%s' stays float: %s", name, self.refused[name])
            return False
        kind = self.data_type_of(name)
        if kind is None:
            logger.warning(
                "failed to infer the type of tensor: %s. Skip to quantize it. Please check if it "
                "is expected.",
                name,
            )
        return kind in _NUMPY

    def data_type_of(self, name: str) -> int | None:
        """Return the ``TensorProto.DataType`` of a tensor; None if it is not known."""
        initializer = self.find_initializer(name)
        if initializer is not None:
            return int(initializer.data_type)
        value: ValueInfoProto | None = self.value_infos.get(name)
        if value is not None and value.type.HasField("tensor_type"):
            return int(value.type.tensor_type.elem_type)
        return self.extra_options.get("DefaultTensorType") if value is None else None

    def numpy_type(self, name: str) -> Any:
        """Return numpy's float type of a tensor; None if it is no float or not known."""
        return _NUMPY.get(self.data_type_of(name) or 0)

    def receivers(self, name: str) -> list[NodeProto]:
        """Return the nodes, each once, that were quantized and read a tensor of this graph."""
        found = {id(node): node for node in self.tensor_to_its_receiving_nodes.get(name, ())}
        return list(found.values())

    def readers(self, name: str) -> list[NodeProto]:
        """Return the nodes that read a tensor of this graph; those in bodies too if quantized."""
        found = list(self.uses.readers(name))
        for quantizers in self.bodies.values():
            for body in quantizers:
                if not body.uses.is_local(name):
                    found += body.readers(name)
        return found

    def graphs_that_read(self, name: str) -> list[Any]:
        """Return the quantizers of graphs where a constant of this graph is dequantized.

        That is this graph if a node of it reads the constant, or nobody does; else bodies, each on
        its own, for kernels of codes are found within a graph only.
        """
        if self.uses.readers(name) or name in self.uses.outputs:
            return [self]
        bodies = [body for bodies in self.bodies.values() for body in bodies]
        reading = [
            body for body in bodies if name in body.uses.reads and not body.uses.is_local(name)
        ]
        found = [graph for body in reading for graph in body.graphs_that_read(name)]
        return found or [self]

    def reader_named(self, node_name: str, tensor: str) -> tuple[NodeProto | None, int]:
        """Return the node of that name that reads a tensor, and as which input, the last one."""
        nodes = self.uses.readers(tensor)
        current = self.current_node
        if current is not None and any(node is current for node in nodes):
            nodes = [current, *nodes]
        for node in nodes:
            if node.name == node_name:
                return node, max(i for i, name in enumerate(node.input) if name == tensor)
        return None, -1

    def note_receiver(self, node: NodeProto) -> None:
        """Note that a node was quantized."""
        self.quantized_nodes.append(node)
        for name in filter(None, node.input):
            receiving = self.owner_of(name).tensor_to_its_receiving_nodes
            receiving.setdefault(name, []).append(node)

    # --- who reads floats ------------------------------------------------------------------------

    def is_excluded(self, node: NodeProto) -> bool:
        """Whether a node was excluded by its name: it reads and writes floats."""
        return bool(node.name) and node.name in self._excluded

    def is_left_float(self, name: str) -> bool:
        """Whether an excluded node makes a tensor: only readers that are quantized read codes."""
        return any(self.is_excluded(node) for node in self.uses.makers(name))

    def is_renamed_output(self, name: str) -> bool:
        """Whether a DequantizeLinear takes the name of a graph output."""
        return self.uses.is_made_output(name) and not self.is_left_float(name)

    def is_read(self, name: str) -> bool:
        """Whether someone reads the codes of a marked tensor, or nobody reads it at all."""
        if self.is_left_float(name):
            return bool(self.receivers(name))
        readers = self.readers(name)
        if not readers or self.is_renamed_output(name):
            return True
        return any(not self.is_excluded(node) for node in readers)

    def is_only_read_as_codes(self, name: str) -> bool:
        """Whether a tensor was marked and all that read it, bodies included, read codes."""
        if name not in self.tensors_to_quantize:
            return False
        receivers, readers = self.receivers(name), self.readers(name)
        if any(self.is_excluded(node) for node in readers):
            return False
        captured = name in self.uses.captured
        if self.dedicated_qdq_pair and len(receivers) > 1:
            everyone = {id(node) for node in readers} == {id(node) for node in receivers}
            return everyone and not captured and name not in self.uses.outputs
        return not captured or self.enable_subgraph_quantization or self.is_renamed_output(name)

    def keep_node(self, node: NodeProto) -> None:
        """Do not remove a node after all."""
        self.nodes_to_remove = [other for other in self.nodes_to_remove if other is not node]

    # --- initializers ----------------------------------------------------------------------------

    def scale_of(self, name: str, node_name: str) -> Array | None:
        """Return the scale with which the node of that name reads a tensor; None if it has none."""
        owner = self.owner_of(name)
        if name in owner.initializer_quant_params:
            scale: Array = owner.initializer_quant_params[name]["scale"]
            return scale
        found = owner.scales.find(name)
        return (
            None
            if found is None
            else numpy_helper.to_array(found.get_for_consumer(node_name).scale)
        )

    def add_tensors(self, *tensors: TensorProto) -> None:
        """Add initializers to the graph, in place."""
        self.model.initializer_extend(tensors)

    def copy_initializer(self, tensor: TensorProto) -> str:
        """Add a copy of an initializer, in place; return its name, with a number behind it."""
        copied = TensorProto()
        copied.CopyFrom(tensor)
        copied.name = self._numbered(tensor.name)
        self.model.add_initializer(copied)
        self.uses.inputs.add(copied.name)
        return copied.name

    def _numbered(self, name: str) -> str:
        number = self._numbers.get(name)
        if number is None:
            number = self.model.get_largest_initializer_name_suffix(name)
        number += 1
        while f"{name}{number}" in self._taken:
            number += 1
        self._numbers[name] = number
        self._taken.add(f"{name}{number}")
        return f"{name}{number}"

    def own_bias(self, name: str, info: QDQBiasQuantInfo) -> str | None:
        """Return the name that the float bias of a node gets; None if it cannot have one.

        It is that of the initializer, which is dropped, unless others go on reading that.
        """
        readers = self.uses.readers(name)
        excluded = any(self.is_excluded(node) for node in readers)
        if name not in self.tensors_to_quantize and not excluded:
            self._dropped.append(self.require_initializer(name))
            return name
        if info.node is None:
            return None
        own = self._numbered(name)
        self.edit.input_reads[id(info.node), info.position] = own
        return own

    def drop_initializers(self) -> None:
        """Remove, in place, the initializers whose names went to dequantized biases."""
        self.model.remove_initializers(self._dropped)

    # --- names -----------------------------------------------------------------------------------

    def stem(self, name: str) -> str:
        """Return what names of the nodes and values of a tensor's pair begin with: its own name.

        A number follows where the float model has values of these names, from pairs of its own.
        """
        if name not in self._stems:
            found, number = name, 0
            while any(suffix(found) in self._taken for suffix in _SUFFIXES):
                number += 1
                found = f"{name}_{number}"
            self._stems[name] = found
        return self._stems[name]

    def free_name(self, name: str) -> str:
        """Return a name that no tensor of the float model has: ``name``, or with a number."""
        found, number = name, 0
        while found in self._taken:
            number += 1
            found = f"{name}_{number}"
        return found
