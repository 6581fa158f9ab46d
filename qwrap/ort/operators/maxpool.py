"""MaxPool on codes."""

from __future__ import annotations

from qwrap.ort.operators.direct_q8 import Direct8BitOp, QDQDirect8BitOp
from qwrap.ort.quant_utils import FLOAT8_TYPES

__all__ = ["QDQMaxPool", "QMaxPool"]


class QMaxPool(Direct8BitOp):
    """The largest code is that of the largest value."""

    def quantize(self) -> None:
        """Emit the node on codes, or leave it float."""
        if self.quantizer.opset_version < 12:
            self.keep("MaxPool takes 8-bit tensors since opset 12")
        elif self.quantizer.activation_qType in FLOAT8_TYPES:
            self.keep("MaxPool does not take float8")
        else:
            super().quantize()


class QDQMaxPool(QDQDirect8BitOp):
    """A pass-through from opset 12 on, where onnxruntime has it for codes of 8 bits."""

    def quantize(self) -> None:
        """Mark the tensors of the node, if a kernel takes their type."""
        if self.quantizer.opset_version < 12 or self.quantizer.activation_qType in FLOAT8_TYPES:
            return
        super().quantize()
