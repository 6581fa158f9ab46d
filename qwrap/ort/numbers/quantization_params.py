"""Scale, zero point, type and axis of one tensor, as the QDQ quantizer keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qwrap.ort.errors import QuantizationError

_VALUES = (int, str, float, np.ndarray, np.generic)


class QuantizationParams:
    """What is known of one tensor, by key; ``scale``, ``zero_point``, ``quant_type``, ``axis``.

    Attributes:
        data: the dictionary.
    """

    def __init__(self, **data: Any) -> None:
        """Take values by key, arrays or numbers; a scale that is a Python number becomes a float32.

        Raises:
            TypeError: a value is no number, array or text, or the axis is no integer.
            QuantizationError: the scale is neither float32 nor float16 (a ``ValueError``).
        """
        self.data: dict[str, Any] = {}
        for key, value in data.items():
            self.data[key] = _checked(key, value)

    def get(self, key: str, default_value: Any = None) -> Any:
        """Return what is known under ``key``, or ``default_value``."""
        return self.data.get(key, default_value)

    def __contains__(self, key: object) -> bool:
        return key in self.data

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.data[key] = value

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return f"QuantizationParams({self.data})"


def _checked(key: str, value: Any) -> Any:
    if not isinstance(key, str):
        raise TypeError(f"Keys must be strings not {type(key)} for k={key!r}.")
    if key == "axis":
        if value is not None and not isinstance(value, (int, np.integer)):
            raise TypeError(f"Axis value must be an int or None, not {type(value)}.")
        return value
    if not isinstance(value, _VALUES):
        raise TypeError(
            f"Values must be numpy arrays, int, float, str not {type(value)} for k={key!r}."
        )
    if key != "scale":
        return value
    if isinstance(value, (int, float)) and not isinstance(value, np.generic):
        return np.array(value, np.float32)
    if not hasattr(value, "dtype") or value.dtype not in (np.float32, np.float16):
        kind = getattr(value, "dtype", type(value))
        raise QuantizationError(
            f"scale must a float32 or float16 numpy element but is {kind} for k={key!r}"
        )
    return value
