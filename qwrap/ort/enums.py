"""The enumerations of onnxruntime.quantization, with its values."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

from onnx import TensorProto

from qwrap.ort.errors import QuantizationError

Member = TypeVar("Member", bound="_Named")


class _Named(Enum):
    """Members print as their names, and are found by them."""

    def __str__(self) -> str:
        return self.name

    @classmethod
    def from_string(cls: type[Member], text: str) -> Member:
        """Return the member of that name.

        Raises:
            QuantizationError: there is none (a ``ValueError``).
        """
        try:
            return cls[text]
        except KeyError:
            names = ", ".join(cls.__members__)
            raise QuantizationError(f"{cls.__name__} has no '{text}', only {names}") from None


class QuantizationMode(_Named):
    """Operators with scales measured at run time, or given in the file."""

    IntegerOps = 0
    QLinearOps = 1


class QuantizedValueType(_Named):
    """What a quantized value was: an activation or a constant."""

    Input = 0
    Initializer = 1


class QuantType(_Named):
    """Types of codes."""

    QInt8 = 0
    QUInt8 = 1
    QFLOAT8E4M3FN = 2
    QInt16 = 3
    QUInt16 = 4
    QInt4 = 5
    QUInt4 = 6

    @property
    def tensor_type(self) -> int:
        """The ``TensorProto.DataType``."""
        return _TENSOR_TYPES[self]


_TENSOR_TYPES: dict[QuantType, int] = {
    QuantType.QInt8: TensorProto.INT8,
    QuantType.QUInt8: TensorProto.UINT8,
    QuantType.QFLOAT8E4M3FN: TensorProto.FLOAT8E4M3FN,
    QuantType.QInt16: TensorProto.INT16,
    QuantType.QUInt16: TensorProto.UINT16,
    QuantType.QInt4: TensorProto.INT4,
    QuantType.QUInt4: TensorProto.UINT4,
}


class QuantFormat(_Named):
    """Form of the graph: operators on codes, or float operators between pairs."""

    QOperator = 0
    QDQ = 1


class CalibrationMethod(Enum):
    """How a range is chosen from what was observed."""

    MinMax = 0
    Entropy = 1
    Percentile = 2
    Distribution = 3
