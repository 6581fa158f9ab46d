"""Recurrent networks with weights as codes: LSTM, GRU and RNN."""

from __future__ import annotations

from qwrap.ort.operators.qdq_base_operator import QDQOperatorBase

__all__ = ["QDQRecurrent"]


class QDQRecurrent(QDQOperatorBase):
    """Pairs around the sequences, and weights of inputs and of recurrence as weights.

    Biases and states stay float: what a step rounds, all later ones inherit. Channels are rows of
    the gates, of all directions alike.
    """

    def quantize(self) -> None:
        """Mark the tensors of the node."""
        sequence, *weights = self.node.input[:3]
        self.quantizer.quantize_activation_tensor(sequence)
        for name in weights:
            self.mark_weight(name, default_axis=1)
        if self.node.output[0]:
            self.mark_output()
