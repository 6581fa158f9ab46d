"""Where as QLinearWhere."""

from __future__ import annotations

from qwrap.ort.operators.base_operator import QuantOperatorBase
from qwrap.ort.operators.qdq_base_operator import QDQOperatorBase

__all__ = ["QDQWhere", "QLinearWhere"]


class QLinearWhere(QuantOperatorBase):
    """A choice between codes, brought to the output's scale."""

    def should_quantize(self) -> bool:
        """Whether the node is asked for and chooses between floats."""
        node, quantizer = self.node, self.quantizer
        return bool(quantizer.should_quantize_node(node)) and quantizer.is_float_tensor(
            node.input[1]
        )

    def quantize(self) -> None:
        """Emit the node where the user insists, else leave it float."""
        if not self.quantizer.force_quantize_no_input_check:
            self.keep("only extra_options['ForceQuantizeNoInputCheck'] quantizes it")
            return
        reason = self.obstacle([1, 2])
        if reason:
            self.keep(reason)
            return
        params = self.output_params()
        inputs, nodes = self.activations([1, 2])
        self.quantizer.new_nodes += nodes
        inputs = [self.node.input[0], *inputs, *params]
        self.emit("QLinearWhere", inputs, params, **self.attributes())


class QDQWhere(QDQOperatorBase):
    """Quantized where both choices are, or where the user insists."""

    def quantize(self) -> None:
        """Mark the tensors of the node."""
        choices = self.node.input[1:3]
        if self.quantizer.force_quantize_no_input_check:
            for name in choices:
                self.quantizer.quantize_activation_tensor(name)
        elif not all(self.quantizer.is_tensor_quantized(name) for name in choices):
            return
        self.mark_output()
