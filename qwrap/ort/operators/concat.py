"""Concat as QLinearConcat."""

from __future__ import annotations

from qwrap.ort.operators.base_operator import QuantOperatorBase

__all__ = ["QLinearConcat"]


class QLinearConcat(QuantOperatorBase):
    """Concat of codes, each brought to the output's scale."""

    def quantize(self) -> None:
        """Emit the node, or leave it float."""
        indices = range(len(self.node.input))
        reason = self.obstacle(indices)
        if reason:
            self.keep(reason)
            return
        params = self.output_params()
        inputs, nodes = self.activations(indices)
        self.quantizer.new_nodes += nodes
        self.emit("QLinearConcat", [*params, *inputs], params, **self.attributes())
