"""From a file to a module."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import onnx_ir as ir
import torch

from qwrap.errors import ConfigError, GradientWarning, QwrapWarning
from qwrap.graph.check import refuse
from qwrap.graph.expand import expand_functions
from qwrap.graph.index import OnnxGraph, opset_of
from qwrap.graph.load import Source, read_model, without_weights
from qwrap.graph.nodes import STANDARD
from qwrap.graph.tie import merged_names
from qwrap.graph.types import type_problems
from qwrap.model.layout import fits
from qwrap.model.missing import missing_operators
from qwrap.model.settings import LoadSettings
from qwrap.model.wrapped import WrappedModel
from qwrap.ops import find

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Expand = Literal["auto", "never", "always"]


def load(
    source: Source,
    *,
    expand: Expand = "auto",
    parameters: Collection[str] | None = None,
    untie: bool = False,
    dtype: torch.dtype | None = None,
    custom_ops: Sequence[str | os.PathLike[str]] = (),
) -> WrappedModel:
    """Load an ONNX model as a trainable ``torch.nn.Module`` that computes what onnxruntime does.

    Args:
        source: a path, an ``onnx.ModelProto`` or an ``onnx_ir.Model``; it is not modified.
        expand: which operators with a function body in their schema run as that body: those
            without an implementation of their own, none, or all. Functions of the model itself
            are always expanded.
        parameters: names of the initialisers that are to be trained, or patterns of them
            (``"encoder.*"``); all others become buffers. By default every float tensor of rank 1
            or more is a parameter but running statistics; see ``Layout``.
        untie: give each node its own copy of the float initialisers that several nodes share; the
            copies are called ``<initialiser>_<node>``, in what is exported too.
        dtype: compute in this type what is float32 in the graph: parameters, constants, inputs,
            what Cast makes. The graph itself stays what it is. None: as the graph says.
        custom_ops: shared libraries with operators for onnxruntime, as its
            ``SessionOptions.register_custom_ops_library`` takes them. Loading one runs its code.

    Returns:
        A module in float, in training mode as every new module, called with tensors in
        graph-input order or by graph-input name. What no torch function computes runs in an
        onnxruntime session of its own, if that has a kernel; a ``GradientWarning`` says so.

    Raises:
        ModelError: not a model, cut off, malformed, with operators that are given types they do
            not take, or its external data is missing or outside its folder. All that is wrong is
            listed, operators without an implementation included.
        UnsupportedOpError: nothing is wrong but operators without an implementation.
        ConfigError: no float tensor has a name in ``parameters``.

    Warns:
        QwrapWarning: weights of several normalisations are one initialiser, and not untied.
    """
    if expand not in get_args(Expand):
        raise ConfigError(f"expand={expand!r}; choose one of {', '.join(get_args(Expand))}")
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    also = partial(missing_operators, has_libraries=bool(custom_ops))
    pristine = read_model(source, also, untied=untie)

    def wanted(node: ir.Node) -> bool:
        if expand == "auto":
            domain = "" if node.domain in STANDARD else node.domain
            return find(domain, node.op_type, opset_of(pristine, domain)) is None
        return expand == "always"

    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"dtype={dtype}; choose one of {', '.join(map(str, FLOATS))}")
    if wrong := type_problems(pristine):
        where = "the model" if path is None else str(path)
        refuse(where, [*wrong, *also(without_weights(pristine))])
    settings = LoadSettings(
        dtype=dtype,
        libraries=tuple(os.fspath(path) for path in custom_ops),
        parameters=None if parameters is None else tuple(parameters),
    )
    model = WrappedModel(OnnxGraph(expand_functions(pristine, wanted), path, pristine), settings)
    _check_patterns(model, parameters or ())
    if model.layout.values.fallbacks:
        warnings.warn(
            f"nodes {model.layout.values.fallbacks} are computed by onnxruntime; gradients stop "
            "there. Register a torch function with qwrap.register_op to train through them",
            GradientWarning,
            stacklevel=2,
        )
    if not untie and (merged := merged_names(pristine)):
        listed = ", ".join(f"{name!r} ({count} nodes)" for name, count in merged.items())
        warnings.warn(
            f"{listed}: the exporter seems to have merged equal weights, which are trained as one; "
            "qwrap.load(..., untie=True) gives each node its own",
            QwrapWarning,
            stacklevel=2,
        )
    return model


def _check_patterns(model: WrappedModel, patterns: Collection[str]) -> None:
    trained = [key for key, slot in model.layout.slots.items() if slot.trainable]
    if idle := [p for p in patterns if not any(fits(key, p) for key in trained)]:
        raise ConfigError(
            f"parameters={idle}: no float tensor of the model has such a name; see "
            "model.tensor_names for the names there are"
        )
