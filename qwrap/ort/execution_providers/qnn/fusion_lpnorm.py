"""x divided by its norm, as LpNormalization."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper

from qwrap.ort.fusions import Fusion
from qwrap.ort.fusions.fusion import Makers
from qwrap.ort.onnx_model import ONNXModel

__all__ = ["FusionLpNormalization"]
_ABOUT = 1e-13


class FusionLpNormalization(Fusion):
    """Fuses ReduceL2 over the last axis, Clip from below, Expand and Div, as PyTorch writes it.

    Args:
        model: what is changed.
        epsilon: lower bound of the Clip.
    """

    def __init__(self, model: ONNXModel, epsilon: float = 1e-12) -> None:
        super().__init__(model, "LpNormalization", "ReduceL2")
        self.epsilon = epsilon

    def fuse(
        self, node: onnx.NodeProto, input_name_to_nodes: Any, output_name_to_node: Any
    ) -> None:
        """Look for the pattern below a norm; say what to remove and to add."""
        nodes = [node]
        for op_type in ("Clip", "Expand", "Div"):
            below = input_name_to_nodes.get(nodes[-1].output[0], ())
            if len(below) != 1 or below[0].op_type != op_type:
                return
            nodes.append(below[0])
        _, clip, expand, division = nodes
        root = node.input[0]
        if (
            list(division.input) != [root, expand.output[0]]
            or not self._is_over_last_axis(node)
            or not self._is_lower_bound(clip)
            or not self._is_of_shape(expand, root, output_name_to_node)
        ):
            return
        fused = helper.make_node("LpNormalization", [root], [division.output[0]], p=2, axis=-1)
        shape = output_name_to_node.get(expand.input[1])
        if shape is not None and list(input_name_to_nodes[shape.output[0]]) == [expand]:
            nodes.append(shape)
        if self.replace(nodes, fused, input_name_to_nodes, output_name_to_node):
            fused.name = self.create_unique_node_name()

    def _is_over_last_axis(self, node: onnx.NodeProto) -> bool:
        if self.get_node_attribute(node, "keepdims") == 0:
            return False
        axes = self.get_node_attribute(node, "axes")
        if axes is None and len(node.input) > 1:
            axes = self.model.get_constant_value(node.input[1])
        known = self.model.get_tensor_type(node.input[0])
        if axes is None or len(axes) != 1:
            return False
        rank = len(known.shape.dim) if known is not None and known.HasField("shape") else 0
        return int(axes[0]) == -1 or (rank > 0 and int(axes[0]) == rank - 1)

    def _is_lower_bound(self, clip: onnx.NodeProto) -> bool:
        bounds = []
        for index, name in ((1, "min"), (2, "max")):
            bound = self.get_node_attribute(clip, name)
            if bound is None and len(clip.input) > index and clip.input[index]:
                bound = self.model.get_constant_value(clip.input[index])
                if bound is None:
                    return False
            bounds.append(bound)
        low, high = bounds
        return (
            high is None
            and low is not None
            and float(low) > 0
            and abs(float(low) - self.epsilon) < _ABOUT
        )

    def _is_of_shape(self, expand: onnx.NodeProto, root: str, makers: Makers) -> bool:
        """Whether ``expand`` makes a tensor of the shape of ``root``, as far as that is known."""
        shape = makers.get(expand.input[1])
        if shape is not None and shape.op_type == "Shape" and shape.input[0] == root:
            return True
        types = [self.model.get_tensor_type(name) for name in (root, expand.output[0])]
        sizes = [
            self.tensor_shape_to_list(known)
            for known in types
            if known is not None and known.HasField("shape")
        ]
        return len(sizes) == 2 and sizes[0] == sizes[1] and "?" not in sizes[0]
