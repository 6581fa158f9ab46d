"""Softmax as QLinearSoftmax."""

from __future__ import annotations

from onnx import TensorProto

from qwrap.ort.operators.base_operator import QuantOperatorBase

__all__ = ["QLinearSoftmax"]


class QLinearSoftmax(QuantOperatorBase):
    """Softmax by a table; its output is between 0 and 1, in steps of 1/256."""

    def quantize(self) -> None:
        """Emit the node, or leave it float."""
        reason = self.obstacle([0])
        if reason:
            self.keep(reason)
            return
        attributes = self.attributes()
        opset = self.quantizer.opset_version  # a contrib operator does not know the model's
        attributes.setdefault("axis", 1 if opset < 13 else -1)
        signed = self.quantizer.output_type(self.node.output[0]) != TensorProto.UINT8
        params = self.output_params(1 / 256.0, -128 if signed else 0)
        inputs, nodes = self.activations([0])
        self.quantizer.new_nodes += nodes
        self.emit("QLinearSoftmax", [*inputs, *params], params, **attributes, opset=opset)
