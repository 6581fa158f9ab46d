"""onnxruntime, quiet, with one kind of error."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from qwrap.errors import InputError, ModelError

Array = npt.NDArray[Any]
NO_FUSION = "session.disable_quant_qdq"
FATAL = 4  # onnxruntime's log severity; what goes wrong also arrives as an exception

RUNTIME_ERRORS = (
    state.EPFail,
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NotImplemented,
    state.RuntimeException,
    RuntimeError,
)


class Mode(Enum):
    """How onnxruntime runs a file."""

    LITERAL = "as written"
    """Every node as it stands: no graph optimisation at all, so that nothing is fused, reordered
    or replaced, and QuantizeLinear and DequantizeLinear run on their own. What the file means."""

    OPTIMISED = "all optimisations"
    """As users run it: QDQ groups become integer kernels."""


class Session:
    """A model in onnxruntime on CPU.

    Attributes:
        label: names the model in errors.
        unfused: whether it opened only without integer kernels, in a mode that has them.
    """

    def __init__(
        self, model: str | os.PathLike[str] | bytes, mode: Mode, folder: Path, label: str
    ) -> None:
        """Open ``model``: a path, or a serialised model whose external data lies in ``folder``.

        The optimiser of onnxruntime makes integer kernels for types that these do not take, such
        as uint4 and float8. Such a model is opened without them.

        Raises:
            ModelError: onnxruntime refuses it.
        """
        self.label, self.unfused = label, False
        source = model if isinstance(model, bytes) else os.fspath(model)
        try:
            self._session = _open(source, _options(mode, folder, isinstance(source, bytes)))
        except RUNTIME_ERRORS as error:
            if not self._open_unfused(source, mode, folder):
                raise ModelError(f"{label}: onnxruntime refuses the model: {error}") from error

    def _open_unfused(self, source: str | bytes, mode: Mode, folder: Path) -> bool:
        if mode is Mode.LITERAL:
            return False
        options = _options(mode, folder, isinstance(source, bytes))
        options.add_session_config_entry(NO_FUSION, "1")
        try:
            self._session = _open(source, options)
        except RUNTIME_ERRORS:
            return False
        self.unfused = True
        return True

    def run(self, names: Sequence[str], feed: Mapping[str, Array]) -> dict[str, Array]:
        """Return outputs ``names`` by name.

        Raises:
            InputError: onnxruntime cannot run the model on these inputs.
        """
        try:
            arrays = self._session.run(list(names), dict(feed))
        except RUNTIME_ERRORS as error:
            shapes = {name: list(np.shape(array)) for name, array in feed.items()}
            raise InputError(
                f"{self.label}: onnxruntime fails on inputs of shape {shapes}: {error}"
            ) from error
        return dict(zip(names, arrays, strict=True))


def _options(mode: Mode, folder: Path, in_memory: bool) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    # Threads that spin while they wait would slow down torch, which runs in turn with this.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if mode is Mode.LITERAL:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry(NO_FUSION, "1")
    if in_memory:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder)
        )
    return options


def _open(source: str | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
