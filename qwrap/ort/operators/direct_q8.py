"""Operators that move values without computing, which do the same to codes."""

from __future__ import annotations

from qwrap.ort.operators.base_operator import QuantOperatorBase
from qwrap.ort.operators.qdq_base_operator import QDQOperatorBase

__all__ = ["Direct8BitOp", "QDQDirect8BitOp"]


class Direct8BitOp(QuantOperatorBase):
    """A node that runs on codes as it is; its output has the scale of its input."""

    def quantize(self) -> None:
        """Emit the node on codes where its input has them, or where the user insists."""
        quantizer, name = self.quantizer, self.node.input[0]
        known = self.known_codes()
        if known is None and not quantizer.force_quantize_no_input_check:
            self.keep("its input is not quantized")
            return
        if known is None and quantizer.code_type(name) is None:
            self.keep(f"no quantization parameters for tensor '{name}'")
            return
        codes = [known.q_name, known.scale_name, known.zp_name] if known is not None else []
        if known is None:
            codes, nodes = self.activations([0])
            quantizer.new_nodes += nodes
        self.pass_through(*codes)


class QDQDirect8BitOp(QDQOperatorBase):
    """A node that passes values on: its output shares the parameters of its input."""

    def quantize(self) -> None:
        """Mark the output where the input is quantized, or both where the user insists."""
        if self.quantizer.force_quantize_no_input_check:
            self.quantizer.quantize_activation_tensor(self.node.input[0])
        elif not self.quantizer.is_tensor_quantized(self.node.input[0]):
            return
        self.share_output()
