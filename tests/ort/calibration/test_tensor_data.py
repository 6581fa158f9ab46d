"""What calibration returns, and what a user may do with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnxruntime.quantization import calibrate as incumbent

from qwrap.ort.calibrate import (
    CalibrationDataReader,
    CalibrationMethod,
    TensorData,
    TensorsData,
)

RANGE = {"lowest": np.float32(-1), "highest": np.array([2], np.float16)}


class DuckReader:
    """A reader that inherits from nothing."""

    def get_next(self) -> None:
        """Have no data."""


class ListReader(CalibrationDataReader):
    """A reader of two batches."""

    def __init__(self) -> None:
        self.batches = iter([{"x": 1}, {"x": 2}])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


@pytest.mark.ort(81)
def test_any_class_with_get_next_is_a_reader() -> None:
    assert issubclass(DuckReader, CalibrationDataReader)
    assert not issubclass(int, CalibrationDataReader)
    assert list(ListReader()) == [{"x": 1}, {"x": 2}]


@pytest.mark.ort(81)
def test_a_reader_without_length_or_range_says_so() -> None:
    with pytest.raises(NotImplementedError):
        len(ListReader())
    with pytest.raises(NotImplementedError):
        ListReader().set_range(0, 1)
    with pytest.raises(TypeError, match="abstract"):
        CalibrationDataReader()  # type: ignore[abstract]


@pytest.mark.ort(43)
def test_methods_have_the_values_of_onnxruntime() -> None:
    ours = {method.name: method.value for method in CalibrationMethod}
    assert ours == {method.name: method.value for method in incumbent.CalibrationMethod}


@pytest.mark.ort(100)
def test_statistics_are_attributes_and_a_pair() -> None:
    data = TensorData(**RANGE)
    assert data.range_value == (RANGE["lowest"], RANGE["highest"])
    assert data.to_dict() == {**RANGE, "CLS": "TensorData"}
    assert "highest" in repr(data)
    assert TensorData(avg=np.float32(1), std=np.float32(2)).avg_std == (1, 2)


@pytest.mark.ort(100)
def test_statistics_that_are_not_known_are_no_attributes() -> None:
    data = TensorData(lowest=np.float32(0))
    assert not hasattr(data, "highest")
    with pytest.raises(AttributeError, match="'lowest' and/or 'highest' missing"):
        _ = data.range_value
    with pytest.raises(AttributeError, match="'avg' and/or 'std' missing"):
        _ = data.avg_std


@pytest.mark.ort(100)
@pytest.mark.parametrize("cls", [TensorData, incumbent.TensorData])
def test_statistics_are_float32_or_float16(cls: Any) -> None:
    with pytest.raises(ValueError, match="Unexpected dtype float64 for k='lowest'"):
        cls(lowest=np.float64(1))
    with pytest.raises(ValueError, match="Unexpected type <class 'float'> for k='lowest'"):
        cls(lowest=1.0)
    with pytest.raises(ValueError, match="Unexpected value 'middle' not in"):
        cls(middle=np.float32(1))


@pytest.mark.ort(100)
def test_statistics_come_back_from_a_dictionary() -> None:
    hist = np.array([1, 2])
    data = TensorData.from_dict(TensorData(**RANGE, hist=hist, bins=np.zeros(3)).to_dict())
    assert data.range_value == (RANGE["lowest"], RANGE["highest"])
    assert data.hist is hist


@pytest.mark.ort(101)
@pytest.mark.parametrize("module", [incumbent, None])
def test_ranges_are_like_a_dictionary(module: Any) -> None:
    cls = TensorsData if module is None else module.TensorsData
    data = TensorData if module is None else module.TensorData
    method = CalibrationMethod if module is None else module.CalibrationMethod
    tensors = cls(method.MinMax, {"a": (np.float32(0), np.float32(1)), "b": data(**RANGE)})
    assert [*tensors] == [*tensors.keys()] == ["a", "b"]
    assert "a" in tensors
    assert "c" not in tensors
    tensors["a"] = data(**RANGE)
    assert next(iter(tensors.values())).range_value == tensors["b"].range_value
    assert dict(tensors.items())["b"] is tensors["b"]
    with pytest.raises(RuntimeError, match="Only an existing tensor can be modified, 'c' is not"):
        tensors["c"] = data(**RANGE)


@pytest.mark.ort(101)
def test_tuples_of_four_hold_a_histogram() -> None:
    hist, edges = np.array([1, 2]), np.array([0, 1, 2], np.float32)
    pair = np.float32(0), np.float32(1)
    data = TensorsData(CalibrationMethod.Percentile, {"a": (*pair, hist, edges)})["a"]
    assert (data.range_value, data.hist is hist, data.bins is edges) == (pair, True, True)


@pytest.mark.ort(101)
def test_ranges_of_other_types_are_refused() -> None:
    pair = np.float32(0), np.float32(1)
    with pytest.raises(TypeError, match="Keys must be strings not <class 'int'>"):
        TensorsData(CalibrationMethod.MinMax, {1: pair})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="Values must be TensorData not <class 'list'>"):
        TensorsData(CalibrationMethod.MinMax, {"a": [0, 1]})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="Unexpected tuple for 'a', it has 2 elements"):
        TensorsData(CalibrationMethod.Entropy, {"a": pair})
