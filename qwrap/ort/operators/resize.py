"""Resize on codes."""

from __future__ import annotations

from qwrap.ort.operators.direct_q8 import Direct8BitOp, QDQDirect8BitOp

__all__ = ["QDQResize", "QResize"]


class QResize(Direct8BitOp):
    """Averages of codes are the codes of averages."""

    def quantize(self) -> None:
        """Emit the node on codes, or leave it float."""
        if self.quantizer.opset_version < 11:
            self.keep("Resize takes 8-bit tensors since opset 11")
        elif self.attribute("mode", b"nearest") == b"cubic" or self.attribute("antialias", 0):
            self.keep("onnxruntime resizes 8-bit tensors by neither cubic nor antialiased filters")
        elif self.attribute("coordinate_transformation_mode", b"") == b"tf_crop_and_resize":
            self.keep("what it extrapolates with is no code")
        else:
            super().quantize()


class QDQResize(QDQDirect8BitOp):
    """A pass-through from opset 11 on."""

    def quantize(self) -> None:
        """Mark the tensors of the node, if a kernel takes their type."""
        if self.quantizer.opset_version >= 11:
            super().quantize()
