"""onnxruntime.quantization's names, for scripts that change one import.

``from qwrap.ort import quantize_static, CalibrationDataReader, QuantType``: same arguments,
defaults, files and graph forms, submodules by the same names. Where onnxruntime's tool is wrong
this one is right; ``tutorials/from_onnxruntime.md`` lists what differs.
"""

from qwrap.ort.calibrate import (
    CalibraterBase,
    CalibrationDataReader,
    CalibrationMethod,
    DistributionCalibrater,
    EntropyCalibrater,
    HistogramCalibrater,
    HistogramCollector,
    MinMaxCalibrater,
    PercentileCalibrater,
    TensorData,
    TensorsData,
    create_calibrator,
    load_tensors_data,
    save_tensors_data,
)
from qwrap.ort.calibration_table import write_calibration_table
from qwrap.ort.cuda_quantizer import CudaQuantizer
from qwrap.ort.entry.options import OPTIONS
from qwrap.ort.onnx_quantizer import ONNXQuantizer
from qwrap.ort.qdq_quantizer import QDQQuantizer
from qwrap.ort.quant_utils import QuantFormat, QuantType
from qwrap.ort.quantize import (
    DynamicQuantConfig,
    QuantConfig,
    QuantizationMode,
    StaticQuantConfig,
    get_qdq_config,
    quantize,
    quantize_dynamic,
    quantize_qat,
    quantize_static,
)
from qwrap.ort.report import NodeReport, Report
from qwrap.ort.shape_inference import quant_pre_process
from qwrap.ort.tensor_quant_overrides import TensorQuantOverridesHelper

__all__ = [
    "OPTIONS",
    "CalibraterBase",
    "CalibrationDataReader",
    "CalibrationMethod",
    "CudaQuantizer",
    "DistributionCalibrater",
    "DynamicQuantConfig",
    "EntropyCalibrater",
    "HistogramCalibrater",
    "HistogramCollector",
    "MinMaxCalibrater",
    "NodeReport",
    "ONNXQuantizer",
    "PercentileCalibrater",
    "QDQQuantizer",
    "QuantConfig",
    "QuantFormat",
    "QuantType",
    "QuantizationMode",
    "Report",
    "StaticQuantConfig",
    "TensorData",
    "TensorQuantOverridesHelper",
    "TensorsData",
    "create_calibrator",
    "get_qdq_config",
    "load_tensors_data",
    "quant_pre_process",
    "quantize",
    "quantize_dynamic",
    "quantize_qat",
    "quantize_static",
    "save_tensors_data",
    "write_calibration_table",
]
