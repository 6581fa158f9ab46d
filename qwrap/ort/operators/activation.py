"""Activation functions: Sigmoid and LeakyRelu on codes, Relu and Clip dropped."""

from __future__ import annotations

import math

import numpy as np
from onnx import numpy_helper

from qwrap.ort.operators.base_operator import QuantOperatorBase
from qwrap.ort.operators.qdq_base_operator import QDQOperatorBase
from qwrap.ort.quant_utils import get_qmin_qmax_for_qType

__all__ = ["QDQRemovableActivation", "QLinearActivation"]


class QLinearActivation(QuantOperatorBase):
    """A function of one activation."""

    def QuantizeClipRelu(self) -> None:
        """Let the codes of the input stand for the output, where they hold no value beyond it.

        The ranges of what one Relu or Clip reads are those of its output, so that the bounds are
        those of the codes. Elsewhere the node is left float.
        """
        value = self.known_codes()
        if value is None:
            self.keep("its input is not quantized")
        elif self.quantizer.is_activation_symmetric:
            self.keep("activations are symmetric")
        elif not self._is_within_codes(value.scale_name, value.zp_name):
            self.keep("the codes of its input reach beyond its bounds")
        else:
            self.quantizer.quantized_value_map[self.node.output[0]] = value

    def _is_within_codes(self, scale_name: str, zero_point_name: str) -> bool:
        """Whether codes of such parameters are within the bounds, to half a step."""
        scale, zero_point = map(self.quantizer.find_initializer, (scale_name, zero_point_name))
        bounds = self._bounds()
        if scale is None or zero_point is None or bounds is None:
            return False
        step = float(numpy_helper.to_array(scale).item())
        zero = float(numpy_helper.to_array(zero_point).item())
        codes = get_qmin_qmax_for_qType(zero_point.data_type)
        low, high = ((float(code) - zero) * step for code in codes)
        slack = 0.501 * step  # zero points are rounded
        return low >= bounds[0] - slack and high <= bounds[1] + slack

    def _bounds(self) -> tuple[float, float] | None:
        """Return the bounds of the node; None if they are computed."""
        if self.node.op_type == "Relu":
            return 0.0, math.inf
        ends = [self.attribute("min", -math.inf), self.attribute("max", math.inf)]
        for index, name in enumerate(self.node.input[1:3]):
            if not name:
                continue
            constant = self.quantizer.find_initializer(name)
            if constant is None:
                return None
            ends[index] = np.asarray(numpy_helper.to_array(constant), np.float64).item()
        return ends[0], ends[1]

    def quantize(self) -> None:
        """Emit the node, drop it, or leave it float."""
        node = self.node
        if node.op_type in ("Relu", "Clip"):
            self.QuantizeClipRelu()
            return
        reason = self.obstacle([0])
        if reason:
            self.keep(reason)
            return
        nnapi = node.op_type == "Sigmoid" and self.quantizer.extra_options.get(
            "extra.Sigmoid.nnapi"
        )
        params = self.output_params(1 / 256.0, 0) if nnapi else self.output_params()
        inputs, nodes = self.activations([0])
        self.quantizer.new_nodes += nodes
        self.emit(f"QLinear{node.op_type}", [*inputs, *params], params, **self.attributes())


class QDQRemovableActivation(QDQOperatorBase):
    """A Relu or Clip, which goes where the codes of its output hold no value beyond its bounds."""

    def quantize(self) -> None:
        """Mark the tensors of the node, or remove it."""
        source, result = self.node.input[0], self.node.output[0]
        if not self.quantizer.is_tensor_quantized(source):
            return
        if self._is_superfluous() and self.quantizer.try_replacing_upstream_output(source, result):
            self.quantizer.remove_node(self.node)
        else:
            self.quantizer.quantize_activation_tensor(source)
        self.mark_output()

    def _is_superfluous(self) -> bool:
        quantizer = self.quantizer
        if quantizer.is_activation_symmetric or quantizer.qdq_keep_removable_activations:
            return False
        bounds = self._bounds()
        if bounds is None or self.disable_qdq_for_node_output:
            return False
        return quantizer.clips_to(self.node.output[0], *bounds)

    def _bounds(self) -> tuple[float, float] | None:
        """Return the smallest and the largest output; None if they are computed."""
        if self.node.op_type == "Relu":
            return 0.0, math.inf
        given = {a.name: a.f for a in self.node.attribute}
        bounds = [given.get("min", -math.inf), given.get("max", math.inf)]
        for side, name in enumerate(self.node.input[1:3]):
            if name:
                constant = self.quantizer.find_initializer(name)
                if constant is None:
                    return None
                bounds[side] = float(numpy_helper.to_array(constant).reshape(()))
        return bounds[0], bounds[1]
