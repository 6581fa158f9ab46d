"""The types a tensor can be quantized to."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
from torch import Tensor

from qwrap.codebook import middles_of
from qwrap.errors import ConfigError
from qwrap.minifloat import numbers


@dataclass(frozen=True, slots=True)
class QuantFunction:
    """Fake quantization in one piece, written as an ONNX function.

    Attributes:
        proto: the serialised ``onnx.FunctionProto``, of inputs x, scale and perhaps zero point.
        compute: the same in torch, on float32 tensors.
        has_zero_point: whether there are three inputs.
        own_gradient: whether its own operators propagate the gradient of x, instead of passing it
            straight through between ``qmin`` and ``qmax``.
    """

    proto: bytes = field(repr=False)
    compute: Callable[..., Tensor] = field(repr=False, compare=False)
    has_zero_point: bool
    own_gradient: bool


@dataclass(frozen=True, slots=True)
class QuantType:
    """What codes are stored as, and which numbers they stand for before the scale.

    There are integers of any width, floats, code books, and functions of the user. An integer has
    a zero point; floats and code books have none, and ``levels`` lists their numbers. A function
    has no codes at all: what it rounds to is its own affair.

    Attributes:
        name: ONNX's lower-case name, for example ``"uint8"``, or the maker's.
        onnx_type: the ``onnx.TensorProto`` data type that carries the codes. Of an integer that
            ONNX has no type for it is the next wider one; of a code book the indices have it.
        torch_dtype: the torch type that stores the codes; floats of 4 bits travel in float32.
        bits: how many one code needs.
        qmin: smallest number.
        qmax: largest number.
        opset: first ai.onnx opset whose QuantizeLinear writes ``onnx_type`` (0: only
            DequantizeLinear reads it, from opset 10 on).
        levels: the numbers of a float type or code book, ascending; None for an integer, which has
            all from ``qmin`` to ``qmax``.
        codebook: whether a code is an index into ``levels``, and not the number itself.
        middles: of a code book, what lies nearer to the next level is above; see ``codebook``.
        function: what quantizes and dequantizes, of a type without codes.
    """

    name: str
    onnx_type: int
    torch_dtype: torch.dtype
    bits: int
    qmin: float
    qmax: float
    opset: int
    levels: tuple[float, ...] | None = None
    codebook: bool = False
    middles: tuple[float, ...] = field(default=(), repr=False, compare=False)
    function: QuantFunction | None = None

    @property
    def signed(self) -> bool:
        """Whether numbers can be negative."""
        return self.qmin < 0

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers with a zero point."""
        return self.levels is None and self.function is None

    @property
    def has_zero_point(self) -> bool:
        """Whether a zero point says which number means 0."""
        return self.is_integer if self.function is None else self.function.has_zero_point

    @property
    def is_standard(self) -> bool:
        """Whether QuantizeLinear saturates where this type ends, so that nothing need be added."""
        carried = _BY_ONNX_TYPE.get(self.onnx_type)
        same = carried is not None and (carried.qmin, carried.qmax) == (self.qmin, self.qmax)
        return same and not self.codebook and self.function is None

    def __str__(self) -> str:
        return self.name


def _float(name: str, onnx_type: int, torch_dtype: torch.dtype, bits: int, opset: int) -> QuantType:
    levels = numbers(onnx_type)
    return QuantType(name, onnx_type, torch_dtype, bits, levels[0], levels[-1], opset, levels)


_P = onnx.TensorProto
UINT8 = QuantType("uint8", _P.UINT8, torch.uint8, 8, 0, 255, 10)
INT8 = QuantType("int8", _P.INT8, torch.int8, 8, -128, 127, 10)
UINT16 = QuantType("uint16", _P.UINT16, torch.uint16, 16, 0, 65535, 21)
INT16 = QuantType("int16", _P.INT16, torch.int16, 16, -32768, 32767, 21)
UINT4 = QuantType("uint4", _P.UINT4, torch.uint8, 4, 0, 15, 21)
INT4 = QuantType("int4", _P.INT4, torch.int8, 4, -8, 7, 21)
UINT2 = QuantType("uint2", _P.UINT2, torch.uint8, 2, 0, 3, 25)
INT2 = QuantType("int2", _P.INT2, torch.int8, 2, -2, 1, 25)
INT32 = QuantType("int32", _P.INT32, torch.int32, 32, -(2**31), 2**31 - 1, 0)
FLOAT8E4M3FN = _float("float8e4m3fn", _P.FLOAT8E4M3FN, torch.float8_e4m3fn, 8, 19)
FLOAT8E4M3FNUZ = _float("float8e4m3fnuz", _P.FLOAT8E4M3FNUZ, torch.float8_e4m3fnuz, 8, 19)
FLOAT8E5M2 = _float("float8e5m2", _P.FLOAT8E5M2, torch.float8_e5m2, 8, 19)
FLOAT8E5M2FNUZ = _float("float8e5m2fnuz", _P.FLOAT8E5M2FNUZ, torch.float8_e5m2fnuz, 8, 19)
FLOAT4E2M1 = _float("float4e2m1", _P.FLOAT4E2M1, torch.float32, 4, 23)

