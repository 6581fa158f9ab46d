"""Types and scales that Qualcomm's provider asks of single operators."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import onnx

from qwrap.ort.enums import QuantType
from qwrap.ort.tensor_quant_overrides import TensorQuantOverridesHelper

_LOGGER = logging.getLogger(__name__)
_8_BIT = {QuantType.QInt8, QuantType.QUInt8}
_16_BIT = {QuantType.QInt16, QuantType.QUInt16}
_OUTPUTS = {
    ("Sigmoid", QuantType.QUInt16): (1.0 / 65536.0, np.uint16(0)),
    ("Sigmoid", QuantType.QInt16): (1.0 / 32768.0, np.int16(0)),
    ("Tanh", QuantType.QUInt16): (1.0 / 32768.0, np.uint16(32768)),
    ("Tanh", QuantType.QInt16): (1.0 / 32768.0, np.int16(0)),
}
"""Scale and zero point of what an operator makes, which the provider does not choose."""


class QnnCompatibilityOverrides:
    """Adds to overrides, in place, what the provider asks of the nodes it is shown.

    Args:
        default_activation_qtype: type of activations of which nothing is said.
        default_weight_qtype: type of weights of which nothing is said.
        activation_symmetric: whether the zero point of activations is the middle code.
        weight_symmetric: the same for weights.
        per_channel: whether weights have a scale per channel by default.
        overrides: changed by ``process_node``.
        initializers: the model's constants by name.
    """

    def __init__(
        self,
        default_activation_qtype: QuantType,
        default_weight_qtype: QuantType,
        activation_symmetric: bool,
        weight_symmetric: bool,
        per_channel: bool,
        overrides: TensorQuantOverridesHelper,
        initializers: Mapping[str, onnx.TensorProto],
    ) -> None:
        self.default_activation_qtype = default_activation_qtype
        self.default_weight_qtype = default_weight_qtype
        self.activation_symmetric = activation_symmetric
        self.weight_symmetric = weight_symmetric
        self.per_channel = per_channel
        self.overrides = overrides
        self.initializers = initializers

    def process_node(self, node: onnx.NodeProto) -> None:
        """Add what the provider asks of one node."""
        if node.op_type == "MatMul" and self.per_channel:
            self._one_scale(node)
        elif node.op_type in ("MatMul", "LayerNormalization") and not self.per_channel:
            self._weight_type(node)
        elif node.op_type in ("Sigmoid", "Tanh"):
            self._output(node)

    def _one_scale(self, node: onnx.NodeProto) -> None:
        """The provider has no MatMul with a scale per channel."""
        for name in node.input:
            if name in self.initializers and name not in self.overrides:
                self.overrides.update_tensor_overrides(name, self._weight_settings())

    def _weight_type(self, node: onnx.NodeProto) -> None:
        """Beside a 16-bit activation a constant has the weight type, not the activation's.

        Only for 8-bit weight types, and constants with one scale.
        """
        if self.default_weight_qtype not in _8_BIT:
            return
        wide, weight = False, ""
        for name in [name for name in node.input[:2] if name]:
            is_weight = name in self.initializers
            info = self.overrides.get_node_input_qtype_info(
                name, node.name, None if is_weight else self.default_activation_qtype
            )
            if info.axis is not None:
                return
            if is_weight:
                weight = name
                kind = info.quant_type, info.symmetric
                if kind == (self.default_weight_qtype, self.weight_symmetric):
                    return
            else:
                wide = wide or info.quant_type in _16_BIT
        if wide and weight:
            done = self.overrides.update_tensor_overrides(
                weight, self._weight_settings(), overwrite=False
            )
            if not done:
                warn_unable_to_override(node, "quant_type/symmetric", weight, "input weight")

    def _weight_settings(self) -> dict[str, object]:
        return {"quant_type": self.default_weight_qtype, "symmetric": self.weight_symmetric}

    def _output(self, node: onnx.NodeProto) -> None:
        """A 16-bit Sigmoid or Tanh has the scale that its range asks for."""
        name = node.output[0]
        kind = self.overrides.get_node_output_qtype_info(
            name, self.default_activation_qtype
        ).quant_type
        if kind is not None and (node.op_type, kind) in _OUTPUTS:
            scale, zero_point = _OUTPUTS[node.op_type, kind]
            settings = {
                "quant_type": kind,
                "scale": np.array(scale, np.float32),
                "zero_point": np.array(zero_point),
            }
            self.overrides.update_tensor_overrides(name, settings)


def warn_unable_to_override(
    node: onnx.NodeProto, what_str: str, tensor_name: str, io_kind: str
) -> None:
    """Log that what the user said of a tensor is not what the provider asks for."""
    _LOGGER.warning(
        "Unable to override %s for %s node's %s because it has already been overridden! Check the "
        "initial quantization overrides provided to get_qnn_qdq_config() if the generated QDQ "
        "model does not run on QNN EP. Node name: %s, %s name: %s",
        what_str,
        node.op_type,
        io_kind,
        node.name,
        io_kind,
        tensor_name,
    )
