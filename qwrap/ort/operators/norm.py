"""Normalizations."""

from __future__ import annotations

from qwrap.ort.operators.qdq_base_operator import QDQOperatorBase

__all__ = ["QDQNormalization"]


class QDQNormalization(QDQOperatorBase):
    """Pairs around the input and the outputs, a weight as scale, and an int32 bias.

    A mean and a variance stay float.
    """

    def quantize(self) -> None:
        """Mark the tensors of the node."""
        data, scale = self.node.input[:2]
        self.quantizer.quantize_activation_tensor(data)
        if self.quantizer.is_input_a_initializer(scale):
            self.mark_weight(scale, default_axis=1)
        else:
            self.quantizer.quantize_activation_tensor(scale)
        if len(self.node.input) > 2 and self.node.input[2]:
            self.quantizer.quantize_bias_tensor(self.node.name, self.node.input[2], data, scale)
        if not self.disable_qdq_for_node_output:
            for name in self.node.output:
                self.quantizer.quantize_activation_tensor(name)