INTEGERS = (UINT8, INT8, UINT16, INT16, UINT4, INT4, UINT2, INT2)
FLOATS = (FLOAT8E4M3FN, FLOAT8E4M3FNUZ, FLOAT8E5M2, FLOAT8E5M2FNUZ, FLOAT4E2M1)
_BY_NAME = {t.name: t for t in (*INTEGERS, INT32, *FLOATS)}
_BY_ONNX_TYPE = {t.onnx_type: t for t in _BY_NAME.values()}


def quant_type(name: str | QuantType) -> QuantType:
    """Return the type called ``name``; ``"int3"``, ``"uint6"`` and the like are made as needed.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(name, QuantType):
        return name
    if name in _BY_NAME:
        return _BY_NAME[name]
    kind, bits = name.rstrip("0123456789"), name.lstrip("uint")
    if kind in ("int", "uint") and bits.isdigit() and 2 <= int(bits) <= 16:
        return integer_type(int(bits), signed=kind == "int")
    raise ConfigError(
        f"no quantized type {name!r}; choose one of {', '.join(_BY_NAME)}, or int2 … int16"
    )


def integer_type(bits: int, *, signed: bool = True) -> QuantType:
    """Return the integer type of ``bits`` bits, carried by the next wider one that ONNX has.

    Raises:
        ConfigError: ``bits`` is not from 2 to 16.
    """
    if not 2 <= bits <= 16:
        raise ConfigError(f"an integer of {bits} bits: choose from 2 to 16")
    carrier = next(
        t for t in sorted(INTEGERS, key=lambda t: t.bits) if t.bits >= bits and t.signed == signed
    )
    if carrier.bits == bits:
        return carrier
    qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    name = f"{'int' if signed else 'uint'}{bits}"
    return QuantType(name, carrier.onnx_type, carrier.torch_dtype, bits, qmin, qmax, carrier.opset)


def codebook_type(name: str, levels: Sequence[float]) -> QuantType:
    """Return a type whose codes are indices into ``levels``, for what no number format describes.

    A value is divided by its scale and becomes the nearest level, of two equally near the lower.
    Logarithmic types, normal-float types and learned code books are of this kind:
    ``codebook_type("log2", [0, *(2.0**-k for k in range(7)), *(-(2.0**-k) for k in range(7))])``.

    Args:
        name: what it is called in plans and files; letters, digits and ``_``.
        levels: 2 to 256 finite numbers in any order, which become float32, without repetition; 0
            has to be among them, so that a padded or masked value keeps its meaning.

    Raises:
        ConfigError: the name or the levels are none of that.
    """
    if not is_free_name(name):
        raise ConfigError(f"a code book cannot be called {name!r}: give a new identifier")
    with np.errstate(over="ignore"):
        ordered = tuple(sorted(float(np.float32(level)) + 0.0 for level in levels))
    if not 2 <= len(ordered) <= 256 or len(set(ordered)) < len(ordered):
        raise ConfigError(
            f"code book {name!r} needs 2 to 256 levels that differ in float32; got {len(ordered)}, "
            f"{len(set(ordered))} of them different"
        )
    if not all(map(math.isfinite, ordered)) or 0.0 not in ordered:
        raise ConfigError(f"the levels of code book {name!r} must be finite and hold 0")
    bits = max(2, (len(ordered) - 1).bit_length())
    carrier = next(t for t in (UINT4, UINT8) if t.bits >= bits)
    return QuantType(
        name,
        carrier.onnx_type,
        carrier.torch_dtype,
        bits,
        ordered[0],
        ordered[-1],
        carrier.opset,
        ordered,
        codebook=True,
        middles=middles_of(ordered),
    )


def is_free_name(name: str) -> bool:
    """Whether a new type can have this name: an identifier that no other type has."""
    fits = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) and not re.fullmatch(r"u?int\d+", name)
    return bool(fits) and name not in _BY_NAME
