"""The calibrator for a method."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from qwrap.ort.calibration.calibrator import CalibraterBase, ModelSource
from qwrap.ort.calibration.histograms import PercentileCalibrater
from qwrap.ort.enums import CalibrationMethod
from qwrap.ort.errors import QuantizationError

_DEFAULTS: dict[CalibrationMethod, dict[str, Any]] = {
    CalibrationMethod.MinMax: {
        "symmetric": False,
        "moving_average": False,
        "averaging_constant": 0.01,
        "max_intermediate_outputs": None,
        "per_channel": False,
    },
    # Levels are on both sides of 0: 256 of them, where 128 would be the codes of 7 bits.
    CalibrationMethod.Entropy: {"num_bins": 2048, "num_quantized_bins": 256, "symmetric": False},
    CalibrationMethod.Percentile: {"num_bins": 2048, "percentile": 99.999, "symmetric": True},
    CalibrationMethod.Distribution: {"num_bins": 2048, "scenario": "same"},
}


def create_calibrator(
    model: ModelSource,
    op_types_to_calibrate: Sequence[str] | None = None,
    augmented_model_path: str | os.PathLike[str] = "augmented_model.onnx",
    calibrate_method: CalibrationMethod = CalibrationMethod.MinMax,
    use_external_data_format: bool = False,
    providers: Sequence[Any] | None = None,
    extra_options: Mapping[str, Any] | None = None,
) -> CalibraterBase:
    """Return a calibrator that is ready to collect data.

    Args:
        model: path of a float model, or the model itself; not modified.
        op_types_to_calibrate: types of the nodes whose tensors are watched; all if None or empty.
        augmented_model_path: not used; it is written for classes with methods of a user's own.
        calibrate_method: how ranges are chosen.
        use_external_data_format: whether that file keeps tensors beside it.
        providers: onnxruntime's names of what to run on; None for the CPU.
        extra_options: what the method has defaults for: MinMax ``symmetric``, ``moving_average``,
            ``averaging_constant`` (0.01), ``max_intermediate_outputs`` and ``per_channel``; Entropy
            ``num_bins`` (2048), ``num_quantized_bins`` (256) and ``symmetric``; Percentile
            ``num_bins`` (2048), ``percentile`` (99.999) and ``symmetric``; Distribution
            ``num_bins`` (2048) and ``scenario`` ("same"). An option that is None counts as not
            given. Percentile looks at magnitudes if ``symmetric`` is not given, and its ranges end
            where the values do; if it is True they end equally far from 0. All take
            ``custom_ops``, shared libraries with operators. Others are ignored.

    Raises:
        QuantizationError: there is no such method, or an option is wrong (a ``ValueError``).
        UnknownNameError: a provider does not exist.
    """
    defaults = _DEFAULTS.get(calibrate_method)
    if defaults is None:
        raise QuantizationError(f"Unsupported calibration method {calibrate_method}")
    given = {key: value for key, value in (extra_options or {}).items() if value is not None}
    options = {key: given.get(key, default) for key, default in defaults.items()}
    calibrator: CalibraterBase = _class_for(calibrate_method)(
        model,
        op_types_to_calibrate,
        augmented_model_path,
        use_external_data_format=use_external_data_format,
        **options,
    )
    if isinstance(calibrator, PercentileCalibrater):
        calibrator.clamped = "symmetric" not in given
    if providers:
        calibrator.execution_providers = list(providers)
    calibrator.custom_ops = given.get("custom_ops", ())
    if calibrator.overrides("augment_graph", "create_inference_session", "collect_data"):
        calibrator.augment_graph()  # such methods expect its file, or its outputs
    calibrator.create_inference_session()
    return calibrator


def _class_for(method: CalibrationMethod) -> type[Any]:
    """Return the class that the public module names now: scripts put their own there."""
    module = importlib.import_module("qwrap.ort.calibrate")
    found: type[Any] = getattr(module, f"{method.name}Calibrater")
    return found
