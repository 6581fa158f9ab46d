"""The ``extra_options``: what each may hold, and where it has an effect."""

from __future__ import annotations

import difflib
import logging
import numbers
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from onnx import TensorProto

from qwrap.ort.enums import CalibrationMethod
from qwrap.ort.errors import QuantizationError

Form = Literal["QDQ", "QOperator", "dynamic"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Option:
    """One key of ``extra_options``.

    Attributes:
        default: what holds where the key is missing.
        expects: what a value must be, in words.
        accepts: whether a value is that.
        forms: the forms of quantized graphs in which it has an effect.
        methods: the calibration methods with which it has one; empty for all.
    """

    default: Any
    expects: str
    accepts: Callable[[Any], bool]
    forms: tuple[Form, ...] = ("QDQ", "QOperator")
    methods: tuple[CalibrationMethod, ...] = ()


def check_options(
    options: Mapping[str, Any], form: Form, method: CalibrationMethod | None = None
) -> None:
    """Refuse keys that do not exist and values that cannot be; log what has no effect.

    Raises:
        QuantizationError: with the nearest key, or what the value must be.
    """
    for key, value in options.items():
        option = OPTIONS.get(key)
        if option is None:
            near = difflib.get_close_matches(str(key), OPTIONS, n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(OPTIONS)}"
            raise QuantizationError(f"extra_options has no key '{key}'{hint}")
        if not option.accepts(value):
            raise QuantizationError(
                f"extra_options['{key}'] must be {option.expects}, not {value!r}"
            )
        if value == option.default:
            continue
        if form not in option.forms:
            where = " and ".join(option.forms)
            logger.warning("extra_options['%s'] has no effect but in form %s", key, where)
        elif method is not None and option.methods and method not in option.methods:
            names = ", ".join(m.name for m in option.methods)
            logger.warning("extra_options['%s'] has no effect but with method %s", key, names)
    _check_together(options, form)


def _check_together(options: Mapping[str, Any], form: Form) -> None:
    if options.get("SmoothQuant") and form == "dynamic":
        raise QuantizationError(
            "extra_options['SmoothQuant'] needs calibration: use quantize_static"
        )
    constant = options.get("CalibMovingAverageConstant", 0.0)
    if not 0 <= constant <= 1:
        raise QuantizationError(
            "Invalid averaging constant, which should not be < 0 or > 1: "
            f"extra_options['CalibMovingAverageConstant'] is {constant}"
        )


def calibration_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of ``extra_options`` a calibrator takes, by the calibrator's own names."""
    return {key: options[name] for name, key in CALIBRATION_KEYS.items() if name in options}


CALIBRATION_KEYS = {
    "CalibTensorRangeSymmetric": "symmetric",
    "CalibMovingAverage": "moving_average",
    "CalibMovingAverageConstant": "averaging_constant",
    "CalibMaxIntermediateOutputs": "max_intermediate_outputs",
    "CalibPercentile": "percentile",
    "CalibNumBins": "num_bins",
    "CalibNumQuantizedBins": "num_quantized_bins",
    "CalibScenario": "scenario",
}
"""Keys of ``extra_options``, and what calibrators call them."""


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not _is_bool(value)


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, numbers.Integral) and not _is_bool(value) and int(value) >= least


def _is_flag(value: Any) -> bool:
    return _is_bool(value) or (_is_count(value, 0) and int(value) <= 1)  # as command lines give it


