"""What is done to a float model before it is quantized: optimize it, and declare its shapes."""

from __future__ import annotations

import logging
import os
from typing import Any

import onnx

from qwrap.ort.borrowed import lender
from qwrap.ort.errors import InvalidModelError, QuantizationError
from qwrap.ort.files.metadata import add_pre_process_metadata, get_opset_version
from qwrap.ort.files.model_io import ModelSource, declare_types, load_message
from qwrap.ort.files.opset import raise_opset
from qwrap.ort.files.optimization import optimized_if_possible
from qwrap.ort.files.proto_file import THRESHOLD, write_proto
from qwrap.ort.files.symbolic import declare_symbolic

__all__ = ["quant_pre_process"]

__getattr__ = lender(__name__)

_LOGGER = logging.getLogger(__name__)
_LOWEST_OPSET = 11


def quant_pre_process(
    input_model: ModelSource | None = None,
    output_model_path: str | os.PathLike[str] | None = None,
    skip_optimization: bool = False,
    skip_onnx_shape: bool = False,
    skip_symbolic_shape: bool = False,
    auto_merge: bool = False,
    int_max: int = 2**31 - 1,
    guess_output_rank: bool = False,
    verbose: int = 0,
    save_as_external_data: bool = False,
    all_tensors_to_one_file: bool = False,
    external_data_location: str | None = None,
    external_data_size_threshold: int = THRESHOLD,
    **deprecated_kwargs: Any,
) -> onnx.ModelProto | None:
    """Optimize a float model and declare the shapes of its values, in preparation of quantization.

    A step that cannot be done is left out with a line in the log; the model goes on. Nothing is
    written but the output. Opsets before 11 become 11 first.

    Args:
        input_model: path or model; neither is modified.
        output_model_path: file to make or replace; None to get the model itself.
        skip_optimization: leave out onnxruntime's basic optimizations.
        skip_onnx_shape: leave out ONNX shape inference.
        skip_symbolic_shape: leave out symbolic shape inference, which needs sympy.
        auto_merge: symbolic: take two symbols for one where they contradict each other.
        int_max: symbolic: from here on an integer counts as unbounded.
        guess_output_rank: symbolic: give an unknown operator the rank of its first input.
        verbose: symbolic: 0 logs nothing, 1 warnings, 3 details.
        save_as_external_data: write weights to files beside the output; from 2 GB on it is done
            without asking.
        all_tensors_to_one_file: all to one file instead of one for each tensor.
        external_data_location: name of that file; ``<output name>.data``.
        external_data_size_threshold: bytes from which on a tensor is written there.
        **deprecated_kwargs: ``input_model_path``, the older name of ``input_model``.

    Returns:
        The model where ``output_model_path`` is None, else None.

    Raises:
        QuantizationError: no model is given, or an argument is unknown.
        MissingFileError: the model is not there.
        InvalidModelError: it is no ONNX model, or a ModelProto without the data of its weights.
    """
    source = _only_input(input_model, deprecated_kwargs)
    model = _at_least_opset_11(load_message(source))
    if not skip_symbolic_shape:
        declare_symbolic(
            model,
            int_max=int_max,
            auto_merge=auto_merge,
            guess_output_rank=guess_output_rank,
            verbose=verbose,
        )
    if not skip_optimization:
        model = optimized_if_possible(model)
    if not skip_onnx_shape:
        declare_types(model)
    add_pre_process_metadata(model)
    if output_model_path is None:
        return model
    write_proto(
        model,
        output_model_path,
        external=save_as_external_data or None,
        location=external_data_location,
        threshold=external_data_size_threshold,
        one_file=all_tensors_to_one_file or not save_as_external_data,
        attributes=False,
    )
    return None


def _only_input(model: ModelSource | None, others: dict[str, Any]) -> ModelSource:
    others = dict(others)
    older: ModelSource | None = others.pop("input_model_path", None)
    if others:
        raise QuantizationError(f"quant_pre_process() has no argument {sorted(others)}")
    chosen = older if model is None else model
    if chosen is None:
        raise QuantizationError("quant_pre_process() needs input_model, a path or a ModelProto")
    return chosen


def _at_least_opset_11(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        if get_opset_version(model) < _LOWEST_OPSET:
            return raise_opset(model, _LOWEST_OPSET)
    except (InvalidModelError, QuantizationError) as error:
        _LOGGER.warning("the opset stays as it is: %s", error)
    return model
