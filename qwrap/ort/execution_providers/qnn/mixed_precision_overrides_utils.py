"""Overrides of single tensors made whole: what their neighbours need, and where types change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from qwrap.ort.enums import QuantType
from qwrap.ort.errors import QuantizationError
from qwrap.ort.files.model_io import declare_types
from qwrap.ort.tensor_quant_overrides import QuantTypeInfo, TensorQuantOverridesHelper

__all__ = ["MixedPrecisionTensorQuantOverridesFixer", "TensorTypeRequest"]

_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
_MOVES_VALUES = frozenset({
    *("DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice"),
    *("SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
})  # fmt: skip
"""Operators whose output holds values of their first input: it has no more bits than that."""


@dataclass
class TensorTypeRequest:
    """The types that the nodes around a tensor want of it.

    Attributes:
        producer: type in which it is made; None for the default of activations.
        consumers: type in which some nodes read it, and the names of these; None for the default.
    """

    producer: QuantTypeInfo | None
    consumers: tuple[QuantTypeInfo, set[str]] | None


class MixedPrecisionTensorQuantOverridesFixer:
    """Completes overrides that give some activations another type, in place.

    A node computes in one type. So the nodes that make or read an overridden tensor read and make
    their other activations in that type too, and these are converted where other nodes need the
    default. Where a node only moves values, such as Reshape, its input gets the type as well, up
    to the node that computed them, unless that contradicts another override.

    In this model, quantized to uint8, with ``{"Op4_out": [{"quant_type": QUInt16}]}``::

        input_0 --> Op1 --> Op3 --> Op5 --> Op6 --> output_0
                                     ^
        input_1 --> Op2 -+-> Op4 ----+
                         +-> Op7 --> output_1
                         +-> Op8 --> output_2

    the overrides become::

        Op2_out: QUInt8, converted to QUInt16 for Op4
        Op3_out: QUInt8, converted to QUInt16 for Op5
        Op4_out: QUInt16
        Op5_out: QUInt16, converted to QUInt8 for Op6

    Args:
        overrides: changed by ``apply``.
        producers: tensor -> the node that makes it.
        consumers: tensor -> the nodes that read it.
        value_infos: tensor -> its declared type.
        initializers: constants by name.
    """

    def __init__(
        self,
        overrides: TensorQuantOverridesHelper,
        producers: dict[str, onnx.NodeProto],
        consumers: dict[str, list[onnx.NodeProto]],
        value_infos: dict[str, onnx.ValueInfoProto],
        initializers: dict[str, onnx.TensorProto],
    ) -> None:
        self.overrides = overrides
        self.producers = producers
        self.consumers = consumers
        self.value_infos = value_infos
        self.initializers = initializers

    @staticmethod
    def create_from_model(
        overrides: TensorQuantOverridesHelper,
        model: onnx.ModelProto,
        default_activation_qtype: QuantType,
    ) -> MixedPrecisionTensorQuantOverridesFixer:
        """Return a fixer for ``model``, which stays as it is.

        Args:
            overrides: to complete.
            model: whose tensors they are of.
            default_activation_qtype: type of activations of which nothing is said.

        Raises:
            QuantizationError: the overrides do not fit the model (a ``ValueError``).
        """
        own = onnx.ModelProto()
        own.CopyFrom(model)
        declare_types(own)
        graph = own.graph
        initializers = {tensor.name: tensor for tensor in graph.initializer}
        value_infos = {v.name: v for v in (*graph.value_info, *graph.output, *graph.input)}
        consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                if name:
                    consumers.setdefault(name, []).append(node)
        producers = {name: node for node in graph.node for name in node.output if name}
        fixer = MixedPrecisionTensorQuantOverridesFixer(
            overrides, producers, consumers, value_infos, initializers
        )
        fixer._check(default_activation_qtype)
        return fixer

    def apply(
        self, default_activation_qtype: QuantType, default_activation_symmetric: bool
    ) -> None:
        """Complete the overrides, in place.

        Args:
            default_activation_qtype: type of activations of which nothing is said.
            default_activation_symmetric: whether these are symmetric.

        Raises:
            QuantizationError: two overrides ask different types of one node, a node that is to be
                named in ``recv_nodes`` has no name, or the result makes no sense.
        """
        requests = self.get_desired_tensor_types(
            default_activation_qtype, default_activation_symmetric
        )
        default = QuantTypeInfo(default_activation_qtype)
        for name, request in requests.items():
            if request.producer is not None and request.consumers is not None:
                self._both(name, request.producer, request.consumers, default)
            elif request.producer is not None:
                readers = {node.name for node in self.consumers.get(name, ())}
                self._convert(name, request.producer, default, readers)
            elif request.consumers is not None:
                self._only_consumers(name, request.consumers, default_activation_qtype)
            else:
                raise QuantizationError(
                    f"TypeRequest for tensor {name} has no producer or consumers."
                )
        self._check(default_activation_qtype)

    def get_desired_tensor_types(
        self, default_activation_qtype: QuantType, default_activation_symmetric: bool
    ) -> dict[str, TensorTypeRequest]:
        """Return the types that the overrides ask of tensors, by name; see ``apply``."""
        default = QuantTypeInfo(default_activation_qtype, default_activation_symmetric)
        requests: dict[str, TensorTypeRequest] = {}
        asked = list(self._asked(default))
        for name, info in asked:
            if name in self.producers:
                self._add_type_requests_for_node(requests, info, self.producers[name])
            for node in self.consumers.get(name, ()):
                self._add_type_requests_for_node(requests, info, node)
        for name, info in asked:
            for node in self._sources(name):
                if self._contradicts(requests, info, node):
                    break
                self._add_type_requests_for_node(requests, info, node)
        return requests

    # --- what is asked ---------------------------------------------------------------------------

    def _asked(self, default: QuantTypeInfo) -> Iterator[tuple[str, QuantTypeInfo]]:
        """Yield the activations that are overridden with another type and nothing else yet."""
        for name, entries in self.overrides.items():
            if not self._is_activation(name) or len(entries) != 1 or "convert" in entries[0]:
                continue
            info = QuantTypeInfo.load_from_dict(entries[0], default.quant_type)
            if info != default:
                yield name, info

    def _sources(self, name: str) -> Iterator[onnx.NodeProto]:
        """Yield the nodes above a tensor up to the one that computed its values."""
        node = self.producers.get(name)
        while node is not None and node.op_type in _MOVES_VALUES and node.domain in ("", "ai.onnx"):
            above = node.input[0]
            if not self._is_activation(above) or above in self.overrides:
                return
            node = self.producers.get(above)
            if node is not None:
                yield node

    def _contradicts(
        self, requests: dict[str, TensorTypeRequest], info: QuantTypeInfo, node: onnx.NodeProto
    ) -> bool:
        """Whether a node cannot compute in a type without contradicting what else is asked."""
        if not node.name:
            return True
        for name in filter(self._is_activation, node.output):
            request = requests.get(name)
            if request is not None and request.producer not in (None, info):
                return True
            if name in self.overrides:
                return True
        for name in filter(self._is_activation, node.input):
            request = requests.get(name)
            wanted = None if request is None else request.consumers
            if wanted is not None and wanted[0] != info:
                return True
            if self.overrides.get(name):
                return True
        return False

    def _add_type_requests_for_node(
        self,
        type_requests: dict[str, TensorTypeRequest],
        quant_type_info: QuantTypeInfo,
        node: onnx.NodeProto,
    ) -> None:
        """Ask one type of all activations that ``node`` makes and reads, in place."""
        for name in filter(self._is_quantizable, node.output):
            request = type_requests.setdefault(name, TensorTypeRequest(None, None))
            if request.producer is not None and request.producer != quant_type_info:
                raise QuantizationError(
                    f"Tensor {name} has multiple types. Overrides ask {request.producer} and "
                    f"{quant_type_info} of node '{node.name}'"
                )
            request.producer = quant_type_info
        for name in filter(self._is_activation, node.input):
            request = type_requests.setdefault(name, TensorTypeRequest(None, None))
            if request.consumers is None:
                request.consumers = quant_type_info, set()
            if request.consumers[0] != quant_type_info:
                raise QuantizationError(
                    f"Tensor {name} has consumers requesting different types. Node "
                    f"'{node.name}' asks {quant_type_info}, {sorted(request.consumers[1])} ask "
                    f"{request.consumers[0]}"
                )
            if not node.name:
                raise QuantizationError(
                    f"Node of type {node.op_type} with output 0 {node.output[0]} does not have a "
                    "name! Name it, for example with qnn_preprocess_model()"
                )
            request.consumers[1].add(node.name)

    # --- what is made of it ----------------------------------------------------------------------

    def _both(
        self,
        name: str,
        made: QuantTypeInfo,
        consumers: tuple[QuantTypeInfo, set[str]],
        default: QuantTypeInfo,
    ) -> None:
        read, readers = consumers
        if made != read:
            self._convert(name, made, read, readers)
            return
        others = {node.name for node in self.consumers.get(name, ())} - readers
        if others:
            self._convert(name, made, default, others)
            return
        if name not in self.overrides:
            self.overrides[name] = [{}]
            made.save_to_dict(self.overrides[name][0])
        if "convert" in self.overrides[name][0]:
            raise QuantizationError(
                f"Tensor override for '{name}' converts the type, but all that read it need the "
                "original type."
            )

    def _only_consumers(
        self, name: str, consumers: tuple[QuantTypeInfo, set[str]], default: QuantType
    ) -> None:
        made = self.overrides.get_node_output_qtype_info(name, default)
        read, readers = consumers
        if made != read:
            self._convert(name, made, read, readers)
        elif not self._check_nodes_are_not_convert_consumers(name, readers):
            raise QuantizationError(
                f"Tensor override for '{name}' converts the type for consumers that need the "
                f"original type: {sorted(readers)}"
            )

    def _convert(
        self, name: str, made: QuantTypeInfo, read: QuantTypeInfo, readers: set[str]
    ) -> None:
        """Say in the overrides that a tensor is converted for some nodes, in place."""
        if not self.overrides.get(name):
            self.overrides[name] = [{}]
            made.save_to_dict(self.overrides[name][0])
        entry = self.overrides[name][0]
        known = QuantTypeInfo.load_from_dict(entry)
        if made != known:
            raise QuantizationError(
                f"Desired producer quant_type for {name} doesn't match existing type. The node "
                f"that makes it computes in {made}, its override says {known}"
            )
        if not readers:
            return
        if "convert" not in entry:
            entry["convert"] = {}
            read.save_to_dict(entry["convert"])
        convert = entry["convert"]
        if read != QuantTypeInfo.load_from_dict(convert):
            raise QuantizationError(
                f"Desired consumer quant_type for {name} doesn't match existing type. Nodes "
                f"{sorted(readers)} need {read}, its override converts to "
                f"{convert.get('quant_type')}"
            )
        convert["recv_nodes"] = set(convert.get("recv_nodes", ())) | readers

    def _check_nodes_are_not_convert_consumers(
        self, tensor_name: str, node_names: set[str]
    ) -> bool:
        """Whether none of the nodes reads what the tensor is converted to."""
        entries = self.overrides.get(tensor_name)
        if not entries or "convert" not in entries[0]:
            return True
        convert = entries[0]["convert"]
        return "recv_nodes" in convert and node_names.isdisjoint(convert["recv_nodes"])

    # --- the model -------------------------------------------------------------------------------

    def _check(self, default: QuantType) -> None:
        valid, fault = self.overrides.is_valid(self.initializers, set(self.value_infos), default)
        if not valid:
            raise QuantizationError(fault)

    def _is_activation(self, name: str) -> bool:
        return name not in self.initializers and self._is_quantizable(name)

    def _is_quantizable(self, name: str) -> bool:
        if name in self.initializers:
            return self.initializers[name].data_type in _FLOATS
        known = self.value_infos.get(name)
        return known is not None and known.type.tensor_type.elem_type in _FLOATS
