"""Calibration: data readers, calibrators, ranges and their cache."""

from qwrap.ort.calibration.cache import (
    CalibrationCacheEncoder,
    cached_ranges,
    load_tensors_data,
    save_tensors_data,
)
from qwrap.ort.calibration.data_reader import CalibrationDataReader
from qwrap.ort.calibration.tensor_data import TensorData, TensorsData
from qwrap.ort.enums import CalibrationMethod

__all__ = [
    "CalibrationCacheEncoder",
    "CalibrationDataReader",
    "CalibrationMethod",
    "TensorData",
    "TensorsData",
    "cached_ranges",
    "load_tensors_data",
    "save_tensors_data",
]
