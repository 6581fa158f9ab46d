"""EmbedLayerNormalization, with tables in 8 bits."""

from __future__ import annotations

from onnx import helper

from qwrap.ort.operators.base_operator import QuantOperatorBase
from qwrap.ort.operators.floats import float32_outputs
from qwrap.ort.quant_utils import ms_domain

__all__ = ["EmbedLayerNormalizationQuant"]

_TABLES = range(2, 7)  # of words, positions and segments; gamma and beta


class EmbedLayerNormalizationQuant(QuantOperatorBase):
    """Sums of rows of three tables, normalized, as QEmbedLayerNormalization."""

    def should_quantize(self) -> bool:
        """Whether the node is asked for."""
        return bool(self.quantizer.should_quantize_node(self.node))

    def quantize(self) -> None:
        """Emit the node, or leave it float."""
        node, quantizer = self.node, self.quantizer
        reason = self._missing_feature() or self.obstacle(_TABLES, output=False)
        if reason:
            self.keep(reason)
            return
        codes, zero_points, scales, nodes = quantizer.quantize_activation(node, _TABLES)
        mask = node.input[7] if len(node.input) > 7 else ""
        outputs, casts = float32_outputs(quantizer, list(node.output[:2]))
        outputs += [""] * (2 - len(outputs))  # the kernel has both
        outputs[1] = outputs[1] or quantizer.free_name(f"{node.output[0]}_mask_index")
        made = helper.make_node(
            "QEmbedLayerNormalization",
            [*node.input[:2], *codes, mask, *scales, *zero_points],
            outputs,
            self.quantized_name,
            domain=ms_domain,
            **{name: v for name, v in self.attributes().items() if name == "epsilon"},
        )
        quantizer.new_nodes += [*nodes, made, *casts]

    def _missing_feature(self) -> str:
        """Return what the node has that QEmbedLayerNormalization has not; empty if nothing."""
        node = self.node
        if len(node.output) > 2 and node.output[2]:
            return "QEmbedLayerNormalization does not give the sum of the embeddings"
        if len(node.input) > 8 and node.input[8]:
            return "QEmbedLayerNormalization takes no positions"
        if self.attribute("mask_index_type", 1) != 1:
            return "QEmbedLayerNormalization has no other type of mask_index"
        return ""
