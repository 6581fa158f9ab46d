"""Calibration: data readers, calibrators, ranges and their cache."""

from qwrap.ort.borrowed import lender
from qwrap.ort.calibration.cache import (
    CalibrationCacheEncoder,
    cached_ranges,
    load_tensors_data,
    save_tensors_data,
)
from qwrap.ort.calibration.calibrator import CalibraterBase
from qwrap.ort.calibration.collector import CalibrationDataCollector, HistogramCollector
from qwrap.ort.calibration.create import create_calibrator
from qwrap.ort.calibration.data_reader import CalibrationDataReader
from qwrap.ort.calibration.divergence import entropy, rel_entr, smooth_distribution
from qwrap.ort.calibration.histograms import (
    DistributionCalibrater,
    EntropyCalibrater,
    HistogramCalibrater,
    PercentileCalibrater,
)
from qwrap.ort.calibration.min_max import MinMaxCalibrater
from qwrap.ort.calibration.plot import apply_plot
from qwrap.ort.calibration.tensor_data import TensorData, TensorsData
from qwrap.ort.enums import CalibrationMethod

__all__ = [
    "CalibraterBase",
    "CalibrationCacheEncoder",
    "CalibrationDataCollector",
    "CalibrationDataReader",
    "CalibrationMethod",
    "DistributionCalibrater",
    "EntropyCalibrater",
    "HistogramCalibrater",
    "HistogramCollector",
    "MinMaxCalibrater",
    "PercentileCalibrater",
    "TensorData",
    "TensorsData",
    "apply_plot",
    "cached_ranges",
    "create_calibrator",
    "entropy",
    "load_tensors_data",
    "rel_entr",
    "save_tensors_data",
    "smooth_distribution",
]

__getattr__ = lender(__name__)
