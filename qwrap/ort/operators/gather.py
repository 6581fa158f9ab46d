"""Gather from a table of codes."""

from __future__ import annotations

from qwrap.ort.code_inputs import BYTES
from qwrap.ort.operators.direct_q8 import Direct8BitOp

__all__ = ["GatherQuant"]


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
        value = self.quantizer.find_quantized_value(self.node.input[0])
        if value is not None and value.axis is None and value.node_qtype in BYTES:
            self.pass_through(value.q_name, value.scale_name, value.zp_name)
            return
        codes, nodes = self.activations([0])
        self.quantizer.new_nodes += nodes
        self.pass_through(*codes)
