"""ArgMax of codes."""

from __future__ import annotations

from qwrap.ort.operators.base_operator import QuantOperatorBase

__all__ = ["QArgMax"]


class QArgMax(QuantOperatorBase):
    """The largest code is where the largest value is."""

    def quantize(self) -> None:
        """Emit the node on codes where its input has them, else leave it float."""
        value = self.known_codes()
        if value is None:
            self.keep("its input is not quantized")
            return
        made = self.copy()
        made.input[0] = value.q_name
        self.quantizer.new_nodes.append(made)
