"""From a file to a module."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

import onnx_ir as ir

from qwrap.errors import ConfigError
from qwrap.graph.check import STANDARD
from qwrap.graph.expand import expand_functions
from qwrap.graph.index import OnnxGraph, opset_of
from qwrap.graph.load import Source, read_model
from qwrap.model.wrapped import WrappedModel
from qwrap.ops import find

Expand = Literal["auto", "never", "always"]


def load(source: Source, *, expand: Expand = "auto") -> WrappedModel:
    """Load an ONNX model as a trainable ``torch.nn.Module`` that computes what onnxruntime does.

    Args:
        source: a path, an ``onnx.ModelProto`` or an ``onnx_ir.Model``; it is not modified.
        expand: which operators with a function body in their schema run as that body: those
            without an implementation of their own, none, or all. Functions of the model itself
            are always expanded.

    Returns:
        A module in float, in training mode as every new module, called with tensors in
        graph-input order or by graph-input name.

    Raises:
        ModelError: not a model, cut off, or its external data is missing or outside its folder.
        UnsupportedOpError: operators without an implementation, all of them listed.
    """
    if expand not in get_args(Expand):
        raise ConfigError(f"expand={expand!r}; choose one of {', '.join(get_args(Expand))}")
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    pristine = read_model(source)

    def wanted(node: ir.Node) -> bool:
        if expand == "auto":
            domain = "" if node.domain in STANDARD else node.domain
            return find(domain, node.op_type, opset_of(pristine, domain)) is None
        return expand == "always"

    return WrappedModel(OnnxGraph(expand_functions(pristine, wanted), path, pristine))
