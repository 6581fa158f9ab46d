"""What operator classes call to get codes: of activations, of constants, of biases."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from qwrap.ort.qoperator import activation_params, code_inputs, integer_bias, measured_ranges
from qwrap.ort.qoperator.code_graph import CodeGraph
from qwrap.ort.quant_utils import QuantizedValue

Inputs = tuple[Any, Any, Any, Any]
"""Names of codes, zero points and scales of inputs, and nodes that make them; Nones if none can."""

logger = logging.getLogger(__name__)


class CodeValues(CodeGraph):
    """The callbacks of operator classes, by onnxruntime's names."""

    def _get_quantization_params(
        self, param_name: str, use_scale: float | None = None, use_zeropoint: int | None = None
    ) -> tuple[bool, str, str, Any, Any]:
        """Add scale and zero point of a tensor, once.

        Args:
            param_name: the tensor.
            use_scale: instead of the calibrated scale, together with ``use_zeropoint``.
            use_zeropoint: zero point.

        Returns:
            Whether there are any, name of the scale, of the zero point, and their shapes.
        """
        if param_name not in self._param_names:
            made = activation_params.param_tensors(self, param_name, use_scale, use_zeropoint)
            if made is None:
                logger.info("Quantization parameters for tensor:%r not specified", param_name)
                return False, "", "", "", ""
            for tensor in made:
                self.model.add_initializer(tensor)
            self._param_names[param_name] = made[0].name, made[1].name
        return True, *self._param_names[param_name], [], []

    def _get_dynamic_input_quantization_params(
        self, input_name: str, nodes_list: list[NodeProto], qType: int, initial_type: int
    ) -> tuple[str, str, list[int], list[int]]:
        """Append nodes that measure a tensor's range, in place; return scale and zero point."""
        return measured_ranges.measure(self, input_name, nodes_list, qType, initial_type)

    def _get_quantize_input_nodes(
        self,
        node: NodeProto,
        input_index: int,
        qType: int,
        given_scale_name: str | None = None,
        given_zp_name: str | None = None,
        initial_type: int | None = None,
    ) -> list[NodeProto] | None:
        """Return nodes that make codes of an input, the last of them those; None without scale."""
        given = None
        if given_scale_name is not None and given_zp_name is not None:
            given = given_scale_name, given_zp_name
        return code_inputs.quantize_nodes(self, node.input[input_index], qType, given, initial_type)

    def find_quantized_value(self, input_name: str) -> QuantizedValue | None:
        """Return the codes of a tensor, of this graph or of one around it."""
        found = self.quantized_value_map.get(input_name)
        if found is None and self.parent is not None and not self.is_local(input_name):
            around: QuantizedValue | None = self.parent.find_quantized_value(input_name)
            return around
        return found

    def quantize_activation(
        self, node: NodeProto, indices: Sequence[int], from_subgraph: bool = False
    ) -> Inputs:
        """Quantize inputs of a node with the type of activations.

        Args:
            node: the float node.
            indices: of its inputs; an empty name gives empty names.
            from_subgraph: append the nodes to this graph.

        Returns:
            Names of codes, zero points and scales, and the nodes that make them, which the caller
            appends; four Nones where a scale is missing.
        """
        return _lists(code_inputs.quantize(self, node, indices, nested=from_subgraph))

    def quantize_weight(
        self,
        node: NodeProto,
        indices: Sequence[int],
        reduce_range: bool = False,
        op_level_per_channel: bool = False,
        axis: int = -1,
        from_subgraph: bool = False,
    ) -> Inputs:
        """Quantize inputs of a node, constants among them with the type of weights.

        Args:
            node: the float node.
            indices: of its inputs.
            reduce_range: 7 bits where the quantizer is asked for them.
            op_level_per_channel: a scale per channel where the quantizer is asked for them.
            axis: along which channels run.
            from_subgraph: append the nodes to this graph.

        Returns:
            As ``quantize_activation``.
        """
        how = code_inputs.Weight(reduce_range, op_level_per_channel, axis)
        return _lists(code_inputs.quantize(self, node, indices, how, nested=from_subgraph))

    def quantize_initializer(
        self,
        weight: TensorProto,
        qType: int,
        reduce_range: bool = False,
        keep_float_weight: bool = False,
    ) -> tuple[str, str, str]:
        """Quantize a constant with one scale, once.

        Args:
            weight: initializer of this graph.
            qType: ``TensorProto.DataType`` of the codes.
            reduce_range: 7 bits where the quantizer is asked for them.
            keep_float_weight: add only scale and zero point.

        Returns:
            Names of the codes, of the zero point and of the scale.
        """
        value = code_inputs.constant(self, weight.name, qType, reduce_range, keep_float_weight)
        return value.q_name, value.zp_name, value.scale_name

    def quantize_weight_per_channel(
        self,
        weight_name: str,
        weight_qType: int,
        channel_axis: int,
        reduce_range: bool = True,
        keep_float_weight: bool = False,
    ) -> tuple[str, str, str]:
        """Quantize a constant with a scale for each index of ``channel_axis``, once.

        Returns:
            Names of the codes, of the zero points and of the scales.
        """
        value = code_inputs.constant(
            self, weight_name, weight_qType, reduce_range, keep_float_weight, channel_axis
        )
        return value.q_name, value.zp_name, value.scale_name

    def quantize_bias_static(
        self, bias_name: str, input_name: str, weight_name: str, beta: float = 1.0
    ) -> str:
        """Add the int32 codes of a bias, and return their name.

        The scale is that of the products, so that the kernel just adds. Where int32 cannot hold
        the codes the scale of the weight grows first: look its codes up afterwards.

        Args:
            bias_name: a constant.
            input_name: the activation, quantized.
            weight_name: the weight, quantized.
            beta: what the bias is multiplied by.
        """
        return integer_bias.quantize_bias(self, bias_name, input_name, weight_name, beta)

    def adjust_single_weight_scale_if_needed(
        self,
        bias_val: Any,
        input_scale: Any,
        weight_scale: Any,
        weight_scale_dtype: Any,
        weight_name: str,
        bias_name: str,
        qrange: Any,
        multiplicative_epsilon: float,
        idx: int | None = None,
    ) -> tuple[bool, Any]:
        """Return whether a weight's scale must grow for int32 to hold a bias, and the scale."""
        del weight_name, bias_name, idx
        needed = multiplicative_epsilon * 2.0 * np.abs(bias_val) / float(qrange)
        product = float(np.asarray(input_scale).item()) * float(np.asarray(weight_scale).item())
        if not 0.0 < product < needed:
            return False, weight_scale
        scale = np.float64(np.asarray(weight_scale).item()) * (needed / product)
        return True, np.array(scale, dtype=weight_scale_dtype)

    def _adjust_weight_scale_for_int32_bias(
        self,
        input_scale: NDArray[Any],
        weight_scale: NDArray[Any],
        weight_name: str,
        bias_tp: TensorProto,
        is_per_channel: bool,
    ) -> tuple[bool, NDArray[Any] | None]:
        """Return whether scales of a weight must grow for int32 to hold a bias, and the scales."""
        del weight_name
        if not weight_scale.size:
            return False, None
        return integer_bias.grown_scale(bias_tp, input_scale, weight_scale, is_per_channel)

    def _requantize_weight(self, weight_name: str, new_scale: NDArray[Any]) -> None:
        """Replace the scale and the codes of a constant, in place."""
        integer_bias.requantize(self, weight_name, new_scale)


def _lists(made: tuple[list[QuantizedValue], list[NodeProto]] | None) -> Inputs:
    if made is None:
        return None, None, None, None
    values, nodes = made
    return (
        [value.q_name for value in values],
        [value.zp_name for value in values],
        [value.scale_name for value in values],
        nodes,
    )
