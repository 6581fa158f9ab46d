"""Gather from a table of codes."""

from __future__ import annotations

from qwrap.ort.operators.direct_q8 import Direct8BitOp
from qwrap.ort.operators.qdq_base_operator import QDQOperatorBase

__all__ = ["GatherQuant", "QDQGather"]


class GatherQuant(Direct8BitOp):
    """Rows of a constant table, which is stored in 8 bits."""

    def should_quantize(self) -> bool:
        """Whether the node is asked for and gathers from a float constant."""
        node, quantizer = self.node, self.quantizer
        return bool(quantizer.should_quantize_node(node)) and (
            quantizer.is_valid_quantize_weight(node.input[0])
        )

    def quantize(self) -> None:
        """Emit the node on codes; a table that another node has codes of is not stored twice."""
        value = self.known_codes()
        if value is not None:
            self.pass_through(value.q_name, value.scale_name, value.zp_name)
            return
        codes, nodes = self.activations([0])
        self.quantizer.new_nodes += nodes
        self.pass_through(*codes)


class QDQGather(QDQOperatorBase):
    """A look-up in a constant table, or in codes.

    A table has one scale and the type of activations, so that the output can share them. It is a
    weight, with a scale for each row or column, where its operator is in
    ``QDQOpTypePerChannelSupportToAxis`` and ``per_channel`` holds, or where overrides say so.
    """

    def quantize(self) -> None:
        """Mark the table and the output."""
        table = self.node.input[0]
        constant = self.quantizer.is_valid_quantize_weight(table)
        if constant and self._has_channels(table):
            self.mark_weight(table, default_axis=0)
        elif constant or self.quantizer.force_quantize_no_input_check:
            self.quantizer.quantize_activation_tensor(table)
        elif not self.quantizer.is_tensor_quantized(table):
            return
        self.share_output()

    def _has_channels(self, table: str) -> bool:
        axes = self.quantizer.qdq_op_type_per_channel_support_to_axis
        named = self.quantizer.per_channel and self.node.op_type in axes
        return named or self.quantizer.tensor_quant_overrides.has_per_channel_overrides(table)
