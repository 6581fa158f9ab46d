"""Bodies of If, Loop and Scan, each quantized by a quantizer of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from onnx import ModelProto, NodeProto

from qwrap.graph import subgraphs
from qwrap.ort.onnx_model import ONNXModel

if TYPE_CHECKING:
    from qwrap.ort.qdq_quantizer import QDQQuantizer


def body_quantizers(parent: QDQQuantizer, node: NodeProto) -> Iterator[QDQQuantizer]:
    """Yield a quantizer for a copy of each body of ``node``, in the order of its attributes."""
    for body in subgraphs(node):
        model = ModelProto()
        model.opset_import.extend(parent.model.opset_import())
        model.ir_version = parent.model.ir_version()
        model.graph.CopyFrom(body)
        yield parent.for_body(ONNXModel(model))


def write_bodies(node: NodeProto, quantizers: list[QDQQuantizer]) -> None:
    """Put the graphs that quantizers made into ``node``, in place."""
    for body, quantizer in zip(list(subgraphs(node)), quantizers, strict=True):
        body.CopyFrom(quantizer.model.graph())
