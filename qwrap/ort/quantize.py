"""Entry points, by the module name of onnxruntime's tool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onnx import ModelProto

from qwrap.ort.borrowed import lender
from qwrap.ort.entry.arguments import check_static_quant_arguments
from qwrap.ort.entry.configs import DynamicQuantConfig, QuantConfig, StaticQuantConfig
from qwrap.ort.entry.dynamic import quantize_dynamic
from qwrap.ort.entry.qat import quantize_qat
from qwrap.ort.entry.qdq_config import get_qdq_config
from qwrap.ort.entry.static import quantize_static
from qwrap.ort.enums import CalibrationMethod, QuantFormat, QuantizationMode, QuantType
from qwrap.ort.report import Report

if TYPE_CHECKING:
    from qwrap.ort.matmul_nbits_quantizer import WeightOnlyQuantConfig

__all__ = [
    "CalibrationMethod",
    "DynamicQuantConfig",
    "QuantConfig",
    "QuantFormat",
    "QuantType",
    "QuantizationMode",
    "StaticQuantConfig",
    "check_static_quant_arguments",
    "get_qdq_config",
    "quantize",
    "quantize_dynamic",
    "quantize_qat",
    "quantize_static",
]

__getattr__ = lender(__name__)


def quantize(
    model_input: str | Path | ModelProto,
    model_output: str | Path | None,
    quant_config: QuantConfig | WeightOnlyQuantConfig,
    report: Report | None = None,
) -> ModelProto | None:
    """Quantize as a configuration says: static, dynamic or weight-only.

    Args:
        model_input: path or model; neither is modified.
        model_output: file to make or replace; None to get the model itself.
        quant_config: one of ``StaticQuantConfig``, ``DynamicQuantConfig`` and the configurations
            of ``matmul_nbits_quantizer``, whose files always have external data.
        report: filled with what became of each node.

    Returns:
        The quantized model where ``model_output`` is None, else None.

    Raises:
        TypeError: ``quant_config`` is none of these.
    """
    if isinstance(quant_config, StaticQuantConfig):
        return quantize_static(model_input, model_output, **vars(quant_config), report=report)
    if isinstance(quant_config, DynamicQuantConfig):
        settings = {k: v for k, v in vars(quant_config).items() if k != "activation_type"}
        return quantize_dynamic(model_input, model_output, **settings, report=report)
    return _quantize_weights(model_input, model_output, quant_config, report)


def _quantize_weights(
    model_input: str | Path | ModelProto,
    model_output: str | Path | None,
    config: object,
    report: Report | None,
) -> ModelProto | None:
    from qwrap.ort.matmul_nbits_quantizer import MatMulNBitsQuantizer, WeightOnlyQuantConfig

    if not isinstance(config, WeightOnlyQuantConfig):
        raise TypeError(
            "Invalid quantization config type, it must be StaticQuantConfig, DynamicQuantConfig "
            f"or WeightOnlyQuantConfig, not {type(config).__name__}"
        )
    source = model_input if isinstance(model_input, ModelProto) else str(model_input)
    quantizer = MatMulNBitsQuantizer(source, algo_config=config)
    quantizer.process()
    if report is not None:
        report.nodes.extend(quantizer.report.nodes)
    model: ModelProto = quantizer.model.model
    if model_output is None:
        return model
    quantizer.model.save_model_to_file(str(model_output), True)
    return None
