"""Upsample, which opset 10 withdrew, as the Resize of opset 11."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qwrap.ort.fusions.fusion import Fusion
from qwrap.ort.onnx_model import ONNXModel


class ReplaceUpsampleWithResize(Fusion):
    """Replaces each Upsample by the Resize that takes the same pixels.

    Args:
        model: what is changed; it has to import opset 11 or later afterwards.
        opset: what it imports now; it says where the scales are.

    Source: ONNX Resize-11; Upsample aligned the first pixels, which is ``asymmetric``.
    """

    def __init__(self, model: ONNXModel, opset: int) -> None:
        super().__init__(model, "Resize", "Upsample")
        self.opset = opset

    def fuse(
        self, node: onnx.NodeProto, input_name_to_nodes: Any, output_name_to_node: Any
    ) -> None:
        """Replace one Upsample."""
        del input_name_to_nodes, output_name_to_node
        stem = node.name or node.output[0]
        scales = self._attribute_scales(node)
        scales_name = f"{stem}_scales"
        if scales is None:
            scales_name = node.input[1]
        else:
            self._add_constant(scales_name, scales)
        self._add_constant(f"{stem}_roi", np.empty(0, np.float32))
        mode = (self.get_node_attribute(node, "mode") or b"nearest").decode()
        resize = helper.make_node(
            "Resize",
            [node.input[0], f"{stem}_roi", scales_name],
            node.output,
            name=node.name,
            mode="linear" if mode == "bilinear" else mode,
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        self.nodes_to_remove.append(node)
        self.nodes_to_add.append(resize)

    def apply(self) -> bool:
        """Replace every Upsample, in place; return whether there was one."""
        if super().apply():
            self.model.topological_sort()
            return True
        return False

    def _attribute_scales(self, node: onnx.NodeProto) -> NDArray[np.float32] | None:
        """Return the scales that attributes give; None where they are an input."""
        if self.opset > 8:
            return None
        if self.opset >= 7:
            return np.asarray(self.get_node_attribute(node, "scales"), np.float32)
        height, width = (
            self.get_node_attribute(node, f"{side}_scale") or 1.0 for side in ("height", "width")
        )
        return np.asarray([1, 1, height, width], np.float32)

    def _add_constant(self, name: str, value: NDArray[np.float32]) -> None:
        tensor = numpy_helper.from_array(value, name)
        self.nodes_to_add.append(helper.make_node("Constant", [], [name], value=tensor))
