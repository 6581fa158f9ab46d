"""Pad on codes."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qwrap.ort.operators.base_operator import QuantOperatorBase
from qwrap.ort.quant_utils import (
    TENSOR_NAME_QUANT_SUFFIX,
    QuantizedValue,
    get_qmin_qmax_for_qType,
    quantize_nparray,
)

__all__ = ["QPad"]


class QPad(QuantOperatorBase):
    """Codes around codes: those of the edges, or the one of the padded value."""

    def quantize(self) -> None:
        """Emit the node where its input is codes, else leave it float."""
        quantizer = self.quantizer
        value = quantizer.find_quantized_value(self.node.input[0])
        if quantizer.opset_version < 11 or value is None or value.axis is not None:
            old = quantizer.opset_version < 11
            self.keep("Pad takes tensors of pads since opset 11" if old else "no codes to pad")
            return
        made = self.copy()
        if self.attribute("mode", b"constant") == b"constant":
            name = self._padded_value(value)
            if name is None:
                self.keep("what it pads with is beyond the codes of its input")
                return
            made.input.extend([""] * (3 - len(made.input)))
            made.input[2] = name
        output = self.node.output[0]
        made.input[0] = value.q_name
        made.output[0] = quantizer.free_name(output + TENSOR_NAME_QUANT_SUFFIX)
        kind = quantizer.code_type(self.node.input[0])
        quantizer.note_value(output, made.output[0], value.scale_name, value.zp_name, kind)
        quantizer.new_nodes.append(made)

    def _padded_value(self, value: QuantizedValue) -> str | None:
        """Return the name of the code to pad with; None if there is none.

        Without a value that is the zero point, which means 0.
        """
        name = self.node.input[2] if len(self.node.input) > 2 else ""
        if not name:
            return str(value.zp_name)
        constant = self.quantizer.find_initializer(name)
        if constant is None:
            return self._computed(name, value)
        tensors = [self.quantizer.find_initializer(n) for n in (value.scale_name, value.zp_name)]
        if None in tensors:
            return None
        scale, zero = (numpy_helper.to_array(t).reshape(()) for t in tensors if t is not None)
        kind = helper.np_dtype_to_tensor_dtype(zero.dtype)
        padded = numpy_helper.to_array(constant).astype(np.float32)
        ends = [(float(end) - float(zero)) * scale for end in get_qmin_qmax_for_qType(kind)]
        if not (ends[0] - scale / 2 <= padded.min() and padded.max() <= ends[1] + scale / 2):
            return None
        codes = quantize_nparray(kind, padded, scale, zero)
        made = self.quantizer.free_name(name + TENSOR_NAME_QUANT_SUFFIX)
        self.quantizer.model.add_initializer(numpy_helper.from_array(np.asarray(codes), made))
        return made

    def _computed(self, name: str, value: QuantizedValue) -> str:
        """Append a node that quantizes what is padded with as the input is."""
        quantizer = self.quantizer
        quantizer.read_float(name)
        nodes: list[NodeProto] = []
        source = name
        if quantizer.types.is_half(name):
            source = quantizer.free_name(f"{name}_float32")
            nodes.append(
                helper.make_node("Cast", [name], [source], f"{source}_Cast", to=TensorProto.FLOAT)
            )
        made = quantizer.free_name(name + TENSOR_NAME_QUANT_SUFFIX)
        inputs = [source, value.scale_name, value.zp_name]
        nodes.append(helper.make_node("QuantizeLinear", inputs, [made], f"{name}_QuantizeLinear"))
        quantizer.add_new_nodes(nodes)
        return made
