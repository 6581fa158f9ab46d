"""Attention of the transformer optimizer, with measured scales."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from qwrap.ort.operators.base_operator import QuantOperatorBase
from qwrap.ort.operators.floats import float32_inputs, float32_outputs
from qwrap.ort.quant_utils import ms_domain

__all__ = ["AttentionQuant"]


class AttentionQuant(QuantOperatorBase):
    """Projections by one matrix of codes, and softmax in float, as QAttention."""

    def should_quantize(self) -> bool:
        """Whether the node is asked for."""
        return bool(self.quantizer.should_quantize_node(self.node))

    def quantize(self) -> None:
        """Emit the node, or leave it float."""
        node, quantizer = self.node, self.quantizer
        reason = self._missing_feature() or self.obstacle([0], (1,), output=False)
        if reason:
            self.keep(reason)
            return
        codes, zero_points, scales, nodes = quantizer.quantize_activation(node, [0])
        weight, zeros, factors, made = quantizer.quantize_weight(
            node, [1], reduce_range=True, op_level_per_channel=True
        )
        quantizer.new_nodes += [*nodes, *made]
        mask, past = self._input(3), self._input(4)
        bias, past = float32_inputs(quantizer, [self._input(2) or self._no_bias(), past])
        outputs, casts = float32_outputs(quantizer, list(node.output))
        scales, zero_points = [*scales, *factors], [*zero_points, *zeros]
        attention = helper.make_node(
            "QAttention",
            [*codes, *weight, bias, *scales, mask, *zero_points, past],
            outputs,
            self.quantized_name,
            domain=ms_domain,
            **{n: v for n, v in self.attributes().items() if n != "rotary_embedding_dim"},
        )
        quantizer.new_nodes += [attention, *casts]

    def _missing_feature(self) -> str:
        """Return what the node has that QAttention has not; empty if nothing."""
        if self.attribute("qkv_hidden_sizes", None) is not None:
            return "QAttention has one hidden size"
        if self._input(5) or self._input(6):
            return "QAttention adds no bias to scores and shares no buffer with the past"
        if self.attribute("do_rotary", 0):
            return "QAttention rotates no positions"
        if self.quantizer.activation_qType != TensorProto.UINT8:
            return "QAttention takes uint8 activations only"
        if not self.quantizer.is_valid_quantize_weight(self.node.input[1]):
            return "its weight is not constant"
        return ""

    def _input(self, index: int) -> str:
        return str(self.node.input[index]) if index < len(self.node.input) else ""

    def _no_bias(self) -> str:
        """Add a bias of zeros, which QAttention cannot do without, and return its name."""
        weight = self.quantizer.find_initializer(self.node.input[1])
        size = 0 if weight is None else weight.dims[-1]
        name = self.quantizer.free_name(f"{self.node.output[0]}_bias")
        zeros = numpy_helper.from_array(np.zeros(size, np.float32), name)
        self.quantizer.model.add_initializer(zeros)
        return name
