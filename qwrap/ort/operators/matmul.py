"""MatMul: QLinearMatMul with scales in the file, MatMulInteger with measured ones."""

from __future__ import annotations

import logging

from qwrap.ort.operators.base_operator import QuantOperatorBase
from qwrap.ort.operators.products import scaled_product, spread
from qwrap.ort.operators.qdq_base_operator import QDQOperatorBase
from qwrap.ort.quant_utils import FLOAT8_TYPES, ms_domain

__all__ = ["MatMulInteger", "QDQMatMul", "QLinearMatMul", "QOpMatMul"]

logger = logging.getLogger(__name__)


class QOpMatMul(QuantOperatorBase):
    """Products of two matrices, of which the second may have to be constant."""

    def should_quantize(self) -> bool:
        """Whether the node is asked for, computes with floats, and has a B that may be codes."""
        node, quantizer = self.node, self.quantizer
        if not quantizer.should_quantize_node(node):
            return False
        if not any(quantizer.is_float_tensor(name) for name in (node.input[1], node.input[0])):
            logger.info("%s '%s' is left alone: its inputs are not float", node.op_type, node.name)
            return False
        constant = quantizer.find_initializer_in_path(node.input[1])
        if quantizer.q_matmul_const_b_only and not constant:
            where = f"{quantizer.graph_scope}[{node.name}]"
            logger.info("%s %s is left alone: B is not constant", node.op_type, where)
            return False
        return True


class MatMulInteger(QOpMatMul):
    """MatMul as MatMulInteger, a cast, and products with both scales."""

    def quantize(self) -> None:
        """Emit the nodes."""
        reason = self.obstacle([0], (1,), output=False)
        if reason:
            self.keep(reason)
            return
        result = self.node.output[0]
        self.quantizer.new_nodes += scaled_product(
            self, "MatMulInteger", result, reduce_range=True, per_channel=True
        )


class QLinearMatMul(QOpMatMul):
    """MatMul as QLinearMatMul."""

    def quantize(self) -> None:
        """Emit the node, or leave it float."""
        reason = self.obstacle([0], (1,))
        if reason:
            self.keep(reason)
            return
        x, nodes = self.activations([0])
        w, made = self.weight(1, axis=-1)
        codes, *rest = w
        rest = [spread(self.quantizer, self.node.input[1], name) for name in rest]
        self.quantizer.new_nodes += [*nodes, *made]
        params = self.output_params()
        float8 = self.quantizer.weight_qType in FLOAT8_TYPES
        domain = ms_domain if float8 else ""
        self.emit("QLinearMatMul", [*x, codes, *rest, *params], params, domain)


class QDQMatMul(QDQOperatorBase):
    """Pairs around activations; a constant is a weight, whose channels are its columns."""

    def quantize(self) -> None:
        """Mark the tensors of the node."""
        quantizer = self.quantizer
        if quantizer.matmul_const_b_only and not quantizer.is_constant(self.node.input[1]):
            return
        for position, name in enumerate(self.node.input):
            constant = quantizer.find_initializer(name)
            if constant is None:
                quantizer.quantize_activation_tensor(name)
            else:
                columns = len(constant.dims) > 1 and position == 1
                self.mark_weight(name, default_axis=len(constant.dims) - 1 if columns else 1)
        self.mark_output()
