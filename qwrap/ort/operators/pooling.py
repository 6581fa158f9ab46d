"""AveragePool as QLinearAveragePool."""

from __future__ import annotations

from qwrap.ort.operators.base_operator import QuantOperatorBase

__all__ = ["QLinearPool"]


class QLinearPool(QuantOperatorBase):
    """Averages of codes, brought to the output's scale."""

    def quantize(self) -> None:
        """Emit the node, or leave it float."""
        attributes = self.attributes()
        dilations = attributes.pop("dilations", None) or [1]  # which the kernel does not know
        reason = self.obstacle([0])
        if not reason and any(step != 1 for step in dilations):
            reason = f"QLinear{self.node.op_type} has no dilations"
        if reason:
            self.keep(reason)
            return
        params = self.output_params()
        inputs, nodes = self.activations([0])
        self.quantizer.new_nodes += nodes
        self.emit(f"QLinear{self.node.op_type}", [*inputs, *params], params, **attributes)
