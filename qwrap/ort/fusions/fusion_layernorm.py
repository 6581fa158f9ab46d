"""The arithmetic of layer normalization as LayerNormalization."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper

from qwrap.ort.fusions.fusion import Fusion, Readers
from qwrap.ort.onnx_model import ONNXModel

_LARGEST_EPSILON = 1.0e-4
_PATHS = [
    (["Sqrt", "Add", "ReduceMean", "Pow", "Sub"], [1, 0, 0, 0, 0]),
    (["Sqrt", "Add", "ReduceMean", "Pow", "Cast", "Sub"], [1, 0, 0, 0, 0, 0]),
    (["Sqrt", "Add", "ReduceMean", "Mul", "Sub"], [1, 0, 0, 0, 0]),
    (["Sqrt", "Add", "ReduceMean", "Mul", "Cast", "Sub"], [1, 0, 0, 0, 0, 0]),
]
"""From the division up to the difference: the square is a Pow, or a Mul of a value with itself."""


class FusionLayerNormalization(Fusion):
    """Fuses (x - mean) / sqrt(mean of squares + epsilon) * scale + bias over the last axis."""

    def __init__(self, model: ONNXModel) -> None:
        super().__init__(model, "LayerNormalization", "ReduceMean")

    def fuse(
        self, node: onnx.NodeProto, input_name_to_nodes: Any, output_name_to_node: Any
    ) -> None:
        """Look for the pattern below a mean; say what to remove and to add."""
        differences = self._differences(node, input_name_to_nodes)
        divisions = [
            self.find_first_child_by_type(d, "Div", input_name_to_nodes, recursive=False)
            for d in differences
        ]
        division = next((d for d in divisions if d is not None), None)
        if division is None:
            return
        _, above, _ = self.match_parent_paths(division, _PATHS, output_name_to_node)
        if above is None or above[-1] not in differences:
            return
        if division.input[0] not in {d.output[0] for d in differences}:
            return
        epsilon = self._epsilon(above[1])
        if epsilon is None or not self._is_square(above[3]):
            return
        if not (self._is_over_last_axis(node) and self._is_over_last_axis(above[2])):
            return
        tail = self._scale_and_bias(division, input_name_to_nodes)
        if tail is None:
            return
        product, total, scale, bias = tail
        nodes = [node, *differences, *above[:-1], division, product, total]
        fused = helper.make_node(
            "LayerNormalization", [node.input[0], scale, bias], [total.output[0]], epsilon=epsilon
        )
        if self.replace(nodes, fused, input_name_to_nodes, output_name_to_node):
            fused.name = self.create_unique_node_name()

    def _differences(self, mean: onnx.NodeProto, readers: Any) -> list[onnx.NodeProto]:
        """Return the one or two nodes (older PyTorch wrote two) that subtract the mean from x."""
        children = self.model.get_children(mean, readers)
        fits = all(c.op_type == "Sub" and c.input[0] == mean.input[0] for c in children)
        return children if fits and 1 <= len(children) <= 2 else []

    def _epsilon(self, add: onnx.NodeProto) -> float | None:
        _, value = self.get_constant_input(add)
        if value is None or value.size != 1:
            return None
        epsilon = float(value.reshape(()))
        return epsilon if 0 < epsilon <= _LARGEST_EPSILON else None

    def _is_square(self, node: onnx.NodeProto) -> bool:
        if node.op_type == "Pow":
            return self.find_constant_input(node, 2.0) == 1
        return bool(node.input[0] == node.input[1])

    def _is_over_last_axis(self, mean: onnx.NodeProto) -> bool:
        """Whether a mean keeps its rank and runs along the last axis, as far as that is known."""
        if self.get_node_attribute(mean, "keepdims") == 0:
            return False
        axes = self.get_node_attribute(mean, "axes")
        if axes is None and len(mean.input) > 1:
            axes = self.model.get_constant_value(mean.input[1])
        if axes is None or len(axes) != 1:
            return False
        known = self.model.get_tensor_type(mean.input[0])
        if int(axes[0]) == -1:
            return True
        return (
            known is not None
            and known.HasField("shape")
            and (int(axes[0]) == len(known.shape.dim) - 1)
        )

    def _scale_and_bias(
        self, division: onnx.NodeProto, readers: Readers
    ) -> tuple[onnx.NodeProto, onnx.NodeProto, str, str] | None:
        """Return the nodes that scale and shift, and the one-dimensional constants they read."""
        names: list[str] = []
        nodes = [division]
        for op_type in ("Mul", "Add"):
            below = readers.get(nodes[-1].output[0], ())
            if not below or below[0].op_type != op_type:
                return None
            other = below[0].input[1 - self.input_index(nodes[-1].output[0], below[0])]
            if not self.is_constant_with_specified_rank(other, 1):
                return None
            names.append(other)
            nodes.append(below[0])
        return nodes[1], nodes[2], names[0], names[1]
