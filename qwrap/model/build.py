"""From a file to a module."""

from __future__ import annotations

import os
from pathlib import Path

from qwrap.graph.index import OnnxGraph
from qwrap.graph.load import Source, read_model
from qwrap.model.wrapped import WrappedModel


def load(source: Source) -> WrappedModel:
    """Load an ONNX model as a trainable ``torch.nn.Module`` that computes what onnxruntime does.

    Args:
        source: a path, an ``onnx.ModelProto`` or an ``onnx_ir.Model``; it is not modified.

    Returns:
        A module in float, in training mode as every new module, called with tensors in
        graph-input order or by graph-input name.

    Raises:
        ModelError: not a model, cut off, or its external data is missing or outside its folder.
        UnsupportedOpError: operators without an implementation, all of them listed.
    """
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    return WrappedModel(OnnxGraph(read_model(source), path))
