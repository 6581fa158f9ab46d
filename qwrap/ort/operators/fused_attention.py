"""Attention of several heads as one node."""

from __future__ import annotations

from qwrap.ort.operators.qdq_base_operator import QDQOperatorBase

__all__ = ["QDQAttention"]

_PROJECTED = "Attention"  # of com.microsoft, which has the projections of queries, keys and values


class QDQAttention(QDQOperatorBase):
    """Pairs around what is projected, or around queries, keys and values, and around the output.

    The projections of onnxruntime's Attention are weights. Masks, biases, caches and what is
    between, the softmax above all, stay float.
    """

    def quantize(self) -> None:
        """Mark the tensors of the node."""
        if self.node.op_type == _PROJECTED and self.node.domain == "com.microsoft":
            self.quantizer.quantize_activation_tensor(self.node.input[0])
            self.mark_weight(self.node.input[1], default_axis=1)
        else:
            for name in self.node.input[:3]:
                self.quantizer.quantize_activation_tensor(name)
        self.mark_output()
