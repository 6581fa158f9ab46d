"""Pad on codes."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qwrap.ort.operators.base_operator import QuantOperatorBase
from qwrap.ort.operators.qdq_base_operator import QDQOperatorBase
from qwrap.ort.quant_utils import (
    TENSOR_NAME_QUANT_SUFFIX,
    QuantizedValue,
    get_qmin_qmax_for_qType,
    quantize_nparray,
)

__all__ = ["QDQPad", "QPad"]


class QPad(QuantOperatorBase):
    """Codes around codes: those of the edges, or the one of the padded value."""

    def quantize(self) -> None:
        """Emit the node where its input is codes, else leave it float."""
        quantizer = self.quantizer
        value = self.known_codes()
        if quantizer.opset_version < 11 or value is None:
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


class QDQPad(QDQOperatorBase):
    """Pairs around every float input and the output, which shares the input's where it can."""

    def quantize(self) -> None:
        """Mark the tensors of the node."""
        for name in self.node.input:
            self.quantizer.quantize_activation_tensor(name)
        if self._is_input_enough():
            self.share_output()
        else:
            self.mark_output()

    def _is_input_enough(self) -> bool:
        """Whether the output holds nothing but values of the input and 0."""
        attributes = {a.name: helper.get_attribute_value(a) for a in self.node.attribute}
        mode = attributes.get("mode", b"constant")
        if mode in {b"reflect", b"edge", b"wrap"}:
            return True
        value = self._pad_value(attributes.get("value", 0.0))
        return mode == b"constant" and value is not None and not value.any()

    def _pad_value(self, attribute: float) -> Any:
        """Return what a constant mode pads with; None if it is computed."""
        if self.quantizer.opset_version < 11:
            return np.asarray(attribute)
        if len(self.node.input) < 3 or not self.node.input[2]:
            return np.zeros(())
        found = self.quantizer.find_initializer(self.node.input[2])
        return None if found is None else numpy_helper.to_array(found)
