"""From a file to a module."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import onnx_ir as ir
import torch

from qwrap.errors import ConfigError, GradientWarning
from qwrap.graph.check import STANDARD
from qwrap.graph.expand import expand_functions
from qwrap.graph.index import OnnxGraph, opset_of
from qwrap.graph.load import Source, read_model
from qwrap.model.settings import LoadSettings
from qwrap.model.wrapped import WrappedModel
from qwrap.ops import find

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Expand = Literal["auto", "never", "always"]


def load(
    source: Source,
    *,
    expand: Expand = "auto",
    dtype: torch.dtype | None = None,
    custom_ops: Sequence[str | os.PathLike[str]] = (),
) -> WrappedModel:
    """Load an ONNX model as a trainable ``torch.nn.Module`` that computes what onnxruntime does.

    Args:
        source: a path, an ``onnx.ModelProto`` or an ``onnx_ir.Model``; it is not modified.
        expand: which operators with a function body in their schema run as that body: those
            without an implementation of their own, none, or all. Functions of the model itself
            are always expanded.
        dtype: compute in this type what is float32 in the graph: parameters, constants, inputs,
            what Cast makes. The graph itself stays what it is. None: as the graph says.
        custom_ops: shared libraries with operators for onnxruntime, as its
            ``SessionOptions.register_custom_ops_library`` takes them. Loading one runs its code.

    Returns:
        A module in float, in training mode as every new module, called with tensors in
        graph-input order or by graph-input name. What no torch function computes runs in an
        onnxruntime session of its own, if that has a kernel; a ``GradientWarning`` says so.

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

    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"dtype={dtype}; choose one of {', '.join(map(str, FLOATS))}")
    settings = LoadSettings(dtype=dtype, libraries=tuple(os.fspath(path) for path in custom_ops))
    model = WrappedModel(OnnxGraph(expand_functions(pristine, wanted), path, pristine), settings)
    if model.layout.values.fallbacks:
        warnings.warn(
            f"nodes {model.layout.values.fallbacks} are computed by onnxruntime; gradients stop "
            "there. Register a torch function with qwrap.register_op to train through them",
            GradientWarning,
            stacklevel=2,
        )
    return model
