"""GlobalAveragePool as QLinearGlobalAveragePool."""

from __future__ import annotations

from qwrap.ort.operators.base_operator import QuantOperatorBase

__all__ = ["QGlobalAveragePool"]


class QGlobalAveragePool(QuantOperatorBase):
    """Averages of images of codes, with the input's scale where the output has none."""

    def quantize(self) -> None:
        """Emit the node where its input is codes, else leave it float."""
        node, quantizer = self.node, self.quantizer
        value = self.known_codes()
        reason = "its input is not quantized" if value is None else ""
        calibrated = quantizer.output_type(node.output[0]) is not None
        reason = reason or self.obstacle([0], output=calibrated)
        if reason or value is None:
            self.keep(reason)
            return
        source = value.q_name, value.scale_name, value.zp_name
        params = self.output_params() if calibrated else source[1:]
        self.emit(
            "QLinearGlobalAveragePool",
            [*source, *params],
            params,
            **self.attributes(),
            channels_last=0,
        )