def _is_within(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: _is_real(value) and low <= float(value) <= high


def _or_none(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or accepts(value)


def _is_names(value: Any) -> bool:
    return (
        isinstance(value, Collection)
        and not isinstance(value, str)
        and all(isinstance(name, str) for name in value)
    )


def _is_axes(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and _is_count(axis, -64) for name, axis in value.items()
    )


def _flag(default: bool | None, *forms: Form) -> Option:
    accepts = _or_none(_is_flag) if default is None else _is_flag
    expects = "True, False or None" if default is None else "True or False"
    return Option(default, expects, accepts, forms or ("QDQ", "QOperator"))


_MIN_MAX = (CalibrationMethod.MinMax,)
_HISTOGRAMS = (
    CalibrationMethod.Entropy,
    CalibrationMethod.Percentile,
    CalibrationMethod.Distribution,
)
_COUNT_OR_NONE = ("a whole number above 0, or None", _or_none(_is_count))

OPTIONS: dict[str, Option] = {
    "ActivationSymmetric": _flag(False),
    "ActivationRestrictedAsymmetric": _flag(False),
    "WeightSymmetric": _flag(None, "QDQ", "QOperator", "dynamic"),
    "EnableSubgraph": _flag(False, "QDQ", "QOperator", "dynamic"),
    "ForceQuantizeNoInputCheck": _flag(False, "QDQ", "QOperator", "dynamic"),
    "MatMulConstBOnly": _flag(False, "QDQ", "QOperator", "dynamic"),
    "DefaultTensorType": Option(
        None,
        "a TensorProto.DataType, or None",
        _or_none(lambda value: value in TensorProto.DataType.values()),
        ("QDQ", "QOperator", "dynamic"),
    ),
    "AddQDQPairToWeight": _flag(False, "QDQ"),
    "OpTypesToExcludeOutputQuantization": Option(
        [], "a list of operator types", _is_names, ("QDQ",)
    ),
    "DedicatedQDQPair": _flag(False, "QDQ"),
    "QDQOpTypePerChannelSupportToAxis": Option(
        {}, "a dictionary from operator type to axis", _is_axes, ("QDQ",)
    ),
    "QuantizeBias": _flag(True, "QDQ"),
    "UseQDQContribOps": _flag(False, "QDQ"),
    "QDQKeepRemovableActivations": _flag(False, "QDQ"),
    "QDQDisableWeightAdjustForInt32Bias": _flag(False, "QDQ"),
    "MinimumRealRange": Option(
        None,
        "a number above 0, or None",
        _or_none(lambda value: _is_real(value) and float(value) >= 0),
    ),
    "TensorQuantOverrides": Option(
        {},
        "a dictionary from tensor to a list of dictionaries",
        _or_none(lambda value: isinstance(value, Mapping)),
    ),
    "BlockSize": Option(0, "a whole number, 0 for none", lambda v: _is_count(v, 0), ("QDQ",)),
    "CalibTensorRangeSymmetric": _flag(False),
    "CalibMovingAverage": Option(False, "True or False", _is_bool, ("QDQ", "QOperator"), _MIN_MAX),
    "CalibMovingAverageConstant": Option(
        0.01, "a number from 0 to 1", _is_real, ("QDQ", "QOperator"), _MIN_MAX
    ),
    "CalibMaxIntermediateOutputs": Option(None, *_COUNT_OR_NONE, ("QDQ", "QOperator"), _MIN_MAX),
    "CalibPercentile": Option(
        99.999,
        "a number from 0 to 100",
        _is_within(0, 100),
        ("QDQ", "QOperator"),
        (CalibrationMethod.Percentile,),
    ),
    "CalibStridedMinMax": Option(None, *_COUNT_OR_NONE),
    "CalibNumBins": Option(None, *_COUNT_OR_NONE, ("QDQ", "QOperator"), _HISTOGRAMS),
    "CalibNumQuantizedBins": Option(
        None, *_COUNT_OR_NONE, ("QDQ", "QOperator"), (CalibrationMethod.Entropy,)
    ),
    "CalibScenario": Option(
        "same",
        "'same' or 'p3'",
        lambda value: value in ("same", "p3"),
        ("QDQ", "QOperator"),
        (CalibrationMethod.Distribution,),
    ),
    "SmoothQuant": _flag(False),
    "SmoothQuantAlpha": Option(0.5, "a number from 0 to 1", _is_within(0, 1)),
    "SmoothQuantFolding": _flag(True),
    "extra.Sigmoid.nnapi": _flag(False, "QOperator"),
}
"""onnxruntime's 28 keys, and three for what its calibrators take and ``quantize_static`` hides."""
