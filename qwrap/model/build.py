"""From a file to a module."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
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
from qwrap.model.layout import wild
from qwrap.model.missing import missing_operators, unfit_nodes
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
    """Load an ONNX model with all its nodes as they stand, those of a quantized file too.

    The arguments are those of ``qwrap.load``, and so is what it returns, raises and warns of.
    """
    settings = load_settings(expand, dtype, custom_ops, parameters)
    with collector_paused():
        model = WrappedModel(read_graph(source, settings, untie=untie), settings)
    check_loaded(model, parameters, untied=untie)
    return model


def load_settings(
    expand: Expand,
    dtype: torch.dtype | None,
    custom_ops: Sequence[str | os.PathLike[str]],
    parameters: Collection[str] | None,
) -> LoadSettings:
    """Return the arguments of ``load`` that the model keeps."""
    return LoadSettings(
        expand=expand,
        dtype=dtype,
        libraries=tuple(os.fspath(library) for library in custom_ops),
        parameters=None if parameters is None else tuple(parameters),
    )


def check_loaded(model: WrappedModel, parameters: Collection[str] | None, *, untied: bool) -> None:
    """Refuse a model that has none of ``parameters``; warn of what may surprise in it."""
    _check_patterns(model, parameters or ())
    for category, text in _warnings(model, untied=untied):
        warnings.warn(text, category, stacklevel=3)


def read_graph(
    source: Source,
    settings: LoadSettings,
    *,
    untie: bool,
    edit: Callable[[ir.Model], ir.Model] | None = None,
    kept: Callable[[ir.Node], bool] | None = None,
) -> OnnxGraph:
    """Return the graph that is to run, checked and with functions expanded.

    Args:
        source: as for ``load``.
        settings: from ``load_settings``.
        untie: as for ``load``.
        edit: returns another model to be taken for what was read; it must not change that.
        kept: which calls of the model's functions stay.
    """
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    also = partial(unfit_nodes, has_libraries=bool(settings.libraries))
    pristine = read_model(source, also, untied=untie)
    pristine = pristine if edit is None else edit(pristine)
    _check_nodes(pristine, "the model" if path is None else str(path))
    wanted = partial(_is_expanded, pristine, settings.expand)
    if kept is None:
        return OnnxGraph(expand_functions(pristine, wanted), path, pristine)
    return OnnxGraph(expand_functions(pristine, wanted, kept), path, pristine)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the garbage collector from walking a graph again and again while it is built.

    Next to nothing of it is garbage, and the walks take half of the time that loading takes.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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
    trained = {key for key, slot in model.layout.slots.items() if slot.trainable}
    fitting = {p for p in wild(patterns) if any(fnmatchcase(key, p) for key in trained)}
    if idle := [p for p in patterns if p not in trained and p not in fitting]:
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
