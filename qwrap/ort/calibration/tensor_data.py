"""What calibration found out about tensors."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwrap.ort.enums import CalibrationMethod
from qwrap.ort.errors import QuantizationError

Array = NDArray[Any]

_FLOATS = frozenset({"avg", "std", "lowest", "highest", "hist_edges"})
_ALLOWED = _FLOATS | {"hist", "bins"}


class TensorData:
    """Statistics of one tensor; only what is known is an attribute.

    Attributes:
        lowest: smallest value of the range: float32 or float16, of shape ``[]``, ``[1]``, or
            ``[C]`` for ranges per channel.
        highest: largest value of the range, of the same shape.
        avg: mean of the values.
        std: their standard deviation.
        hist: how many values fell into each bin.
        hist_edges: borders of the bins, one more than there are bins.
        bins: the same, where a range was chosen from them.
    """

    avg: Array
    std: Array
    lowest: Array
    highest: Array
    hist: Array
    hist_edges: Array
    bins: Array

    def __init__(self, **kwargs: Any) -> None:
        """Take statistics by name.

        Raises:
            QuantizationError: a name is none of the attributes, or one of the floats is no float32
                or float16 array or scalar of numpy (a ``ValueError``).
        """
        self._attrs = list(kwargs)
        for name, value in kwargs.items():
            if name not in _ALLOWED:
                raise QuantizationError(f"Unexpected value {name!r} not in {sorted(_ALLOWED)}.")
            if name in _FLOATS:
                _check_float(name, value)
            setattr(self, name, value)

    def __repr__(self) -> str:
        return f"TensorData({', '.join(f'{k}={getattr(self, k)!r}' for k in self._attrs)})"

    @property
    def range_value(self) -> tuple[Array, Array]:
        """Lowest and highest.

        Raises:
            AttributeError: one of them is not known.
        """
        return self._both("lowest", "highest")

    @property
    def avg_std(self) -> tuple[Array, Array]:
        """Mean and standard deviation.

        Raises:
            AttributeError: one of them is not known.
        """
        return self._both("avg", "std")

    def _both(self, first: str, second: str) -> tuple[Array, Array]:
        if not hasattr(self, first) or not hasattr(self, second):
            raise AttributeError(
                f"Attributes '{first}' and/or '{second}' missing in {self._attrs}."
            )
        return getattr(self, first), getattr(self, second)

    def to_dict(self) -> dict[str, Any]:
        """Return what is known by name, and ``CLS``, the name of the class."""
        return {**{name: getattr(self, name) for name in self._attrs}, "CLS": type(self).__name__}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> TensorData:
        """Return what ``to_dict`` described, also when it went through JSON."""
        known = {name: value for name, value in d.items() if name != "CLS"}
        return cls(**{name: _from_json(name, value) for name, value in known.items()})


def _check_float(name: str, value: Any) -> None:
    if not hasattr(value, "dtype"):
        raise QuantizationError(
            f"Unexpected type {type(value)} for k={name!r}; give a float32 or float16 array"
        )
    if value.dtype not in (np.float16, np.float32):
        raise QuantizationError(
            f"Unexpected dtype {value.dtype} for k={name!r}; make it float32 or float16"
        )


def _from_json(name: str, value: Any) -> Any:
    if isinstance(value, Mapping) and value.get("CLS") == "numpy.array":
        return np.array(value["data"], dtype=np.dtype(value["dtype"]))
    if name in _FLOATS and isinstance(value, int | float):
        return np.array(value, dtype=np.float32)
    return value


class TensorsData:
    """Tensor name -> ``TensorData``, and how the ranges were chosen.

    Attributes:
        calibration_method: the ``CalibrationMethod``.
        data: the mapping.
    """

    def __init__(
        self,
        calibration_method: CalibrationMethod,
        data: Mapping[str, TensorData | tuple[Any, ...]],
    ) -> None:
        """Take ranges by the name of their tensor.

        Args:
            calibration_method: how they were chosen.
            data: for each tensor a ``TensorData``, or a tuple of lowest and highest (MinMax), or
                of lowest, highest, counts and borders of bins.

        Raises:
            TypeError: a name is no text, or a value none of these.
        """
        self.calibration_method = calibration_method
        self.data: dict[str, TensorData] = {}
        for name, value in data.items():
            if not isinstance(name, str):
                raise TypeError(f"Keys must be strings not {type(name)}.")
            self.data[name] = self._made(name, value)

    def _made(self, name: str, value: object) -> TensorData:
        if isinstance(value, tuple):
            if self.calibration_method == CalibrationMethod.MinMax and len(value) == 2:
                return TensorData(lowest=value[0], highest=value[1])
            if len(value) == 4:
                lowest, highest, hist, bins = value
                return TensorData(lowest=lowest, highest=highest, hist=hist, bins=bins)
            raise TypeError(
                f"Unexpected tuple for {name!r}, it has {len(value)} elements: {value}."
            )
        if not isinstance(value, TensorData):
            raise TypeError(f"Values must be TensorData not {type(value)}.")
        return value

    def __repr__(self) -> str:
        return f"TensorsData({self.calibration_method}, {len(self.data)} tensors)"

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[str]:
        yield from self.data

    def __contains__(self, key: object) -> bool:
        return key in self.data

    def __getitem__(self, key: str) -> TensorData:
        return self.data[key]

    def __setitem__(self, key: str, value: TensorData) -> None:
        if key not in self.data:
            raise RuntimeError(f"Only an existing tensor can be modified, {key!r} is not.")
        self.data[key] = value

    def keys(self) -> KeysView[str]:
        """Return the tensors' names."""
        return self.data.keys()

    def values(self) -> ValuesView[TensorData]:
        """Return the tensors' statistics."""
        return self.data.values()

    def items(self) -> ItemsView[str, TensorData]:
        """Return names with statistics."""
        return self.data.items()

    def to_dict(self) -> dict[str, Any]:
        """Return mapping and method by name, and ``CLS``, the name of the class."""
        return {
            "CLS": type(self).__name__,
            "data": self.data,
            "calibration_method": self.calibration_method,
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> TensorsData:
        """Return what ``to_dict`` described, also when it went through JSON."""
        method = d["calibration_method"]
        if isinstance(method, Mapping) and method.get("CLS") == "CalibrationMethod":
            method = CalibrationMethod[method["value"].split(".")[-1]]
        read = {
            name: value if isinstance(value, TensorData) else TensorData.from_dict(value)
            for name, value in d["data"].items()
        }
        return cls(method, read)
