"""A node in QOperator form: float where nothing better is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from onnx import NodeProto, TensorProto, helper

from qwrap.ort.quant_utils import (
    TENSOR_NAME_QUANT_SUFFIX,
    QuantizedValue,
    attribute_to_kwarg,
    ms_domain,
)

if TYPE_CHECKING:
    from qwrap.ort.onnx_quantizer import ONNXQuantizer

MOVED_BY_ORT = frozenset({"MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that onnxruntime's optimizer takes from behind a DequantizeLinear node before it."""


class QuantOperatorBase:
    """Leaves its node on float tensors; children emit operators on codes instead.

    Attributes:
        quantizer: takes new nodes and initializers.
        node: the float node.
        reason: why it stays float; empty where it does not, or where no rule was asked.
    """

    def __init__(self, onnx_quantizer: ONNXQuantizer, onnx_node: NodeProto) -> None:
        self.quantizer = onnx_quantizer
        self.node = onnx_node
        self.reason = ""

    def should_quantize(self) -> bool:
        """Whether the node is asked for and computes with floats."""
        if not self.quantizer.should_quantize_node(self.node):
            return False
        return self.quantizer.is_float_tensor(self.node.input[0])

    def quantize(self) -> None:
        """Emit the node as it is, behind DequantizeLinear nodes for inputs that are codes.

        What only moves int8 codes is moved behind its DequantizeLinear node since opset 21, where
        onnxruntime's optimizer does that wrongly: the session refuses its result.
        """
        value = self.known_codes() if self.node.op_type in MOVED_BY_ORT else None
        if (
            value is not None
            and self.quantizer.opset_version >= 21
            and self.quantizer.code_type(self.node.input[0]) == TensorProto.INT8
        ):
            self.pass_through(value.q_name, value.scale_name, value.zp_name)
            return
        self.quantizer.read_floats(self.node)
        self.quantizer.new_nodes.append(self.node)

    def keep(self, reason: str) -> None:
        """Emit the node as it is, and remember why."""
        self.reason = reason
        QuantOperatorBase.quantize(self)

    def obstacle(
        self, activations: Sequence[int], weights: Sequence[int] = (), output: bool = True
    ) -> str:
        """Return why no integer kernel can take the node; empty if one can.

        Args:
            activations: indices of inputs whose codes must be of one type, the output's too.
            weights: indices of inputs that may be signed where activations are unsigned.
            output: whether the output is of codes; if not, weights may have either sign.
        """
        inputs = self.node.input
        names = [inputs[i] for i in activations if inputs[i]]
        types = [self.quantizer.code_type(name) for name in names]
        if output:
            names.append(self.node.output[0])
            types.append(self.quantizer.output_type(self.node.output[0]))
        for name, code_type in zip(names, types, strict=True):
            if code_type is None:
                return f"no quantization parameters for tensor '{name}'"
        if len(set(types)) > 1:
            kinds = ", ".join(f"'{n}' {_type_name(t)}" for n, t in zip(names, types, strict=True))
            return f"no kernel takes codes of several types: {kinds}"
        signed = output and types[0] == TensorProto.INT8
        for name in (inputs[i] for i in weights):
            kind = self.quantizer.code_type(name, as_weight=True)
            if kind is None:
                return f"no quantization parameters for tensor '{name}'"
            if signed and kind != TensorProto.INT8:
                return f"no kernel takes int8 activations with {_type_name(kind)} '{name}'"
        return ""

    def activations(self, indices: Sequence[int]) -> tuple[list[str], list[NodeProto]]:
        """Quantize inputs with the type of activations.

        Returns:
            Codes, scale and zero point of each, one after the other; the nodes that make them.
        """
        codes, zero_points, scales, nodes = self.quantizer.quantize_activation(self.node, indices)
        return _triples(codes, scales, zero_points), nodes

    def weight(self, index: int, axis: int) -> tuple[list[str], list[NodeProto]]:
        """Quantize an input with the type of weights.

        Args:
            index: of the input.
            axis: along which channels run, if the quantizer is asked for a scale of each.

        Returns:
            As ``activations``.
        """
        codes, zero_points, scales, nodes = self.quantizer.quantize_weight(
            self.node, [index], reduce_range=True, op_level_per_channel=True, axis=axis
        )
        return _triples(codes, scales, zero_points), nodes

    def known_codes(self) -> QuantizedValue | None:
        """Return the codes that the first input has; None unless they are of 8 bits and one scale.

        A bias, for one, has codes of 32 bits.
        """
        value = self.quantizer.find_quantized_value(self.node.input[0])
        if value is None or value.axis is not None:
            return None
        return None if value.node_qtype == TensorProto.INT32 else value

    def pass_through(self, codes: str, scale: str, zero_point: str) -> None:
        """Append the node with codes in the place of its first input and output."""
        made, output = self.copy(), self.node.output[0]
        made.input[0] = codes
        made.output[0] = self.quantizer.free_name(output + TENSOR_NAME_QUANT_SUFFIX)
        kind = self.quantizer.code_type(self.node.input[0])
        self.quantizer.note_value(output, made.output[0], scale, zero_point, kind)
        self.quantizer.new_nodes.append(made)

    def output_params(
        self, scale: float | None = None, zero_point: int | None = None
    ) -> tuple[str, str]:
        """Return the names of the scale and the zero point of the output, given or calibrated."""
        output = self.node.output[0]
        return self.quantizer._get_quantization_params(output, scale, zero_point)[1:3]

    def emit(
        self,
        op_type: str,
        inputs: Sequence[str],
        params: tuple[str, str],
        domain: str = ms_domain,
        **attributes: Any,
    ) -> None:
        """Append a node whose output is the codes of this node's.

        Args:
            op_type: operator.
            inputs: names.
            params: scale and zero point of the output.
            domain: of the operator.
            attributes: of the operator.
        """
        output = self.node.output[0]
        codes = self.quantizer.free_name(output + TENSOR_NAME_QUANT_SUFFIX)
        if domain:
            attributes["domain"] = domain
        node = helper.make_node(op_type, inputs, [codes], self.quantized_name, **attributes)
        self.quantizer.new_nodes.append(node)
        kind = self.quantizer.output_type(output)
        self.quantizer.note_value(output, codes, *params, kind)

    @property
    def quantized_name(self) -> str:
        """Name of the node that replaces this one; empty if this one has none."""
        return f"{self.node.name}_quant" if self.node.name else ""

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of the node, as ``helper.make_node`` takes them."""
        return {k: v for a in self.node.attribute for k, v in attribute_to_kwarg(a).items()}

    def attribute(self, name: str, default: Any) -> Any:
        """Return one attribute of the node."""
        return self.attributes().get(name, default)

    def copy(self) -> NodeProto:
        """Return the node, to be changed."""
        node = NodeProto()
        node.CopyFrom(self.node)
        return node


def _triples(codes: list[str], scales: list[str], zero_points: list[str]) -> list[str]:
    return [name for three in zip(codes, scales, zero_points, strict=True) for name in three]


def _type_name(kind: int | None) -> str:
    return "unknown" if kind is None else helper.tensor_dtype_to_string(kind).split(".")[-1].lower()
