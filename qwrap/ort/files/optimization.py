"""onnxruntime's own graph optimization, as a step from model to model."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnxruntime

from qwrap.ort.files.model_io import load_message
from qwrap.ort.files.proto_file import LIMIT, weights_size, write_proto

_LOGGER = logging.getLogger(__name__)


def optimize_model(
    model_path: str | os.PathLike[str], opt_model_path: str | os.PathLike[str]
) -> None:
    """Write a model with constants folded and batch normalizations fused, all of it or nothing.

    Names of constant initializers stay (onnxruntime's ConstantSharing is left out).

    Raises:
        MissingFileError: the model is not there.
        InvalidModelError: it is no ONNX model.
    """
    model = optimized(load_message(model_path), disabled=("ConstantSharing",))
    write_proto(model, opt_model_path)


def optimized_if_possible(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return ``model`` optimized, or itself, with a line in the log, where that fails."""
    try:
        return optimized(model)
    except Exception as error:  # onnxruntime's errors have no common class
        _LOGGER.warning(
            "onnxruntime cannot optimize the model, which goes on as it is "
            "(skip_optimization=True leaves this step out): %s",
            error,
        )
        return model


def optimized(model: onnx.ModelProto, disabled: Sequence[str] = ()) -> onnx.ModelProto:
    """Return ``model``, which stays as it is, after onnxruntime's basic optimizations.

    Args:
        model: of any size.
        disabled: names of optimizers to leave out.

    Raises:
        Exception: whatever onnxruntime raises over a model that it cannot run.
    """
    with tempfile.TemporaryDirectory(prefix="qwrap.") as folder:
        target = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = os.fspath(target)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.log_severity_level = 4
        source: str | bytes
        if weights_size(model) > LIMIT:
            source = os.fspath(Path(folder) / "model.onnx")
            write_proto(model, source)
            name = "session.optimized_model_external_initializers_file_name"
            options.add_session_config_entry(name, "optimized.onnx.data")
        else:
            source = model.SerializeToString()
        session = onnxruntime.InferenceSession(
            source,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(disabled),
        )
        del session  # or Windows keeps the folder
        return load_message(target)
