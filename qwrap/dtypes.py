"""The integer types a tensor can be quantized to."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import torch

from qwrap.errors import ConfigError


@dataclass(frozen=True, slots=True)
class QuantType:
    """An integer storage type.

    Attributes:
        name: ONNX's lower-case name, for example ``"uint8"``.
        onnx_type: the ``onnx.TensorProto`` data type.
        torch_dtype: the torch type that stores the codes.
        bits: storage width.
        qmin: smallest code.
        qmax: largest code.
        opset: first ai.onnx opset whose QuantizeLinear writes it (0: only DequantizeLinear reads
            it, from opset 10 on).
    """

    name: str
    onnx_type: int
    torch_dtype: torch.dtype
    bits: int
    qmin: int
    qmax: int
    opset: int

    @property
    def signed(self) -> bool:
        """Whether codes can be negative."""
        return self.qmin < 0

    def __str__(self) -> str:
        return self.name


UINT8 = QuantType("uint8", onnx.TensorProto.UINT8, torch.uint8, 8, 0, 255, 10)
INT8 = QuantType("int8", onnx.TensorProto.INT8, torch.int8, 8, -128, 127, 10)
UINT16 = QuantType("uint16", onnx.TensorProto.UINT16, torch.uint16, 16, 0, 65535, 21)
INT16 = QuantType("int16", onnx.TensorProto.INT16, torch.int16, 16, -32768, 32767, 21)
INT32 = QuantType("int32", onnx.TensorProto.INT32, torch.int32, 32, -(2**31), 2**31 - 1, 0)

_BY_NAME = {t.name: t for t in (UINT8, INT8, UINT16, INT16, INT32)}


def quant_type(name: str | QuantType) -> QuantType:
    """Return the type called ``name``.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(name, QuantType):
        return name
    if name not in _BY_NAME:
        raise ConfigError(f"no quantized type {name!r}; choose one of {', '.join(_BY_NAME)}")
    return _BY_NAME[name]
