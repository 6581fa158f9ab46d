"""From a file, quantized or not, to a module."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from functools import partial
from typing import Literal, get_args

import torch

from qwrap.config import QConfig
from qwrap.errors import ConfigError
from qwrap.graph.load import Source
from qwrap.importing.calls import is_call
from qwrap.importing.importer import import_quantized
from qwrap.importing.lift import lift as lift_operators
from qwrap.importing.reading import UnreadableError
from qwrap.model.build import check_loaded, collector_paused, load_settings, read_graph
from qwrap.model.settings import Expand
from qwrap.model.wrapped import WrappedModel

Quantized = Literal["taps", "nodes"]


def load(
    source: Source,
    *,
    expand: Expand = "auto",
    dtype: torch.dtype | None = None,
    custom_ops: Sequence[str | os.PathLike[str]] = (),
    parameters: Collection[str] | None = None,
    untie: bool = False,
    quantized: Quantized = "taps",
    lift: bool = False,
    config: QConfig | None = None,
) -> WrappedModel:
    """Load an ONNX model as a trainable ``torch.nn.Module`` that computes what onnxruntime does.

    It computes what the model's own opset says; ``train()`` and ``eval()`` do not change that.

    A model with pairs of QuantizeLinear and DequantizeLinear, made by whatever tool, comes as one
    that is prepared and calibrated: the pairs are stubs with the scales of the file, weights are
    floats, and ``model.plan`` says what was found. It can be trained as it is; ``export`` then
    writes the file that it came from, with what training changed in scales, zero points, codes and
    floats, and all else equal byte for byte. ``prepare`` starts afresh from its float weights.

    Args:
        source: a path, an ``onnx.ModelProto`` or an ``onnx_ir.Model``; it is not modified. External
            data is mapped, and read when used; a ``ModelProto`` has to hold its data itself, and is
            copied unless it is ``qwrap.graph.Borrowed``.
        expand: which operators with a function body in their schema run as that body: those
            without an implementation of their own, none, or all. Functions of the model itself
            are always expanded.
        dtype: float16, bfloat16, float32 or float64: compute in this type what is float32 in the
            graph: parameters, constants, inputs, what Cast makes. The graph itself stays what it
            is, and ``export`` writes its types. None: as the graph says.
        custom_ops: shared libraries with operators for onnxruntime, as its
            ``SessionOptions.register_custom_ops_library`` takes them. Loading one runs its code.
        parameters: names of the initialisers that are to be trained, or patterns of them
            (``"encoder.*"``, see ``fnmatch``); all others become buffers. By default every float
            tensor of rank 1 or more is a parameter, but running statistics, constants in functions
            and single numbers that scale; see ``Layout``.
        untie: give each node its own copy of the float initialisers that several nodes share; the
            copies are called ``<initialiser>_<node>``, in what is exported too.
        quantized: "taps" makes stubs of the pairs of a quantized file; "nodes" computes them as
            they stand, without gradients for scales and codes.
        lift: make operators on codes, as in onnxruntime's QOperator format, operators on reals
            between pairs first, see ``qwrap.importing.lift``. What is exported is QDQ then.
        config: how an imported model is trained, and calibrated again: ``training``, ``method``
            and the like, and what ``set`` says of its tensors. Types and places are those of the
            file.

    Returns:
        A module in float on the CPU, called with graph inputs in order or by name, see
        ``WrappedModel.forward``. What no torch function computes runs in an onnxruntime session of
        its own, if that has a kernel; a ``GradientWarning`` says so.

    Raises:
        ModelError: not a model, cut off, malformed, with operators that are given types they do
            not take, or its external data is missing or outside its folder. All that is wrong is
            listed, operators without an implementation included.
        UnsupportedOpError: nothing is wrong but operators or values of their attributes without an
            implementation; all of them are listed.
        ConfigError: no float tensor has a name in ``parameters``, a selector of ``config`` fits
            nothing, ``expand``, ``dtype`` or ``quantized`` is none of the above, or there is a
            ``dtype`` for a file with pairs.

    Warns:
        QwrapWarning: weights of several normalisations are one initialiser, and not untied.
        GradientWarning: onnxruntime computes some nodes, and gradients stop there.

    Source: ONNX IR and operator specifications; where onnxruntime differs, onnxruntime.
    """
    if quantized not in get_args(Quantized):
        raise ConfigError(f"quantized={quantized!r}: choose one of {get_args(Quantized)}")
    settings = load_settings(expand, dtype, custom_ops, parameters)
    with collector_paused():
        notes: list[str] = []
        edit = partial(lift_operators, notes=notes) if lift else None
        read = partial(read_graph, source, settings, untie=untie, edit=edit)
        graph = read(kept=is_call if quantized == "taps" else None)
        model = None
        if quantized == "taps":
            try:
                model = import_quantized(graph, settings, config, notes)
            except UnreadableError as error:
                notes[:] = [f"functions are computed as they stand: {error}"]
                graph = read()
                model = import_quantized(graph, settings, config, notes)
        if model is None:
            model = WrappedModel(graph, settings)
    check_loaded(model, parameters, untied=untie)
    return model
