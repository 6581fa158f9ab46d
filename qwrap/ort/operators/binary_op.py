"""Add and Mul as QLinearAdd and QLinearMul."""

from __future__ import annotations

from qwrap.ort.operators.base_operator import QuantOperatorBase

__all__ = ["QLinearBinaryOp"]


class QLinearBinaryOp(QuantOperatorBase):
    """An operator on two activations."""

    def quantize(self) -> None:
        """Emit the node, or leave it float."""
        reason = self.obstacle([0, 1])
        if reason:
            self.keep(reason)
            return
        inputs, nodes = self.activations([0, 1])
        self.quantizer.new_nodes += nodes
        params = self.output_params()
        op_type = f"QLinear{self.node.op_type}"
        self.emit(op_type, [*inputs, *params], params, **self.attributes())
