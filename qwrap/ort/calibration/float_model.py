"""The float model that calibration runs."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto, ValueInfoProto
from torch import Tensor

import qwrap
from qwrap.errors import InputError, QwrapWarning
from qwrap.graph import borrowed_model
from qwrap.ort.errors import QuantizationError, UnknownNameError

_LOG = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"
_ON_CUDA = (
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
    "NvTensorRTRTXExecutionProvider",
    "ROCMExecutionProvider",
    "MIGraphXExecutionProvider",
)
_ELSEWHERE = (
    *("ACLExecutionProvider", "AzureExecutionProvider", "CANNExecutionProvider"),
    *("CoreMLExecutionProvider", "DmlExecutionProvider", "DnnlExecutionProvider"),
    *("JsExecutionProvider", "NnapiExecutionProvider", "OpenVINOExecutionProvider"),
    *("QNNExecutionProvider", "RknpuExecutionProvider", "VSINPUExecutionProvider"),
    *("VitisAIExecutionProvider", "WebGpuExecutionProvider", "WebNNExecutionProvider"),
    "XnnpackExecutionProvider",
)


@dataclass(frozen=True, slots=True)
class NodeArg:
    """An input or output, as onnxruntime's sessions tell of them.

    Attributes:
        name: of the tensor.
        shape: sizes, names of sizes, or None; empty where the file does not say.
        type: such as ``tensor(float)``.
    """

    name: str
    shape: list[int | str | None]
    type: str

    @classmethod
    def of(cls, value: ValueInfoProto) -> NodeArg:
        """Return what a model declares."""
        if not value.type.HasField("tensor_type"):
            return cls(
                value.name, [], (value.type.WhichOneof("value") or "").replace("_type", "()")
            )
        tensor = value.type.tensor_type
        kind = TensorProto.DataType.Name(tensor.elem_type).lower()
        sizes = (d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim)
        return cls(value.name, [size or None for size in sizes], f"tensor({kind})")


class FloatModel:
    """A model that runs in torch, each node as it stands, and shows tensors by name.

    It has the methods of an onnxruntime session that scripts call on a calibrator's.
    """

    def __init__(
        self,
        model: ModelProto,
        providers: Sequence[Any] | None = None,
        custom_ops: Sequence[str | os.PathLike[str]] = (),
        folder: Path | None = None,
    ) -> None:
        """Load a model.

        Args:
            model: not modified, and must not be as long as this is used.
            providers: onnxruntime's names, see ``device_of``.
            custom_ops: shared libraries with operators for onnxruntime; loading one runs its code.
            folder: of the files with its external data, which are mapped. None: it has none.

        Raises:
            UnknownNameError: a provider does not exist.
            ModelError: it is not a model, or holds what cannot run.
        """
        self._device, self._providers = device_of(providers or [CPU])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QwrapWarning)  # they are about training
            loaded = qwrap.load(
                borrowed_model(model, folder), quantized="nodes", custom_ops=custom_ops
            )
        self._model = loaded.to(self._device).eval()
        constants = {tensor.name for tensor in model.graph.initializer}
        self._inputs = [NodeArg.of(v) for v in model.graph.input if v.name not in constants]
        self._outputs = [NodeArg.of(v) for v in model.graph.output]
        self._keys: dict[str, list[str]] = {}
        for key, value in loaded.graph.values.items():
            self._keys.setdefault(value.name or "", []).append(key)

    def get_inputs(self) -> list[NodeArg]:
        """Return what the graph inputs are."""
        return list(self._inputs)

    def get_outputs(self) -> list[NodeArg]:
        """Return what the graph outputs are."""
        return list(self._outputs)

    def get_providers(self) -> list[str]:
        """Return onnxruntime's name of what it runs on."""
        return list(self._providers)

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> list[Any]:
        """Return outputs, all if None, for inputs by name."""
        result = next(self.observe([input_feed], {}))
        results = result if isinstance(result, tuple) else (result,)
        found = dict(zip([output.name for output in self._outputs], results, strict=True))
        return [_to_numpy(found[name]) for name in output_names or found]

    def observe(
        self,
        batches: Iterable[Mapping[str, Any]],
        watchers: Mapping[str, Callable[[Tensor], object]],
    ) -> Iterator[Any]:
        """Run batches one by one and yield what they return.

        Args:
            batches: arrays by the name of the graph input.
            watchers: name of a tensor -> called with its values when they have been computed.
                Tensors of several bodies may have one name.

        Raises:
            QuantizationError: a batch does not fit the graph inputs (a ``ValueError``).
        """
        by_key = {
            key: watch for name, watch in watchers.items() for key in self._keys.get(name, ())
        }
        try:
            yield from qwrap.observe(self._model, batches, by_key, finite=False)
        except InputError as error:
            raise QuantizationError(f"calibration data: {error}") from error


def device_of(providers: Sequence[Any]) -> tuple[torch.device, list[str]]:
    """Return where torch is to run, and onnxruntime's name of that.

    The first provider that torch has a device for counts, and the CPU where none has.

    Args:
        providers: names, or pairs of a name with options, which are not looked at.

    Raises:
        UnknownNameError: onnxruntime knows no such provider (a ``ValueError``).
        QuantizationError: an item is neither a name nor a pair.
    """
    if isinstance(providers, str):
        providers = [providers]
    names = [_name(provider) for provider in providers]
    known = (CPU, *_ON_CUDA, *_ELSEWHERE)
    for name in names:
        if name not in known:
            raise UnknownNameError("execution provider", name, known)
    for name in names:
        if name == CPU:
            break
        if name in _ON_CUDA and torch.cuda.is_available():
            return torch.device("cuda"), [name, CPU]
        _LOG.warning("%s: torch has no device for it here; the next provider is tried", name)
    return torch.device("cpu"), [CPU]


def _name(provider: Any) -> str:
    name = provider[0] if isinstance(provider, tuple | list) and provider else provider
    if not isinstance(name, str):
        raise QuantizationError(
            f"'providers' values must be either strings or (string, dict) tuples, not {provider!r}"
        )
    return name


def _to_numpy(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_numpy(item) for item in value]
    return np.asarray(value.cpu()) if isinstance(value, Tensor) else value
