"""Gemm: QGemm with scales in the file. With measured ones it is MatMul and Add by then."""

from __future__ import annotations

import logging
from typing import Any

from onnx import NodeProto, helper

from qwrap.ort.operators.matmul import QOpMatMul
from qwrap.ort.operators.qdq_base_operator import QDQOperatorBase
from qwrap.ort.qoperator import integer_bias

__all__ = ["QDQGemm", "QLinearGemm", "get_beta", "is_B_transposed", "set_default_beta"]

logger = logging.getLogger(__name__)


def _attribute(gemm_node: NodeProto, name: str, default: Any) -> Any:
    found = (a for a in gemm_node.attribute if a.name == name)
    return next((helper.get_attribute_value(a) for a in found), default)


def is_B_transposed(gemm_node: NodeProto) -> bool:
    """Whether a Gemm node multiplies by its second input's transpose."""
    return bool(_attribute(gemm_node, "transB", 0) > 0)


def get_beta(gemm_node: NodeProto) -> float:
    """Return the factor of a Gemm node's bias."""
    return float(_attribute(gemm_node, "beta", 1.0))


def set_default_beta(gemm_node: NodeProto) -> float:
    """Make the factor of a Gemm node's bias 1, in place, and return it."""
    for attribute in gemm_node.attribute:
        if attribute.name == "beta":
            attribute.f = 1.0
    return 1.0


class QLinearGemm(QOpMatMul):
    """Gemm as QGemm, which multiplies the int32 sum of products and bias by alpha."""

    def quantize(self) -> None:
        """Emit the node, or leave it float."""
        node, quantizer = self.node, self.quantizer
        beta, alpha = get_beta(node), float(_attribute(node, "alpha", 1.0))
        has_bias = len(node.input) == 3 and node.input[2] != "" and beta != 0.0
        reason = self.obstacle([0], (1,))
        if not reason and has_bias and not quantizer.is_input_a_initializer(node.input[2]):
            reason = f"the bias '{node.input[2]}' is not constant"
        if not reason and alpha == 0.0:
            reason = "alpha is 0"
        if reason:
            self.keep(reason)
            return
        axis = 0 if is_B_transposed(node) else 1
        x, nodes = self.activations([0])
        w, made = self.weight(1, axis)
        bias = ""
        if has_bias:
            bias = integer_bias.quantize_bias(quantizer, *self._bias_inputs(), beta, alpha)
            w, _ = self.weight(1, axis)  # its scale may have grown
        quantizer.new_nodes += [*nodes, *made]
        params = self.output_params()
        attributes = {name: v for name, v in self.attributes().items() if name != "beta"}
        self.emit("QGemm", [*x, *w, bias, *params], params, **attributes)

    def _bias_inputs(self) -> tuple[str, str, str]:
        x, w, bias = self.node.input
        return bias, x, w


class QDQGemm(QDQOperatorBase):
    """Pairs around the input and the output, a weight, an int32 bias.

    The bias takes in the factor ``beta``, which then is 1.
    """

    def quantize(self) -> None:
        """Mark the tensors of the node."""
        data, weight = self.node.input[:2]
        self.quantizer.quantize_activation_tensor(data)
        self.mark_output()
        self.mark_weight(weight, default_axis=0 if is_B_transposed(self.node) else 1)
        bias = self.node.input[2] if len(self.node.input) == 3 else ""
        if not bias:
            return
        if self.quantizer.is_input_a_initializer(bias):
            beta = get_beta(self.node)
            self.quantizer.quantize_bias_tensor(self.node.name, bias, data, weight, beta)
        else:
            logger.warning(
                "Bias of Gemm node '%s' is not constant. Please exclude this node for better "
                "performance.",
                self.node.name,
            )
