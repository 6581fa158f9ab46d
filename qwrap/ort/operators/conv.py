"""Conv: QLinearConv with scales in the file, ConvInteger with measured ones."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qwrap.ort.errors import InvalidModelError
from qwrap.ort.operators.base_operator import QuantOperatorBase
from qwrap.ort.operators.products import scaled_product
from qwrap.ort.operators.qdq_base_operator import QDQOperatorBase

__all__ = ["ConvInteger", "QDQConv", "QLinearConv"]


class ConvInteger(QuantOperatorBase):
    """Conv as ConvInteger, a cast, and products with both scales."""

    def quantize(self) -> None:
        """Emit the nodes; the bias is added in float."""
        node = self.node
        reason = self.obstacle([0], (1,), output=False)
        if not reason and not self.quantizer.is_input_a_initializer(node.input[1]):
            reason = "the weight is not constant"
        if reason:
            self.keep(reason)
            return
        has_bias = len(node.input) == 3 and node.input[2] != ""
        weight = self.quantizer.find_initializer(node.input[1])
        result = f"{node.output[0]}quant_scaled_output" if has_bias else node.output[0]
        reduced = self.quantizer.reduce_range
        nodes = scaled_product(self, "ConvInteger", result, reduce_range=reduced, per_channel=False)
        if has_bias and weight is not None:
            self.quantizer.read_float(node.input[2])
            nodes += self.add_bias(result, len(weight.dims))
        self.quantizer.new_nodes += nodes

    def add_bias(self, scaled_output: str, rank: int) -> list[NodeProto]:
        """Return nodes that add the bias to what the convolution of that rank gave."""
        output = self.node.output[0]
        shape, reshaped = f"{output}_bias_reshape_shape", f"{output}_bias_reshape_output"
        sizes = np.ones(rank, np.int64)
        sizes[1] = -1
        self.quantizer.model.add_initializer(numpy_helper.from_array(sizes, shape))
        return [
            helper.make_node("Reshape", [self.node.input[2], shape], [reshaped]),
            helper.make_node("Add", [scaled_output, reshaped], [output], f"{output}_bias_add"),
        ]


class QLinearConv(QuantOperatorBase):
    """Conv as QLinearConv, with an int32 bias."""

    def quantize(self) -> None:
        """Emit the node, or leave it float.

        Raises:
            InvalidModelError: a bias with float8, which no kernel adds (a ``RuntimeError``).
        """
        node, quantizer = self.node, self.quantizer
        has_bias = len(node.input) == 3 and node.input[2] != ""
        reason = self.obstacle([0], (1,))
        if not reason and has_bias and not quantizer.is_input_a_initializer(node.input[2]):
            reason = f"the bias '{node.input[2]}' is not constant"
        if reason:
            self.keep(reason)
            return
        if has_bias and quantizer.weight_qType == TensorProto.FLOAT8E4M3FN:
            raise InvalidModelError(
                f"node '{node.name}': Quantization to FLOAT8E4M3FN for operator Conv is not "
                "supported."
            )
        x, nodes = self.activations([0])
        w, made = self.weight(1, axis=0)
        bias = []
        if has_bias:
            bias = [quantizer.quantize_bias_static(node.input[2], node.input[0], node.input[1])]
            w, _ = self.weight(1, axis=0)  # its scale may have grown
        quantizer.new_nodes += [*nodes, *made]
        params = self.output_params()
        inputs = [*x, *w, *params, *bias]
        self.emit("QLinearConv", inputs, params, "", **self.attributes())


class QDQConv(QDQOperatorBase):
    """Pairs around the input and the output of a Conv or ConvTranspose, a weight, an int32 bias."""

    def quantize(self) -> None:
        """Mark the tensors of the node."""
        data, weight = self.node.input[:2]
        self.quantizer.quantize_activation_tensor(data)
        self.mark_output()
        self.mark_weight(weight, default_axis=1 if self.node.op_type == "ConvTranspose" else 0)
        if len(self.node.input) == 3 and self.node.input[2]:
            self.quantizer.quantize_bias_tensor(self.node.name, self.node.input[2], data, weight)
