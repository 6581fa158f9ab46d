"""qwrap in the form of ``onnx.backend.base.Backend``: what ONNX's own test suite drives.

Arrays in, arrays out: ml_dtypes arrays for the types numpy lacks, lists for sequences, None for an
empty optional, object arrays of text for strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.backend.base import Backend, BackendRep, Device, DeviceType

import qwrap
from qwrap.errors import InputError, UnsupportedOpError
from qwrap.graph.index import walk_nodes
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

        Raises:
            InputError: the graph has more inputs, or fewer.
            UnsupportedOpError: with these inputs, onnxruntime and ONNX do not agree.
        """
        graph, names = self.model.graph, self.model.input_names
        if len(inputs) != len(names):
            raise InputError(f"got {len(inputs)} inputs; the graph has {len(names)}: {names}")
        _refuse_differences(self.model, dict(zip(names, inputs, strict=True)))
        values = [
            to_value(value, graph.type_of(declared), self._device)
            for value, declared in zip(inputs, graph.inputs, strict=True)
        ]
        results = self.model(*values)
        if len(graph.outputs) == 1:
            results = (results,)
        return tuple(
            to_array(result, graph.type_of(declared))
            for result, declared in zip(results, graph.outputs, strict=True)
        )


class QwrapBackend(Backend):
    """Loads models with ``qwrap.load``.

    Source: onnx, ``onnx.backend.base``; its suite is ``onnx.backend.test.BackendTest``.
    """

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **_: Any) -> QwrapBackendRep:
        """Load ``model`` for ``device``.

        Args:
            model: the model.
            device: ``"CPU"``, ``"CUDA"`` or ``"CUDA:<index>"``.

        Raises:
            ModelError: see ``qwrap.load``.
            UnsupportedOpError: see ``qwrap.load``; also for what onnxruntime, and with it
                ``qwrap.load``, computes in another way than ONNX says.
        """
        loaded = qwrap.load(model, quantized="nodes")
        _refuse_differences(loaded, {})
        return QwrapBackendRep(loaded, _torch_device(device))

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


# --- where onnxruntime does not do what ONNX says ------------------------------------------------

DIFFERENCES = {
    "MaxUnpool": "onnxruntime counts indices in output_shape, ONNX in the shape without it",
    "Resize": "onnxruntime aligns corners by the whole length that a fractional one is cut to",
}
"""Where ``qwrap.load`` follows onnxruntime; a backend has to follow ONNX, and refuses."""


def _refuse_differences(model: qwrap.WrappedModel, inputs: dict[str, Any]) -> None:
    """Raise if a node means one thing to ONNX and another to onnxruntime, given ``inputs``."""
    differences = [
        f"node {model.graph.node_key(node)!r} ({node.op_type}): {DIFFERENCES[node.op_type]}"
        for node in walk_nodes(model.graph.model.graph)
        if (node.op_type == "MaxUnpool" and len(node.inputs) > 2 and node.inputs[2] is not None)
        or (node.op_type == "Resize" and _cuts_a_length(node, model, inputs))
    ]
    if differences:
        raise UnsupportedOpError("; ".join(differences))


def _cuts_a_length(node: ir.Node, model: qwrap.WrappedModel, inputs: dict[str, Any]) -> bool:
    """Whether a Resize that aligns corners is known to scale to a length that is not whole."""
    mode = node.attributes.get("coordinate_transformation_mode")
    x, scales = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    if mode is None or mode.as_string() != "align_corners" or x is None or scales is None:
        return False
    factors = inputs.get(scales.name or "", model.layout.values.small_constant(scales))
    sizes = model.graph.type_of(x).shape or ()
    if factors is None or len(factors) != len(sizes):  # not known; or only some axes
        return False
    known = [isinstance(n, int) for n in sizes]
    lengths = np.asarray(factors, np.float64)[known] * [n for n in sizes if isinstance(n, int)]
    return bool((lengths != np.floor(lengths)).any())


prepare = QwrapBackend.prepare
run_model = QwrapBackend.run_model
supports_device = QwrapBackend.supports_device
