"""Seven nodes of early versions of YOLO, as SpaceToDepth."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper

from qwrap.ort.fusions import Fusion
from qwrap.ort.onnx_model import ONNXModel

__all__ = ["FusionSpaceToDepth"]
_PERMUTATIONS = [[0, 1, 2, 4, 3, 5], [0, 1, 3, 2], [0, 2, 1, 3, 4]]


class FusionSpaceToDepth(Fusion):
    """Fuses Reshape, Transpose, Reshape, Transpose, Reshape, Transpose, Reshape.

    With blocks of size b, the shapes on the way are [N, C, H/b, b, W/b, b] and, transposed and
    reshaped, [N, C, H/b * W/b, b * b], [N, C, b * b, H/b, W/b], [N, b * b * C, H/b, W/b].
    """

    def __init__(self, model: ONNXModel) -> None:
        super().__init__(model, "SpaceToDepth", "Reshape")

    def fuse(
        self, node: onnx.NodeProto, input_name_to_nodes: Any, output_name_to_node: Any
    ) -> None:
        """Look for the pattern below a Reshape; say what to remove and to add."""
        nodes = [node]
        for op_type in ("Transpose", "Reshape") * 3:
            below = input_name_to_nodes.get(nodes[-1].output[0], ())
            if len(below) != 1 or below[0].op_type != op_type:
                return
            nodes.append(below[0])
        size = self._block(nodes)
        if size is None:
            return
        fused = helper.make_node(
            "SpaceToDepth", [node.input[0]], [nodes[-1].output[0]], blocksize=size
        )
        if self.replace(nodes, fused, input_name_to_nodes, output_name_to_node):
            fused.name = self.create_unique_node_name()

    def _block(self, nodes: list[onnx.NodeProto]) -> int | None:
        """Return the size of the blocks, None if the shapes are others or not known."""
        if [self.get_node_attribute(node, "perm") for node in nodes[1::2]] != _PERMUTATIONS:
            return None
        names = [nodes[0].input[0], *(node.output[0] for node in nodes[::2])]
        types = [self.model.get_tensor_type(name) for name in names]
        shapes = [[] if known is None else self.tensor_shape_to_list(known) for known in types]
        if len(shapes[0]) != 4 or len(shapes[1]) != 6:
            return None
        batch, channels, height, width = shapes[0]
        size = shapes[1][3]
        if not all(isinstance(n, int) and n > 0 for n in (channels, height, width, size)):
            return None
        assert isinstance(channels, int)
        assert isinstance(size, int)
        rows, columns = (int(n) // size for n in (height, width))
        wanted = [
            [batch, channels, rows, size, columns, size],
            [batch, channels, rows * columns, size * size],
            [batch, channels, size * size, rows, columns],
            [batch, size * size * channels, rows, columns],
        ]
        divides = rows * size == height and columns * size == width
        return size if divides and shapes[1:] == wanted else None
