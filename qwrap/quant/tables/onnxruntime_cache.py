"""onnxruntime's calibration cache, which ``quantize_static(calibration_cache_path=...)`` reads.

Source: ``save_tensors_data`` and ``TensorsData.from_dict`` of onnxruntime.quantization.calibrate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwrap.errors import TableError
from qwrap.quant.tables.contents import Contents
from qwrap.quant.tables.document import (
    Array,
    Fields,
    at,
    at_tensor,
    cast,
    listed,
    numbers,
    render,
    shorten,
)
from qwrap.quant.tables.tensor_range import TensorRange

METHODS = ("MinMax", "Entropy", "Percentile", "Distribution")
STATISTICS = ("avg", "std", "hist", "hist_edges", "bins")
_FLOATS = ("float16", "float32")  # the only ones that onnxruntime takes for a range
_NUMBERS = (*_FLOATS, "float64", *(f"{u}int{b}" for u in ("", "u") for b in (8, 16, 32, 64)))


def read(document: object) -> Contents:
    """Return what a parsed cache holds."""
    fields = Fields(document)
    contents = Contents(method=_method(fields), smooth_quant=fields.flag("smooth_quant"))
    for name, value in fields.inner("data").values.items():
        with at_tensor(name):
            contents.add(name, tensor_data(value))
    return contents


def write(contents: Contents) -> bytes:
    """Return the cache; weights are left out, for onnxruntime's holds none."""
    contents.refuse_floating("onnxruntime's cache")
    if contents.method not in METHODS:
        raise TableError(f"method {contents.method!r}: onnxruntime knows {', '.join(METHODS)}")
    content = {
        "CLS": "TensorsData",
        "data": {name: plain(entry) for name, entry in contents.activations()},
        "calibration_method": {
            "CLS": "CalibrationMethod",
            "value": f"CalibrationMethod.{contents.method}",
        },
        "smooth_quant": contents.smooth_quant,
    }
    return render(content, indent=None)


def tensor_data(value: object) -> TensorRange:
    """Return what a ``TensorData`` of onnxruntime says."""
    fields = Fields(value)
    known = {"CLS", "lowest", "highest", *STATISTICS}
    if strange := fields.values.keys() - known:
        raise TableError(f"has {listed(strange)}; onnxruntime's TensorData knows {listed(known)}")
    statistics = {n: _array(fields, n, _NUMBERS) for n in STATISTICS if n in fields}
    low, high = (_array(fields, name, _FLOATS) for name in ("lowest", "highest"))
    return TensorRange(low, high, statistics=statistics)


def plain(entry: TensorRange) -> dict[str, Any]:
    """Return a range as onnxruntime writes a ``TensorData``."""
    arrays: Mapping[str, Array | int] = {
        "lowest": entry.low,
        "highest": entry.high,
        **entry.statistics,
    }
    return {**{name: _plain(value) for name, value in arrays.items()}, "CLS": "TensorData"}


def _plain(value: Array | int) -> object:
    if isinstance(value, int):
        return value
    return {"data": value.tolist(), "dtype": str(value.dtype), "CLS": "numpy.array"}


def _method(fields: Fields) -> str:
    value = fields.inner("calibration_method").text("value").rpartition(".")[2]
    if value not in METHODS:
        raise TableError(f"calibration method {value!r}: expected one of {', '.join(METHODS)}")
    return value


def _array(fields: Fields, name: str, dtypes: tuple[str, ...]) -> Any:
    """Return an array, or a number: float32, unless it counts something."""
    value = fields.get(name)
    with at(repr(name)):
        if isinstance(value, int) and not isinstance(value, bool) and name in ("bins", "hist"):
            return value
        if not isinstance(value, dict):
            return cast(numbers(value), "float32")
        array = Fields(value)
        dtype = array.text("dtype")
        if array.text("CLS") != "numpy.array" or dtype not in dtypes:
            raise TableError(f"is {shorten(array.values['CLS'])} of {dtype}; expected {dtypes}")
        return cast(numbers(array.get("data")), dtype)
