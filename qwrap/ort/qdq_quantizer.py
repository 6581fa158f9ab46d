"""Static quantization by QuantizeLinear and DequantizeLinear nodes between float operators."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto

from qwrap.ort.borrowed import lender
from qwrap.ort.calibrate import TensorData
from qwrap.ort.graphs.tensor_names import DEQUANT_OP_NAME, __producer__, __version__, ms_domain
from qwrap.ort.numbers.code_types import normalize_axis
from qwrap.ort.numbers.quantization_params import QuantizationParams
from qwrap.ort.qdq import biases, ranges
from qwrap.ort.qdq.bodies import body_quantizers, write_bodies
from qwrap.ort.qdq.domains import choose_for_tensors, choose_for_types
from qwrap.ort.qdq.kernels import find_unfused, keep_behind, keep_unfused
from qwrap.ort.qdq.marks import (
    QDQBiasQuantInfo,
    QDQQuantParamProvider,
    QDQQuantTensorType,
    QDQScaleZpInitializers,
    QDQTensorQuantInfo,
    QDQTensorQuantizedValue,
    QDQTensorQuantParams,
    QDQTensorScaleZpInitializers,
)
from qwrap.ort.qdq.pairs import PairWriter
from qwrap.ort.qdq.reasons import report_nodes
from qwrap.ort.qdq.rois import fill_unused_regions
from qwrap.ort.qdq.scope import QuantizedGraph
from qwrap.ort.qdq.weights import initializer_params
from qwrap.ort.registry import CreateQDQQuantizer

__all__ = [
    "QDQBiasQuantInfo",
    "QDQQuantParamProvider",
    "QDQQuantTensorType",
    "QDQQuantizer",
    "QDQScaleZpInitializers",
    "QDQTensorQuantInfo",
    "QDQTensorQuantParams",
    "QDQTensorQuantizedValue",
    "QDQTensorScaleZpInitializers",
]

__getattr__ = lender(__name__)

logger = logging.getLogger(__name__)

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16}


class QDQQuantizer(QuantizedGraph):
    """Marks tensors with the classes of ``QDQRegistry``, then writes pairs of nodes around them.

    The classes call the public methods named ``quantize_*``, ``is_tensor_*``, ``remove_node`` and
    ``try_replacing_upstream_output``; those that users register do so too.

    Attributes:
        tensors_to_quantize: marked tensors, in the order they were marked.
        bias_to_quantize: marked biases.
        nodes_to_remove: nodes that the new graph will not have.
        tensor_to_its_receiving_nodes: nodes that were quantized, by the tensors they read.
        tensor_to_producing_dq: DequantizeLinear nodes that the float model had, by their output.
        quantization_params: parameters of activations that have a range.
        initializer_quant_params: parameters of marked initializers.
        quantized_value_map: names of what was written for each tensor.
    """

    def __init__(
        self,
        model: ModelProto,
        per_channel: bool,
        reduce_range: bool,
        weight_qType: Any,
        activation_qType: Any,
        tensors_range: Any,
        nodes_to_quantize: Sequence[str] | None,
        nodes_to_exclude: Sequence[str] | None,
        op_types_to_quantize: Sequence[str],
        extra_options: Mapping[str, Any] | None = None,
        **older: Any,
    ) -> None:
        """Take the float model, ranges of its tensors, and the options of ``quantize_static``.

        Args:
            model: is copied.
            per_channel: weights get a scale for each channel.
            reduce_range: weights use half of the codes.
            weight_qType: ``QuantType`` or ``TensorProto.DataType`` of weights.
            activation_qType: that of activations.
            tensors_range: ``TensorsData``, or a mapping from name to ``TensorData``.
            nodes_to_quantize: names of the only nodes to quantize; none for all.
            nodes_to_exclude: names of nodes that read and write floats.
            op_types_to_quantize: operators to quantize.
            extra_options: as of ``quantize_static``.
            **older: ``static``, which older versions took, has no effect.

        Raises:
            TypeError: a range is no ``TensorData``.
            QuantizationError: overrides contradict themselves or the model (a ``ValueError``).
        """
        super().__init__(
            model,
            per_channel,
            reduce_range,
            weight_qType,
            activation_qType,
            tensors_range,
            nodes_to_quantize,
            nodes_to_exclude,
            op_types_to_quantize,
            extra_options,
            **older,
        )
        options = self.extra_options
        self.op_types_to_exclude_output_quantization = options.get(
            "OpTypesToExcludeOutputQuantization", []
        )
        self.add_qdq_pair_to_weight = options.get("AddQDQPairToWeight", False)
        self.quantize_bias = options.get("QuantizeBias", True)
        self.dedicated_qdq_pair = options.get("DedicatedQDQPair", False)
        self.qdq_op_type_per_channel_support_to_axis = options.get(
            "QDQOpTypePerChannelSupportToAxis", {}
        )
        self.qdq_op_domain = ms_domain if options.get("UseQDQContribOps", False) else None
        self.qdq_keep_removable_activations = options.get("QDQKeepRemovableActivations", False)
        self.qdq_disable_weight_adjust_for_int32_bias = options.get(
            "QDQDisableWeightAdjustForInt32Bias", False
        )
        self.matmul_const_b_only = options.get("MatMulConstBOnly", False)
        self.block_size: int = options.get("BlockSize", 0)
        choose_for_types(self)
        self.quantization_params = self.calc_graph_quant_params()

    # --- marks -----------------------------------------------------------------------------------

    def quantize_activation_tensor(self, tensor_name: str) -> None:
        """Mark a tensor as an activation; one of another type than float is left alone."""
        self._mark(tensor_name, QDQQuantTensorType.ACTIVATION)

    def quantize_weight_tensor(self, tensor_name: str) -> None:
        """Mark a tensor as a weight with one scale."""
        self._mark(tensor_name, QDQQuantTensorType.WEIGHT)

    def quantize_output_same_as_input(
        self, output_name: str, input_name: str, node_name: str
    ) -> None:
        """Mark an output that takes its parameters from an input of the same node.

        Args:
            output_name: tensor to mark.
            input_name: tensor with the parameters.
            node_name: of the node; it decides which ones where the input is converted.
        """
        provider = QDQQuantParamProvider(input_name, node_name)
        self._mark(output_name, QDQQuantTensorType.ACTIVATION, provider)

    def quantize_weight_tensor_per_channel(self, tensor_name: str, axis: int) -> None:
        """Mark an initializer as a weight with a scale for each index of ``axis``."""
        initializer = self.find_initializer(tensor_name)
        if initializer is None:
            logger.warning(
                "only support per-channel quantization on weight. Tensor: %s is not quantized.",
                tensor_name,
            )
        elif initializer.data_type in _FLOATS:
            self.owner_of(tensor_name).tensors_to_quantize[tensor_name] = QDQTensorQuantInfo(
                QDQQuantTensorType.WEIGHT, axis=axis, data_type=initializer.data_type
            )

    def quantize_bias_tensor(
        self,
        node_name: str,
        bias_name: str,
        input_name: str,
        weight_name: str,
        beta: float = 1.0,
    ) -> None:
        """Mark an initializer as a bias, to become int32 with scale input scale x weight scale.

        Args:
            node_name: of the node that reads all three.
            bias_name: initializer to mark.
            input_name: the input that the weight is multiplied with.
            weight_name: the weight.
            beta: by which the node multiplies the bias; the codes are those of the product.
        """
        biases.mark_bias(self, node_name, bias_name, input_name, weight_name, beta)

    def _mark(
        self,
        name: str,
        kind: QDQQuantTensorType,
        provider: QDQQuantParamProvider | None = None,
    ) -> None:
        owner = self.owner_of(name)
        if not name or not owner.is_quantizable(name):
            return
        if provider is None and name in owner.tensors_to_quantize:
            return
        owner.tensors_to_quantize[name] = QDQTensorQuantInfo(
            kind, provider, data_type=owner.data_type_of(name)
        )

    def is_tensor_quantized(self, tensor_name: str) -> bool:
        """Whether the tensor was marked."""
        owner = self.owner_of(tensor_name)
        return tensor_name in owner.tensors_to_quantize or tensor_name in owner.bias_to_quantize

    def is_tensor_per_channel(
        self, tensor_name: str, default_axis: int, op_type: str | None = None
    ) -> tuple[bool, int | None]:
        """Return whether an initializer gets a scale for each channel, and along which axis.

        Args:
            tensor_name: initializer; other tensors never do.
            default_axis: where neither option nor overrides say otherwise; may be negative.
            op_type: operator that reads it, for ``QDQOpTypePerChannelSupportToAxis``.
        """
        initializer = self.find_initializer(tensor_name)
        overrides = self.tensor_quant_overrides
        if initializer is None or overrides.has_per_tensor_overrides(tensor_name):
            return False, None
        overridden = overrides.has_per_channel_overrides(tensor_name)
        if not self.per_channel and not overridden:
            return False, None
        axis = default_axis
        if op_type:
            axis = self.qdq_op_type_per_channel_support_to_axis.get(op_type, default_axis)
        entries = overrides.get_per_channel_overrides(tensor_name) if overridden else None
        if entries:
            axis = entries[0]["axis"]
        valid, found = normalize_axis(axis, len(initializer.dims))
        if not valid:
            logger.warning(
                "Axis %s is out-of-range for weight '%s' with rank %s",
                axis,
                tensor_name,
                len(initializer.dims),
            )
            return False, None
        return True, found

    def remove_node(self, node: NodeProto) -> None:
        """Leave a node out of the new graph."""
        self.nodes_to_remove.append(node)

    def remove_nodes(self) -> None:
        """Remove the nodes that ``remove_node`` was called for from the model, in place."""
        self.model.remove_nodes(self.nodes_to_remove)

    def try_replacing_upstream_output(self, upstream_output_name: str, output_name: str) -> bool:
        """Rename the input of an activation to its output, in place, so that it can be removed.

        Returns:
            Whether that was done: not where others read the input, or either is converted.
        """
        return self.folded.fold(upstream_output_name, output_name)

    def clips_to(self, tensor_name: str, low: float, high: float) -> bool:
        """Whether quantizing a tensor lets nothing below ``low`` or above ``high`` pass."""
        params = self.quantization_params.get(tensor_name)
        if params is None or params.converted or not self.is_quantizable(tensor_name):
            return False
        return ranges.saturates(params.original, low, high)

    # --- parameters ------------------------------------------------------------------------------

    def calc_quant_params(
        self, tensor_data: TensorData, quant_overrides: Mapping[str, Any]
    ) -> QuantizationParams:
        """Return type, scale and zero point of an activation of that range; overrides go first."""
        return ranges.activation_params(self, tensor_data, quant_overrides)

    def calc_graph_quant_params(self) -> dict[str, QDQTensorQuantParams]:
        """Return the parameters of all activations that have a range.

        Raises:
            TypeError: a range is no ``TensorData``.
        """
        if self.tensors_range is None:
            return {}
        if self.parent is None:
            self.adjust_tensor_ranges()
        return ranges.graph_params(self, self.ranged_names())

    def quantize_bias_static(self, bias_name: str, bias_info: QDQBiasQuantInfo) -> str | None:
        """Write the int32 codes of a bias; return their name, None if it stays float."""
        if bias_name not in self.bias_codes:
            self.bias_codes[bias_name] = biases.write_bias(self, bias_name, bias_info)
        return self.bias_codes[bias_name]

    # --- the new graph ---------------------------------------------------------------------------

    def quantize_model(self) -> ModelProto:
        """Quantize the model, in place, and return it."""
        self._mark_graph()
        graphs = list(self.graphs())
        for graph in graphs:
            graph._choose_weights()
        choose_for_tensors(graphs)
        for graph in graphs:
            find_unfused(graph)
            graph.folded.restore()
        if self.quantize_bias and not self.qdq_disable_weight_adjust_for_int32_bias:
            for graph in graphs:
                biases.fit_weights(graph)
        for graph in graphs:
            graph._write_pairs()
        for graph in graphs:
            report_nodes(graph)
        appended = any(len(graph.uses.nodes()) != graph.node_count for graph in graphs)
        for graph in reversed(graphs):
            graph._write_graph()
        if appended:  # by operator classes, wherever that was
            self.model.topological_sort()
        if not self.add_qdq_pair_to_weight:
            self.model.clean_initializers()
        model = self.model.model
        model.producer_name, model.producer_version = __producer__, __version__
        if self.qdq_op_domain == ms_domain:
            self.model.set_opset_import(ms_domain, 1)
        return model

    def _mark_graph(self) -> None:
        self.tensor_to_producing_dq.update(
            (name, node)
            for node in self.uses.nodes()
            for name in node.output
            if node.op_type == DEQUANT_OP_NAME
        )
        for node in self.model.nodes():
            if self.enable_subgraph_quantization and not self.is_excluded(node):
                self.bodies[id(node)] = list(body_quantizers(self, node))
                for body in self.bodies[id(node)]:
                    body.quantization_params = body.calc_graph_quant_params()
                    body._mark_graph()
            if self.should_quantize_node(node):
                self.current_node = node
                CreateQDQQuantizer(self, node).quantize()
                self.current_node = None
                self.note_receiver(node)

    def _choose_weights(self) -> None:
        for name, info in self.tensors_to_quantize.items():
            initializer = self.model.get_initializer(name)
            if initializer is not None:
                self.initializer_quant_params[name] = initializer_params(self, initializer, info)

    def _write_pairs(self) -> None:
        writer = PairWriter(self)
        for name in self.tensors_to_quantize:
            initializer = self.model.get_initializer(name)
            if initializer is not None:
                writer.weight(initializer, self.initializer_quant_params[name])
            elif name not in self.tensor_to_producing_dq:
                found = self.scales.find(name)
                if found is not None:
                    writer.activation(name, found)
        if self.quantize_bias:
            for name, info in self.bias_to_quantize.items():
                self.quantize_bias_static(name, info)
        keep_unfused(self)
        keep_behind(self)
        fill_unused_regions(self)

    def _write_graph(self) -> None:
        for node in self.uses.nodes():
            if self.bodies.get(id(node)):
                write_bodies(node, self.bodies[id(node)])
        gone = {id(node) for node in self.nodes_to_remove}
        self.edit.write(self.model.graph(), gone, self.is_excluded)
        self.drop_initializers()
