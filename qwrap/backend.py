"""qwrap in the form of ``onnx.backend.base.Backend``: what ONNX's own test suite drives.

Arrays in, arrays out: ml_dtypes arrays for the types numpy lacks, lists for sequences, None for an
empty optional, object arrays of text for strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import torch
from onnx.backend.base import Backend, BackendRep, Device, DeviceType

import qwrap
from qwrap.model.tensors import to_array, to_value


class QwrapBackendRep(BackendRep):
    """A loaded model that takes and gives arrays."""

    def __init__(self, model: qwrap.WrappedModel, device: torch.device) -> None:
        self.model = model.to(device).eval()
        self._device = device

    @torch.no_grad()
    def run(self, inputs: Sequence[Any], **_: Any) -> tuple[Any, ...]:
        """Compute the graph outputs.

        Args:
            inputs: one array, list or None for each graph input, in order.

        Returns:
            One array, list or None for each graph output, in order.
        """
        graph = self.model.graph
        values = [
            to_value(value, graph.type_of(declared), self._device)
            for value, declared in zip(inputs, graph.inputs, strict=False)
        ]
        results = self.model(*values)
        if len(graph.outputs) == 1:
            results = (results,)
        return tuple(
            to_array(result, graph.type_of(declared))
            for result, declared in zip(results, graph.outputs, strict=True)
        )


class QwrapBackend(Backend):
    """Loads models with ``qwrap.load``."""

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **_: Any) -> QwrapBackendRep:
        """Load ``model`` for ``device``.

        Args:
            model: the model.
            device: ``"CPU"``, ``"CUDA"`` or ``"CUDA:<index>"``.

        Raises:
            ModelError: see ``qwrap.load``.
            UnsupportedOpError: see ``qwrap.load``.
        """
        return QwrapBackendRep(qwrap.load(model), _torch_device(device))

    @classmethod
    def run_model(
        cls, model: onnx.ModelProto, inputs: Any, device: str = "CPU", **kwargs: Any
    ) -> tuple[Any, ...]:
        """Load and run ``model`` once."""
        return cls.prepare(model, device).run(inputs, **kwargs)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether tensors can be on ``device`` here."""
        kind = Device(device).type
        return bool(kind == DeviceType.CPU or torch.cuda.is_available())


def _torch_device(device: str) -> torch.device:
    parsed = Device(device)
    if parsed.type == DeviceType.CPU:
        return torch.device("cpu")
    return torch.device("cuda", parsed.device_id)


prepare = QwrapBackend.prepare
run_model = QwrapBackend.run_model
supports_device = QwrapBackend.supports_device
