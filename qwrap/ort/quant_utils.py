"""Numerics, names and small look-ups, all under the module name that scripts import them from."""

from qwrap.ort.calibration.divergence import smooth_distribution
from qwrap.ort.calibration.plot import apply_plot
from qwrap.ort.calibration_table import write_calibration_table
from qwrap.ort.enums import QuantFormat, QuantizationMode, QuantizedValueType, QuantType
from qwrap.ort.files.metadata import (
    add_infer_metadata,
    add_pre_process_metadata,
    get_opset_version,
    model_has_infer_metadata,
    model_has_pre_process_metadata,
)
from qwrap.ort.files.model_io import (
    load_model_with_shape_infer,
    model_has_external_data,
    save_and_reload_model_with_shape_infer,
)
from qwrap.ort.files.opset import update_opset_version
from qwrap.ort.files.optimization import optimize_model
from qwrap.ort.graphs.proto_lookups import (
    attribute_to_kwarg,
    find_by_name,
    generate_identified_filename,
    get_elem_index,
    get_mul_node,
)
from qwrap.ort.graphs.tensor_names import (
    DEQUANT_OP_NAME,
    DEQUANT_OUTPUT_SUFFIX,
    MODEL_SIZE_THRESHOLD,
    QUANT_INPUT_SUFFIX,
    QUANT_OP_NAME,
    TENSOR_NAME_QUANT_SUFFIX,
    __producer__,
    __version__,
    add_dequant_input_suffix,
    add_dequant_output_suffix,
    add_dequant_suffix,
    add_quant_input_suffix,
    add_quant_output_suffix,
    add_quant_suffix,
    ms_domain,
    onnx_domain,
)
from qwrap.ort.numbers.blocked import compute_scale_zp_blocked
from qwrap.ort.numbers.code_types import (
    FLOAT8_TYPES,
    ONNX_INT_TYPE_RANGE,
    ONNX_INT_TYPE_REDUCED_RANGE,
    ONNX_INT_TYPE_SYMMETRIC_RANGE,
    ONNX_TYPE_TO_NP_TYPE,
    get_qmin_qmax_for_qType,
    get_qrange_for_qType,
    normalize_axis,
    type_to_name,
)
from qwrap.ort.numbers.codes import pack_bytes_to_4bit, quantize_data, quantize_nparray
from qwrap.ort.numbers.initializers import quantize_onnx_initializer, tensor_proto_to_array
from qwrap.ort.numbers.quantized_values import BiasToQuantize, QuantizedInitializer, QuantizedValue
from qwrap.ort.numbers.scales import (
    compute_data_quant_params,
    compute_scale_zp,
    compute_scale_zp_float8,
    snap_zero_point_to_uint8,
)

__all__ = [
    "DEQUANT_OP_NAME",
    "DEQUANT_OUTPUT_SUFFIX",
    "FLOAT8_TYPES",
    "MODEL_SIZE_THRESHOLD",
    "ONNX_INT_TYPE_RANGE",
    "ONNX_INT_TYPE_REDUCED_RANGE",
    "ONNX_INT_TYPE_SYMMETRIC_RANGE",
    "ONNX_TYPE_TO_NP_TYPE",
    "QUANT_INPUT_SUFFIX",
    "QUANT_OP_NAME",
    "TENSOR_NAME_QUANT_SUFFIX",
    "BiasToQuantize",
    "QuantFormat",
    "QuantType",
    "QuantizationMode",
    "QuantizedInitializer",
    "QuantizedValue",
    "QuantizedValueType",
    "__producer__",
    "__version__",
    "add_dequant_input_suffix",
    "add_dequant_output_suffix",
    "add_dequant_suffix",
    "add_infer_metadata",
    "add_pre_process_metadata",
    "add_quant_input_suffix",
    "add_quant_output_suffix",
    "add_quant_suffix",
    "apply_plot",
    "attribute_to_kwarg",
    "compute_data_quant_params",
    "compute_scale_zp",
    "compute_scale_zp_blocked",
    "compute_scale_zp_float8",
    "find_by_name",
    "generate_identified_filename",
    "get_elem_index",
    "get_mul_node",
    "get_opset_version",
    "get_qmin_qmax_for_qType",
    "get_qrange_for_qType",
    "load_model_with_shape_infer",
    "model_has_external_data",
    "model_has_infer_metadata",
    "model_has_pre_process_metadata",
    "ms_domain",
    "normalize_axis",
    "onnx_domain",
    "optimize_model",
    "pack_bytes_to_4bit",
    "quantize_data",
    "quantize_nparray",
    "quantize_onnx_initializer",
    "save_and_reload_model_with_shape_infer",
    "smooth_distribution",
    "snap_zero_point_to_uint8",
    "tensor_proto_to_array",
    "type_to_name",
    "update_opset_version",
    "write_calibration_table",
]
