"""Names that onnxruntime's modules import from each other, and scripts import from there."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

_HOMES = {
    "base_quantizer": ("BaseQuantizer",),
    "calibrate": (
        *("CalibraterBase", "CalibrationDataReader", "TensorData", "TensorsData"),
        *("create_calibrator", "load_tensors_data", "save_tensors_data"),
    ),
    "onnx_model": ("ONNXModel",),
    "onnx_quantizer": ("ONNXQuantizer",),
    "operators.base_operator": ("QuantOperatorBase",),
    "operators.qdq_base_operator": ("QDQOperatorBase",),
    "qdq_quantizer": ("QDQQuantizer",),
    "numbers.quantization_params": ("QuantizationParams",),
    "registry": ("IntegerOpsRegistry", "QDQRegistry", "QLinearOpsRegistry"),
    "tensor_quant_overrides": ("TensorQuantOverridesHelper",),
    "quant_utils": (
        *("DEQUANT_OP_NAME", "MODEL_SIZE_THRESHOLD", "ONNX_TYPE_TO_NP_TYPE", "QUANT_OP_NAME"),
        *("QuantType", "QuantizationMode", "QuantizedValue", "QuantizedValueType"),
        *("TENSOR_NAME_QUANT_SUFFIX", "add_dequant_output_suffix", "add_dequant_suffix"),
        *("add_infer_metadata", "add_quant_input_suffix", "add_quant_output_suffix"),
        *("add_quant_suffix", "attribute_to_kwarg", "compute_data_quant_params"),
        *("compute_scale_zp", "compute_scale_zp_blocked", "compute_scale_zp_float8"),
        *("find_by_name", "get_mul_node", "get_opset_version", "get_qmin_qmax_for_qType"),
        *("get_qrange_for_qType", "load_model_with_shape_infer", "model_has_pre_process_metadata"),
        *("ms_domain", "pack_bytes_to_4bit", "quantize_data", "quantize_nparray"),
        *("quantize_onnx_initializer", "save_and_reload_model_with_shape_infer"),
        *("snap_zero_point_to_uint8", "tensor_proto_to_array", "update_opset_version"),
    ),
}
HOMES = {name: home for home, names in _HOMES.items() for name in names}
"""Name -> the module, below ``qwrap.ort``, that it is from."""


def lender(module: str) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a module that gives such names when they are asked for.

    So the module need not import them, and what it is for stays visible in ``__all__``.
    """

    def find(name: str) -> Any:
        home = HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(import_module(f"qwrap.ort.{home}"), name)

    return find
