"""Erf and what is around it, as Gelu of com.microsoft."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper

from qwrap.ort.fusions.fusion import Fusion, Makers, Readers
from qwrap.ort.onnx_model import ONNXModel

_ROOT_OF_2 = 1.4142
_ROOT_OF_HALF = 0.7071067690849304
_ABOUT = 0.001
Head = tuple[str, list[onnx.NodeProto]]


class FusionGelu(Fusion):
    """Fuses x / 2 * (1 + erf(x / sqrt(2))) as PyTorch, Keras and TensorFlow write it."""

    def __init__(self, model: ONNXModel) -> None:
        super().__init__(model, "Gelu", "Erf")

    def fuse(
        self, node: onnx.NodeProto, input_name_to_nodes: Any, output_name_to_node: Any
    ) -> None:
        """Look for one of the three forms around an Erf; say what to remove and to add."""
        if (
            self.fuse_1(node, input_name_to_nodes, output_name_to_node)
            or self.fuse_2(node, input_name_to_nodes, output_name_to_node)
            or self.fuse_3(node, input_name_to_nodes, output_name_to_node)
        ):
            self.model.set_opset_import("com.microsoft", 1)

    def fuse_1(
        self,
        erf_node: onnx.NodeProto,
        input_name_to_nodes: Readers,
        output_name_to_node: Makers,
    ) -> bool:
        """Fuse PyTorch's form: 0.5 times x, or times the product at the end."""
        head = self._divided(erf_node, output_name_to_node)
        add = self._plus_one(erf_node, input_name_to_nodes)
        product = None if add is None else self._only_mul(add, input_name_to_nodes)
        if head is None or add is None or product is None:
            return False
        root, before = head
        other = product.input[1 - self.input_index(add.output[0], product)]
        if other == root:
            half = self._only_mul(product, input_name_to_nodes)
            last = half
        else:
            half, last = output_name_to_node.get(other), product
            if half is None or half.op_type != "Mul" or root not in half.input:
                return False
        if half is None or last is None or not self.has_constant_input(half, 0.5):
            return False
        nodes = [*before, erf_node, add, product, half]
        return self._become_gelu(nodes, root, last, input_name_to_nodes, output_name_to_node)

    def fuse_2(
        self,
        erf_node: onnx.NodeProto,
        input_name_to_nodes: Readers,
        output_name_to_node: Makers,
    ) -> bool:
        """Fuse Keras' form: a division, 0.5 times the sum, x times that."""
        head = self._divided(erf_node, output_name_to_node, computed=True)
        return self._fuse_half_sum(erf_node, head, input_name_to_nodes, output_name_to_node)

    def fuse_3(
        self,
        erf_node: onnx.NodeProto,
        input_name_to_nodes: Readers,
        output_name_to_node: Makers,
    ) -> bool:
        """Fuse TensorFlow's form: a product, 0.5 times the sum, x times that."""
        scaled = self.match_parent(erf_node, "Mul", 0, output_name_to_node)
        if scaled is None:
            return False
        constant = self.find_constant_input(scaled, _ROOT_OF_HALF, _ABOUT)
        if constant < 0:
            return False
        head = scaled.input[1 - constant], [scaled]
        return self._fuse_half_sum(erf_node, head, input_name_to_nodes, output_name_to_node)

    def _fuse_half_sum(
        self, erf: onnx.NodeProto, head: Head | None, readers: Readers, makers: Makers
    ) -> bool:
        add = self._plus_one(erf, readers)
        half = None if add is None else self._only_mul(add, readers)
        if head is None or add is None or half is None or not self.has_constant_input(half, 0.5):
            return False
        root, before = head
        last = self._only_mul(half, readers)
        if last is None or root not in last.input:
            return False
        return self._become_gelu([*before, erf, add, half, last], root, last, readers, makers)

    def _divided(
        self, erf: onnx.NodeProto, makers: Makers, *, computed: bool = False
    ) -> Head | None:
        """Return x and the nodes that divide it by the root of two before ``erf``."""
        division = self.match_parent(erf, "Div", 0, makers)
        if division is None:
            return None
        if self.find_constant_input(division, _ROOT_OF_2, _ABOUT) == 1:
            return division.input[0], [division]
        root = self.match_parent(division, "Sqrt", 1, makers) if computed else None
        if root is None or not self.has_constant_input(root, 2.0):
            return None
        return division.input[0], [division, root]

    def _plus_one(self, erf: onnx.NodeProto, readers: Readers) -> onnx.NodeProto | None:
        add = self._only(erf, "Add", readers)
        return add if add is not None and self.has_constant_input(add, 1) else None

    def _only_mul(self, node: onnx.NodeProto, readers: Readers) -> onnx.NodeProto | None:
        return self._only(node, "Mul", readers)

    @staticmethod
    def _only(node: onnx.NodeProto, op_type: str, readers: Readers) -> onnx.NodeProto | None:
        found = readers.get(node.output[0], ())
        return found[0] if len(found) == 1 and found[0].op_type == op_type else None

    def _become_gelu(
        self,
        nodes: list[onnx.NodeProto],
        root: str,
        last: onnx.NodeProto,
        readers: Readers,
        makers: Makers,
    ) -> bool:
        fused = helper.make_node("Gelu", [root], [last.output[0]], domain="com.microsoft")
        if not self.replace(nodes, fused, readers, makers):
            return False
        fused.name = self.create_unique_node_name()
        return True
