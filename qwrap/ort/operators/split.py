"""Split on codes."""

from __future__ import annotations

from onnx import helper

from qwrap.ort.operators.base_operator import QuantOperatorBase
from qwrap.ort.operators.qdq_base_operator import QDQOperatorBase

__all__ = ["QDQSplit", "QSplit"]


class QSplit(QuantOperatorBase):
    """Parts of codes, with the scale of the whole."""

    def quantize(self) -> None:
        """Emit the node, or leave it float."""
        node, quantizer = self.node, self.quantizer
        reason = self.obstacle([0], output=False)
        if reason:
            self.keep(reason)
            return
        (codes, scale, zero_point), nodes = self.activations([0])
        kind = quantizer.code_type(node.input[0])
        outputs = [quantizer.free_name(f"{name}quantized") if name else "" for name in node.output]
        for name, made in zip(node.output, outputs, strict=True):
            if name:
                quantizer.note_value(name, made, scale, zero_point, kind)
        inputs = [codes, *node.input[1:]]
        nodes.append(
            helper.make_node("Split", inputs, outputs, self.quantized_name, **self.attributes())
        )
        quantizer.new_nodes += nodes


class QDQSplit(QDQOperatorBase):
    """A pair before the node; all parts share its parameters."""

    def quantize(self) -> None:
        """Mark the tensors of the node."""
        if not self.quantizer.is_tensor_quantized(self.node.input[0]):
            self.quantizer.quantize_activation_tensor(self.node.input[0])
        for position in range(len(self.node.output)):
            self.share_output(position)
