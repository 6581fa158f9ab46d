"""A node in QDQ form: pairs around every float tensor where nothing better is known."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from onnx import NodeProto

if TYPE_CHECKING:
    from qwrap.ort.qdq_quantizer import QDQQuantizer

__all__ = ["QDQOperatorBase"]


class QDQOperatorBase:
    """Marks all float inputs and outputs of a node as activations; children know better.

    Attributes:
        quantizer: takes the marks.
        node: of the float model.
        disable_qdq_for_node_output: whether outputs are to stay float.
    """

    def __init__(self, onnx_quantizer: QDQQuantizer, onnx_node: NodeProto) -> None:
        self.quantizer = onnx_quantizer
        self.node = onnx_node
        excluded = onnx_quantizer.op_types_to_exclude_output_quantization
        self.disable_qdq_for_node_output = onnx_node.op_type in excluded

    def quantize(self) -> None:
        """Mark the tensors of the node."""
        outputs = [] if self.disable_qdq_for_node_output else self.node.output
        for tensor_name in itertools.chain(self.node.input, outputs):
            self.quantizer.quantize_activation_tensor(tensor_name)

    def mark_weight(self, name: str, default_axis: int) -> None:
        """Mark a weight, with a scale for each channel if that is asked for.

        Args:
            name: of an initializer, or of any tensor.
            default_axis: of the channels, where neither options nor overrides say otherwise.
        """
        per_channel, axis = self.quantizer.is_tensor_per_channel(
            name, default_axis, op_type=self.node.op_type
        )
        if per_channel and axis is not None:
            self.quantizer.quantize_weight_tensor_per_channel(name, axis)
        else:
            self.quantizer.quantize_weight_tensor(name)

    def mark_output(self) -> None:
        """Mark the first output, unless it is to stay float."""
        if not self.disable_qdq_for_node_output:
            self.quantizer.quantize_activation_tensor(self.node.output[0])

    def share_output(self, position: int = 0) -> None:
        """Mark an output that takes the parameters of the first input."""
        if not self.disable_qdq_for_node_output:
            self.quantizer.quantize_output_same_as_input(
                self.node.output[position], self.node.input[0], self.node.name
            )
