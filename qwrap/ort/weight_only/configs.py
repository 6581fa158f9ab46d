"""How weights are to be quantized: one class for each algorithm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwrap.ort.enums import QuantFormat
from qwrap.ort.errors import UnsupportedError

Types = Sequence[str] | None
Axes = Sequence[tuple[str, int]] | None
CUSTOM_KEYS = ("bits", "group_size", "scheme")


class WeightOnlyQuantConfig:
    """What all algorithms share.

    Attributes:
        algorithm: its name.
        quant_format: operators on codes, or DequantizeLinear before float operators.
        op_types_to_quantize: set of operators, ``{"MatMul"}`` if none are given.
        quant_axes: dict from operator to the axis that blocks lie along.
        customized_weight_config: name of a node -> ``bits``, ``group_size`` and ``scheme``
            ("sym" or "asym") of its own.
    """

    def __init__(
        self,
        algorithm: str,
        quant_format: QuantFormat,
        op_types_to_quantize: Types = None,
        quant_axes: Axes = None,
        customized_weight_config: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Take the settings; None is the default of each."""
        self.algorithm = algorithm
        self.quant_format = quant_format
        self._has_types = bool(op_types_to_quantize)
        self.op_types_to_quantize = set(op_types_to_quantize or ("MatMul",))
        self.quant_axes = dict(quant_axes) if quant_axes else {"MatMul": 0, "Gather": 1}
        self.customized_weight_config = customized_weight_config

    @property
    def chooses_by_type(self) -> bool:
        """Whether operators were given, so that ``nodes_to_include`` adds to their nodes."""
        return self._has_types or self.op_types_to_quantize != {"MatMul"}


class RTNWeightOnlyQuantConfig(WeightOnlyQuantConfig):
    """Round to nearest, in the range of each block or a share of it.

    Attributes:
        ratios: name of a weight -> share of the range that codes span, the rest is clipped.
    """

    def __init__(
        self,
        ratios: Mapping[str, float] | None = None,
        quant_format: QuantFormat = QuantFormat.QOperator,
        op_types_to_quantize: Types = None,
        customized_weight_config: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Take the settings.

        Raises:
            UnsupportedError: the format is not QOperator (an ``AssertionError``).
        """
        _require_operators("RTN", quant_format)
        super().__init__(
            "RTN",
            quant_format,
            op_types_to_quantize,
            customized_weight_config=customized_weight_config,
        )
        self.ratios = dict(ratios or {})


class KQuantWeightOnlyQuantConfig(WeightOnlyQuantConfig):
    """llama.cpp's search for scale and smallest value of a block; zero points always.

    Attributes:
        ratios: kept; the search finds how much to clip.
    """

    def __init__(
        self,
        ratios: Mapping[str, float] | None = None,
        quant_format: QuantFormat = QuantFormat.QOperator,
        op_types_to_quantize: Types = None,
        customized_weight_config: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Take the settings.

        Raises:
            UnsupportedError: the format is not QOperator (an ``AssertionError``).
        """
        _require_operators("k-quant", quant_format)
        super().__init__(
            "k_quant",
            quant_format,
            op_types_to_quantize,
            customized_weight_config=customized_weight_config,
        )
        self.ratios = dict(ratios or {})


class GPTQWeightOnlyQuantConfig(WeightOnlyQuantConfig):
    """Error compensation on data.

    Attributes:
        calibration_data_reader: the data.
        percdamp: what is added to the power of each input, relative to the mean.
        block_size: inputs whose errors are spread over the others at once. The blocks that share a
            scale have the size of ``MatMulNBitsQuantizer``'s.
        actorder: begin with the inputs of most power.
        mse: search the range of each block.
        perchannel: a scale for each output.
    """

    def __init__(
        self,
        calibration_data_reader: Any = None,
        percdamp: float = 0.01,
        block_size: int = 128,
        actorder: bool = False,
        mse: bool = False,
        perchannel: bool = True,
        quant_format: QuantFormat = QuantFormat.QOperator,
        op_types_to_quantize: Types = None,
    ) -> None:
        """Take the settings.

        Raises:
            UnsupportedError: the format is not QOperator (an ``AssertionError``).
        """
        _require_operators("GPTQ", quant_format)
        super().__init__("GPTQ", quant_format, op_types_to_quantize)
        self.calibration_data_reader = calibration_data_reader
        self.percdamp = percdamp
        self.block_size = block_size
        self.actorder = actorder
        self.mse = mse
        self.perchannel = perchannel


class HQQWeightOnlyQuantConfig(WeightOnlyQuantConfig):
    """Half-quadratic quantization: float zero points, without data.

    Attributes:
        block_size: weights that share a scale.
        bits: 2, 4 or 8.
        axis: that blocks lie along: 1, the inputs. MatMulNBits has no other.
    """

    def __init__(
        self,
        block_size: int = 128,
        bits: int = 4,
        axis: int = 1,
        quant_format: QuantFormat = QuantFormat.QOperator,
        op_types_to_quantize: Types = None,
        quant_axes: Axes = None,
    ) -> None:
        """Take the settings.

        Raises:
            UnsupportedError: the format is not QOperator (an ``AssertionError``).
        """
        _require_operators("HQQ", quant_format)
        super().__init__("HQQ", quant_format, op_types_to_quantize, quant_axes)
        self.block_size = block_size
        self.bits = bits
        self.axis = axis


class DefaultWeightOnlyQuantConfig(WeightOnlyQuantConfig):
    """Round to nearest.

    Attributes:
        block_size: weights that share a scale.
        is_symmetric: whether there are no zero points.
        bits: 2, 4 or 8.
        accuracy_level: what MatMulNBits may round its input to, 1 float32 to 4 int8; None or 0
            leaves it to the runtime, which computes in the type of the input.
        channel_wised_quantize: one block for each output; in QDQ form.
    """

    def __init__(
        self,
        block_size: int = 128,
        is_symmetric: bool = False,
        accuracy_level: int | None = None,
        quant_format: QuantFormat = QuantFormat.QOperator,
        op_types_to_quantize: Types = None,
        quant_axes: Axes = None,
        bits: int = 4,
        channel_wised_quantize: bool = False,
    ) -> None:
        """Take the settings.

        Raises:
            NotImplementedError: ``channel_wised_quantize`` with QOperator.
        """
        super().__init__("DEFAULT", quant_format, op_types_to_quantize, quant_axes)
        self.block_size = block_size
        self.is_symmetric = is_symmetric
        self.bits = bits
        self.accuracy_level = accuracy_level
        self.channel_wised_quantize = channel_wised_quantize
        if channel_wised_quantize and quant_format == QuantFormat.QOperator:
            raise NotImplementedError(
                "QuantFormat.QOperator is not supported channel_wised_quantize yet: MatMulNBits "
                "has blocks of a power of 2; use QuantFormat.QDQ"
            )


def _require_operators(algorithm: str, quant_format: QuantFormat) -> None:
    if quant_format != QuantFormat.QOperator:
        raise UnsupportedError(
            f"{algorithm} only supports QOperator format; for pairs use "
            "DefaultWeightOnlyQuantConfig, or qwrap.quantize_weights(form='qdq')"
        )
