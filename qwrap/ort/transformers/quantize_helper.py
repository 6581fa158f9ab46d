"""Dynamic quantization of a transformer, as ONNX file or as torch module."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch

from qwrap.ort.entry.dynamic import quantize_dynamic

__all__ = ["QuantizeHelper", "conv1d_to_linear"]

_LOGGER = logging.getLogger(__name__)
_MB = 1024 * 1024


def conv1d_to_linear(model: torch.nn.Module) -> None:
    """Replace each Conv1D of Hugging Face's transformers in ``model``, in place, by a Linear.

    A Conv1D holds the transposed weight of a Linear, which torch's quantization does not know.
    """
    for name, module in list(model.named_children()):
        if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            setattr(model, name, _linear(module))
        else:
            conv1d_to_linear(module)


def _linear(module: torch.nn.Module) -> torch.nn.Linear:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor)
    inputs, outputs = weight.shape
    linear = torch.nn.Linear(inputs, outputs, bias=bias is not None)
    linear.weight.data = weight.data.T.contiguous()
    if isinstance(bias, torch.Tensor):
        linear.bias.data = bias.data
    return linear.train(module.training)


class QuantizeHelper:
    """Weights in 8 bits, activations quantized when the model runs."""

    @staticmethod
    def quantize_torch_model(
        model: torch.nn.Module, dtype: torch.dtype = torch.qint8
    ) -> torch.nn.Module:
        """Return ``model``, which stays as it is, with its Linear and Conv1D layers quantized.

        Args:
            model: float module.
            dtype: of the weights: ``torch.qint8`` or ``torch.float16``.
        """
        own = copy.deepcopy(model)
        conv1d_to_linear(own)
        with warnings.catch_warnings():  # torch announces another package for it
            for kind in (DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", kind)
            quantize: Any = torch.ao.quantization.quantize_dynamic
            quantized: torch.nn.Module = quantize(own, {torch.nn.Linear}, dtype=dtype)
        return quantized

    @staticmethod
    def quantize_onnx_model(
        onnx_model_path: str | Path | onnx.ModelProto,
        quantized_model_path: str | os.PathLike[str],
        use_external_data_format: bool = False,
    ) -> None:
        """Write a dynamically quantized model; its folder is made if it is not there.

        Args:
            onnx_model_path: path or model; neither is modified.
            quantized_model_path: file to make or replace.
            use_external_data_format: keep weights in a file beside it.

        Raises:
            QuantizationError: as ``quantize_dynamic``.
        """
        target = Path(quantized_model_path)
        target.parent.mkdir(parents=True, exist_ok=True)
        quantize_dynamic(
            onnx_model_path,
            target,
            use_external_data_format=use_external_data_format,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        _LOGGER.info("%s: %.1f MB", target, target.stat().st_size / _MB)
