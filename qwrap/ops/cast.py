"""Conversions between element types.

Out of range, float to integer is undefined in ONNX. On x86 torch and onnxruntime then give the
same codes: both let the processor convert to a wider integer and cut that off.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from qwrap.errors import UnsupportedOpError
from qwrap.minifloat import FLOAT8, GRIDS
from qwrap.ops.element_types import DATA_TYPES, TORCH_DTYPES
from qwrap.ops.limits import one_of
from qwrap.ops.minifloat import to_e8m0, to_float8
from qwrap.ops.registry import op
from qwrap.ops.text.numerals import Text, from_text, to_text

Value = Tensor | Text

SUB_BYTE: Mapping[int, tuple[int, bool]] = MappingProxyType({
    TensorProto.INT4: (4, True),
    TensorProto.UINT4: (4, False),
    TensorProto.INT2: (2, True),
    TensorProto.UINT2: (2, False),
})
"""Integers that travel in a wider type: their bits, and whether they have a sign."""


def convert(x: Value, data_type: int, saturate: bool = True, round_mode: str = "up") -> Any:
    """Return ``x`` as the ``onnx.TensorProto`` data type ``data_type``, as it travels.

    Raises:
        UnsupportedOpError: torch has no such type.
    """
    if isinstance(x, np.ndarray):
        return x if data_type == TensorProto.STRING else _from_text(x, data_type)
    if data_type == TensorProto.STRING:
        return to_text(x)
    if data_type in FLOAT8:
        return to_float8(x, data_type, saturate)
    if data_type == TensorProto.FLOAT8E8M0:
        return to_e8m0(x, saturate, round_mode)
    if data_type in GRIDS:
        return GRIDS[data_type].round(x)
    if data_type in SUB_BYTE:
        return wrap(x, *SUB_BYTE[data_type]).to(TORCH_DTYPES[data_type])
    if data_type not in TORCH_DTYPES:
        name = TensorProto.DataType.Name(data_type)
        raise UnsupportedOpError(f"no tensor of element type {name} can be made in torch")
    return x.to(TORCH_DTYPES[data_type])


def _from_text(x: Text, data_type: int) -> Any:
    return convert(from_text(x, data_type), data_type)


def wrap(x: Tensor, bits: int, signed: bool) -> Tensor:
    """Return the lowest ``bits`` of integers, int64; floats are first rounded half away from zero.

    ONNX leaves the rounding open; onnxruntime rounds so, though it truncates for wider types.
    """
    if x.dtype.is_floating_point:
        x = x.to(torch.float64)
        whole = x.trunc()
        x = whole + x.sign() * ((x - whole).abs() >= 0.5)
    half = 2 ** (bits - 1) if signed else 0
    lowest: Tensor = x.to(torch.int64) + half & 2**bits - 1
    return lowest - half


TARGETS = one_of(
    *TORCH_DTYPES, *FLOAT8, *GRIDS, *SUB_BYTE, TensorProto.FLOAT8E8M0, TensorProto.STRING
)
ROUND_MODES = one_of("up", "down", "nearest")


@op(
    "Cast",
    since=(6, 9, 13, 19, 21, 23, 24, 25, 28),
    allowed={"to": TARGETS, "round_mode": ROUND_MODES},
)
def cast(input: Value, *, to: int, saturate: int = 1, round_mode: str = "up") -> Value:
    """Convert to the ``onnx.TensorProto`` data type ``to``."""
    result: Value = convert(input, to, bool(saturate), round_mode)
    return result


@op("Cast", since=(1,), allowed={"to": one_of(*TensorProto.DataType.keys())})
def cast_to_name(input: Value, *, to: str) -> Value:
    """Convert to the ``onnx.TensorProto`` data type named ``to``."""
    return cast(input, to=TensorProto.DataType.Value(to))


@op("CastLike", since=(15, 19, 21, 23, 24, 25), allowed={"round_mode": ROUND_MODES})
def cast_like(
    input: Value,
    target_type: Value,
    *,
    saturate: int = 1,
    round_mode: str = "up",
    element_type: int | None = None,
) -> Value:
    """Convert to the element type of ``target_type``."""
    to = element_type or data_type_of(target_type)
    return cast(input, to=to, saturate=saturate, round_mode=round_mode)


def data_type_of(value: Value) -> int:
    """Return the ``onnx.TensorProto`` data type that ``value`` has if it travels as itself."""
    return DATA_TYPES[value.dtype] if isinstance(value, Tensor) else TensorProto.STRING


BITS: Mapping[int, int] = MappingProxyType({
    **{data_type: dtype.itemsize * 8 for data_type, dtype in TORCH_DTYPES.items()},
    **{data_type: bits for data_type, (bits, _) in SUB_BYTE.items()},
    TensorProto.FLOAT4E2M1: 4,
})
"""``onnx.TensorProto`` data type to its width, for the types that BitCast takes."""

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the lower three bits of a FLOAT4E2M1 stand for; the highest is the sign."""


@op("BitCast", since=(26,), allowed={"to": one_of(*BITS)})
def bit_cast(input: Tensor, *, to: int) -> Tensor:
    """Reinterpret the bits as the ``onnx.TensorProto`` data type ``to``, which is as wide.

    A target of four or two bits says that the input is of as many, too, whatever it travels in.

    Raises:
        UnsupportedOpError: the target has another width.
    """
    bits = BITS[to]
    if bits < 8:
        return _from_codes(_codes(input, bits), to)
    if input.itemsize * 8 != bits:
        raise UnsupportedOpError(
            f"BitCast from {input.dtype} ({input.itemsize * 8} bits) to "
            f"{TensorProto.DataType.Name(to)} ({bits} bits); the widths must be equal"
        )
    if to == TensorProto.BOOL:
        return input.view(torch.uint8) != 0  # a bool that is neither 0 nor 1 has no meaning
    return input.view(TORCH_DTYPES[to])


def _codes(x: Tensor, bits: int) -> Tensor:
    """Return the bits of values of ``bits`` bits as int64."""
    if not x.dtype.is_floating_point:
        return wrap(x, bits, signed=False)
    magnitudes = torch.tensor(MAGNITUDES, dtype=x.dtype, device=x.device)
    return torch.searchsorted(magnitudes, x.abs().contiguous()) + 8 * x.signbit()


def _from_codes(codes: Tensor, to: int) -> Tensor:
    if to in SUB_BYTE:
        return wrap(codes, *SUB_BYTE[to]).to(TORCH_DTYPES[to])
    magnitudes = torch.tensor(MAGNITUDES, device=codes.device)[codes & 7]
    return torch.where(codes < 8, magnitudes, -magnitudes)
