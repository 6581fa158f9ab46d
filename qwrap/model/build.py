"""From a file to a module."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch

from qwrap.errors import ConfigError, GradientWarning, QwrapWarning, UnsupportedOpError
from qwrap.graph.check import refuse
from qwrap.graph.expand import expand_functions
from qwrap.graph.index import OnnxGraph, opset_of
from qwrap.graph.load import Source, read_model, without_weights
from qwrap.graph.nodes import STANDARD
from qwrap.graph.tie import merged_names
from qwrap.graph.types import type_problems
from qwrap.model.layout import fits
from qwrap.model.missing import missing_operators
from qwrap.model.refusals import refused_nodes
from qwrap.model.settings import Expand, LoadSettings
from qwrap.model.wrapped import WrappedModel
from qwrap.ops import find


def load(
    source: Source,
    *,
    expand: Expand = "auto",
    dtype: torch.dtype | None = None,
    custom_ops: Sequence[str | os.PathLike[str]] = (),
    parameters: Collection[str] | None = None,
    untie: bool = False,
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
        parameters: names of the initialisers that are to be trained, or patterns of them
            (``"encoder.*"``); all others become buffers. By default every float tensor of rank 1
            or more is a parameter but running statistics; see ``Layout``.
        untie: give each node its own copy of the float initialisers that several nodes share; the
            copies are called ``<initialiser>_<node>``, in what is exported too.

    Returns:
        A module in float, in training mode as every new module, called with tensors in
        graph-input order or by graph-input name. What no torch function computes runs in an
        onnxruntime session of its own, if that has a kernel; a ``GradientWarning`` says so.

    Raises:
        ModelError: not a model, cut off, malformed, with operators that are given types they do
            not take, or its external data is missing or outside its folder. All that is wrong is
            listed, operators without an implementation included.
        UnsupportedOpError: nothing is wrong but operators without an implementation, or with
            attributes that they cannot follow.
        ConfigError: no float tensor has a name in ``parameters``.

    Warns:
        QwrapWarning: weights of several normalisations are one initialiser, and not untied.
        GradientWarning: onnxruntime computes some nodes, and gradients stop there.
    """
    settings = LoadSettings(
        expand=expand,
        dtype=dtype,
        libraries=tuple(os.fspath(library) for library in custom_ops),
        parameters=None if parameters is None else tuple(parameters),
    )
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    pristine = read_model(
        source, partial(missing_operators, has_libraries=bool(custom_ops)), untied=untie
    )
    _check_nodes(pristine, "the model" if path is None else str(path))
    expanded = expand_functions(pristine, partial(_is_expanded, pristine, expand))
    model = WrappedModel(OnnxGraph(expanded, path, pristine), settings)
    _check_patterns(model, parameters or ())
    for category, text in _warnings(model, untied=untie):
        warnings.warn(text, category, stacklevel=2)
    return model


def _check_nodes(model: ir.Model, where: str) -> None:
    """Refuse a model with nodes that no operator can follow, all of them in one error."""
    refused = refused_nodes(model)
    wrong = type_problems(model, refused)
    if wrong or refused:
        texts = [*refused.values(), *missing_operators(without_weights(model))]
        if not wrong:
            raise UnsupportedOpError(f"{where}: {'; '.join(texts)}")
        refuse(where, [*wrong, *texts])


def _is_expanded(model: ir.Model, expand: Expand, node: ir.Node) -> bool:
    """Whether the body in the schema of a node's operator shall replace it."""
    if expand != "auto":
        return expand == "always"
    domain = "" if node.domain in STANDARD else node.domain
    return find(domain, node.op_type, opset_of(model, domain)) is None


def _check_patterns(model: WrappedModel, patterns: Collection[str]) -> None:
    trained = [key for key, slot in model.layout.slots.items() if slot.trainable]
    if idle := [p for p in patterns if not any(fits(key, p) for key in trained)]:
        raise ConfigError(
            f"parameters={idle}: no float tensor of the model has such a name; see "
            "model.tensor_names for the names there are"
        )


def _warnings(model: WrappedModel, *, untied: bool) -> Iterator[tuple[type[QwrapWarning], str]]:
    merged = {} if untied else merged_names(model.graph.pristine)
    if merged:
        listed = ", ".join(f"{name!r} ({count} nodes)" for name, count in merged.items())
        yield (
            QwrapWarning,
            f"{listed}: the exporter seems to have merged equal weights, which are trained as one; "
            "qwrap.load(..., untie=True) gives each node its own",
        )
    if fallbacks := model.layout.values.fallbacks:
        yield (
            GradientWarning,
            f"nodes {fallbacks} are computed by onnxruntime; gradients stop there. Register a "
            "torch function with qwrap.register_op to train through them",
        )
