"""What to quantize, and how, as values: the configurations of ``quantize``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwrap.ort.calibrate import CalibrationDataReader
from qwrap.ort.enums import CalibrationMethod, QuantFormat, QuantType


class QuantConfig:
    """What static and dynamic quantization share.

    Attributes:
        activation_type: type of activations.
        weight_type: type of weights.
        op_types_to_quantize: operator types; empty for all that are supported.
        nodes_to_quantize: names of nodes; empty for all of these types.
        nodes_to_exclude: names of nodes that stay float.
        per_channel: one scale per output channel of a weight.
        reduce_range: weights in 7 bits, for processors without VNNI.
        use_external_data_format: keep tensors in a file beside the model.
    """

    def __init__(
        self,
        activation_type: QuantType = QuantType.QUInt8,
        weight_type: QuantType = QuantType.QInt8,
        op_types_to_quantize: Sequence[str] | None = None,
        nodes_to_quantize: Sequence[str] | None = None,
        nodes_to_exclude: Sequence[str] | None = None,
        per_channel: bool = False,
        reduce_range: bool = False,
        use_external_data_format: bool = False,
    ) -> None:
        self.op_types_to_quantize = op_types_to_quantize or []
        self.per_channel = per_channel
        self.reduce_range = reduce_range
        self.weight_type = weight_type
        self.activation_type = activation_type
        self.nodes_to_quantize = nodes_to_quantize or []
        self.nodes_to_exclude = nodes_to_exclude or []
        self.use_external_data_format = use_external_data_format


class StaticQuantConfig(QuantConfig):
    """Static quantization: arguments as of ``quantize_static``.

    Attributes:
        calibration_data_reader: where batches come from.
        calibrate_method: how ranges are chosen.
        quant_format: form of the graph.
        calibration_providers: where the float model runs meanwhile; None for the CPU.
        extra_options: see ``qwrap.ort.OPTIONS``.
        calibration_cache_path: file in which ranges are kept from run to run.
    """

    def __init__(
        self,
        calibration_data_reader: CalibrationDataReader | None,
        calibrate_method: CalibrationMethod = CalibrationMethod.MinMax,
        quant_format: QuantFormat = QuantFormat.QDQ,
        activation_type: QuantType = QuantType.QInt8,
        weight_type: QuantType = QuantType.QInt8,
        op_types_to_quantize: Sequence[str] | None = None,
        nodes_to_quantize: Sequence[str] | None = None,
        nodes_to_exclude: Sequence[str] | None = None,
        per_channel: bool = False,
        reduce_range: bool = False,
        use_external_data_format: bool = False,
        calibration_providers: Sequence[str] | None = None,
        extra_options: Mapping[str, Any] | None = None,
        calibration_cache_path: Any = None,
    ) -> None:
        super().__init__(
            activation_type=activation_type,
            weight_type=weight_type,
            op_types_to_quantize=op_types_to_quantize,
            nodes_to_quantize=nodes_to_quantize,
            nodes_to_exclude=nodes_to_exclude,
            per_channel=per_channel,
            reduce_range=reduce_range,
            use_external_data_format=use_external_data_format,
        )
        self.calibration_data_reader = calibration_data_reader
        self.calibrate_method = calibrate_method
        self.quant_format = quant_format
        self.calibration_providers = calibration_providers
        self.extra_options = extra_options or {}
        self.calibration_cache_path = calibration_cache_path


class DynamicQuantConfig(QuantConfig):
    """Dynamic quantization: arguments as of ``quantize_dynamic``."""

    def __init__(
        self,
        weight_type: QuantType = QuantType.QInt8,
        op_types_to_quantize: Sequence[str] | None = None,
        nodes_to_quantize: Sequence[str] | None = None,
        nodes_to_exclude: Sequence[str] | None = None,
        per_channel: bool = False,
        reduce_range: bool = False,
        use_external_data_format: bool = False,
        extra_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            op_types_to_quantize=op_types_to_quantize,
            per_channel=per_channel,
            reduce_range=reduce_range,
            weight_type=weight_type,
            nodes_to_quantize=nodes_to_quantize,
            nodes_to_exclude=nodes_to_exclude,
            use_external_data_format=use_external_data_format,
        )
        self.extra_options = extra_options or {}
