"""What a table knows of one tensor: its range and, where it was chosen, its scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.dtypes import QuantType
from qwrap.errors import TableError
from qwrap.numerics import QParams, choose_qparams, dequantize, round_scale

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Lpbq:
    """How the scales of blocks are stored as whole multiples of a scale for each channel.

    Attributes:
        channel_scale: float32, ``[C]`` or of a shape that broadcasts against the blocks' scales.
        bits: of a code times its multiple, AIMET's "decompressed" bit width.

    Source: AIMET, Low Power Blockwise Quantization.
    """

    channel_scale: Array
    bits: int


class TensorRange:
    """The range of one tensor, and its scale and zero point where they are known.

    Arrays hold one value without dimensions, ``[C]`` values, or one for each block in the shape of
    the tensor with its blocks counted along ``axis``; where a file tells no shape, one after the
    other.

    Attributes:
        low: smallest value to represent, float32 (float16 where the file says so).
        high: largest, of the same type and shape.
        scale: float32 of the same shape, None if only the range is known.
        zero_point: int32 of the shape of ``scale``; None with it.
        dtype: type of the codes, known where ``scale`` is.
        axis: of the channels or blocks; None for a tensor with one range, or if the file does not
            tell.
        block_size: values that share a scale along ``axis``.
        stored: whether it is a weight or another constant, and no activation.
        lpbq: how AIMET's low-power blocks store the scales.
        statistics: what else onnxruntime keeps of an activation: ``hist``, ``bins``,
            ``hist_edges``, ``avg``, ``std``.
    """

    def __init__(
        self,
        low: ArrayLike,
        high: ArrayLike,
        *,
        scale: ArrayLike | None = None,
        zero_point: ArrayLike | None = None,
        dtype: QuantType | None = None,
        axis: int | None = None,
        block_size: int | None = None,
        stored: bool = False,
        lpbq: Lpbq | None = None,
        statistics: Mapping[str, Array | int] | None = None,
    ) -> None:
        self.low, self.high = _floats(low, "low"), _floats(high, "high")
        self.scale, self.zero_point = None, None
        self.dtype, self.axis, self.block_size = dtype, axis, block_size
        self.stored, self.lpbq, self.statistics = stored, lpbq, dict(statistics or {})
        self._check_range()
        if scale is not None:
            self.scale = _floats(scale, "scale").astype(np.float32)
            self.zero_point = _codes(
                np.zeros(self.scale.shape) if zero_point is None else zero_point
            )
            self._check_scale(self.scale, self.zero_point)
        elif zero_point is not None:
            raise TableError("a zero point needs a scale")

    def _check_range(self) -> None:
        if self.low.shape != self.high.shape:
            shapes = f"{list(self.low.shape)} and {list(self.high.shape)}"
            raise TableError(f"low and high have shapes {shapes}; expected the same")
        if not self.low.size:
            raise TableError("the range is empty; expected at least one value")
        wrong = np.flatnonzero(~(self.low <= self.high))
        if wrong.size:
            low, high = (float(end.flat[wrong[0]]) for end in (self.low, self.high))
            raise TableError(f"low {low:g} is above high {high:g} (index {wrong[0]})")
        if self.block_size is not None and self.block_size < 1:
            raise TableError(f"block size {self.block_size}: expected 1 or more")

    def _check_scale(self, scale: Array, zero_point: Array) -> None:
        if self.dtype is None:
            raise TableError("a scale needs the type of the codes")
        for name, array in (("zero points", zero_point), ("ranges", self.low)):
            if array.shape != scale.shape:
                shapes = f"{list(scale.shape)} scales, {list(array.shape)} {name}"
                raise TableError(f"{shapes}: expected the same shape")
        if not (scale > 0).all():
            raise TableError(f"scale {float(scale.min()):g}: expected more than 0, as a float32")
        low, high = (self.dtype.qmin, self.dtype.qmax) if self.dtype.is_integer else (0, 0)
        if zero_point.min() < low or zero_point.max() > high:
            ends = f"{int(zero_point.min())} … {int(zero_point.max())}"
            raise TableError(f"zero point {ends}: {self.dtype} has {low:g} … {high:g}")

    @classmethod
    def from_qparams(
        cls, qparams: QParams, spec: QuantSpec, *, stored: bool = False, lpbq: Lpbq | None = None
    ) -> TensorRange:
        """Return what ``spec`` represents with a scale and zero point.

        Args:
            qparams: scale and zero point; its axis and block size are taken over.
            spec: gives the type, and the codes at the ends of the range.
            stored: whether the tensor is a weight.
            lpbq: how the scales are made.
        """
        scale, zero_point = (t.detach().cpu() for t in (qparams.scale, qparams.zero_point))
        if qparams.axis is None and scale.numel() == 1:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        low, high = _ends(scale, zero_point, spec)
        return cls(
            low,
            high,
            scale=scale.numpy(),
            zero_point=zero_point.numpy(),
            dtype=spec.dtype,
            axis=qparams.axis,
            block_size=qparams.block_size,
            stored=stored,
            lpbq=lpbq,
        )

    @property
    def symmetric(self) -> bool | None:
        """Whether 0 is the middle code throughout; None if there is no scale."""
        if self.zero_point is None or self.dtype is None:
            return None
        middle = 0 if self.dtype.signed else 2 ** (self.dtype.bits - 1)
        return bool((self.zero_point == middle).all())

    def with_scale(self, spec: QuantSpec) -> TensorRange:
        """Return the same range with the scale and zero point that ``spec`` gives it.

        Args:
            spec: of the codes; its axis and block size are left aside.
        """
        flat = replace(spec, axis=0 if self.low.ndim else None, block_size=None)
        low, high = (torch.tensor(end.reshape(-1)) for end in (self.low, self.high))
        qparams = choose_qparams(low, high, flat)
        return TensorRange(
            self.low,
            self.high,
            scale=qparams.scale.numpy().reshape(self.low.shape),
            zero_point=qparams.zero_point.numpy().reshape(self.low.shape),
            dtype=spec.dtype,
            axis=self.axis,
            block_size=self.block_size,
            stored=self.stored,
            statistics=self.statistics,
        )

    def qparams(self, spec: QuantSpec, shape: Sequence[int] = (1,)) -> QParams:
        """Return the scale and zero point of a tensor that is quantized as ``spec`` says.

        They are those of the table where ``spec`` can have them: its codes are of the same type,
        or integers of as many bits with the other sign (the zero point then moves by half the
        codes), its scale is of a type that holds them, and the zero point is where ``spec``
        demands it. Otherwise the range is spread over the codes of ``spec``. One range serves
        all channels; for one scale the ranges of all channels are joined.

        Args:
            spec: of the tensor.
            shape: of its scale: ``[1]``, ``[C]``, or one for each block.

        Raises:
            TableError: there are more or fewer ranges than ``shape`` asks for, or they are laid
                along another axis.
        """
        self._check_layout(spec, shape)
        low, high = (torch.tensor(end.astype(np.float32)) for end in (self.low, self.high))
        joined = low.numel() > 1 and math.prod(shape) == 1
        if joined:
            low, high = low.min(), high.max()
        low, high = (_laid_out(end, shape, spec) for end in (low, high))
        chosen = choose_qparams(low, high, spec)
        if joined or self.scale is None or self.zero_point is None or self.dtype is None:
            return chosen
        shift = _shift(self.dtype, spec.dtype)
        if shift is None:
            return chosen
        scale = _laid_out(torch.tensor(self.scale), shape, spec)
        zero_point = _laid_out(torch.tensor(self.zero_point), shape, spec) + shift
        forced = spec.symmetric or spec.restricted
        if forced and not torch.equal(zero_point, chosen.zero_point):
            return chosen
        if not torch.equal(round_scale(scale, spec).to(torch.float32), scale):
            return chosen
        return QParams(scale, zero_point, spec.axis, spec.block_size)

    def _check_layout(self, spec: QuantSpec, shape: Sequence[int]) -> None:
        """Refuse ranges along another axis, or of other blocks, than the tensor has."""
        if self.low.size == 1 or math.prod(shape) == 1:
            return
        told, axis = self.axis, spec.axis
        counted = told is not None and axis is not None and min(told, axis) >= 0  # from the front
        if counted and told != axis:
            raise TableError(f"holds ranges along axis {told}; the tensor's is {axis}")
        if self.scale is not None and self.block_size != spec.block_size:
            raise TableError(
                f"holds blocks of {self.block_size or 'all'} values; the tensor has blocks of "
                f"{spec.block_size or 'all'}"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorRange) and _same(vars(self), vars(other))

    __hash__ = None  # type: ignore[assignment]  # it can change, as the arrays it holds can

    def __repr__(self) -> str:
        said = {n: v for n, v in vars(self).items() if isinstance(v, np.ndarray) or v}
        return f"TensorRange({', '.join(f'{n}={_brief(v)}' for n, v in said.items())})"


def _floats(values: ArrayLike, name: str) -> Array:
    array = np.asarray(values)
    if array.dtype.kind not in "iuf":
        raise TableError(f"{name} holds {array.dtype}; expected numbers")
    with np.errstate(over="ignore"):  # what is too large for float32 is reported as infinite
        array = array if array.dtype == np.float16 else array.astype(np.float32)
    if not np.isfinite(array).all():
        raise TableError(f"{name} is not finite: NaN, infinite, or too large for float32")
    return array


def _codes(values: ArrayLike) -> Array:
    array = np.asarray(values)
    if array.dtype.kind not in "iuf":
        raise TableError(f"zero points hold {array.dtype}; expected whole numbers")
    wrong = ~(np.isfinite(array) & (np.abs(array) < 2.0**31) & (array == np.trunc(array)))
    if wrong.any():
        raise TableError(f"zero point {float(array[wrong].flat[0]):g}: expected a whole number")
    return array.astype(np.int32)


def _ends(scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> list[Array]:
    """Return the values that the first and last code of ``spec`` stand for."""
    ends = []
    for number in (spec.qmin, spec.qmax):
        kind = torch.int32 if spec.dtype.is_integer else torch.float32
        codes = torch.full((scale.numel(),), number, dtype=kind)
        flat = QParams(scale.reshape(-1), zero_point.reshape(-1), axis=0)
        ends.append(dequantize(codes, flat).reshape(scale.shape).numpy())
    return ends


def _laid_out(values: Tensor, shape: Sequence[int], spec: QuantSpec) -> Tensor:
    """Return values in the shape of a scale."""
    shape = tuple(shape)
    if values.numel() == 1:
        return values.reshape(-1).expand(math.prod(shape)).reshape(shape)
    if values.numel() != math.prod(shape):
        raise TableError(f"holds {values.numel()} ranges; the tensor has {math.prod(shape)} scales")
    if values.ndim == 1 and len(shape) == 2 and spec.axis == 0:
        return values.reshape(shape[::-1]).T.contiguous()  # AIMET 1.0.0: output channels first
    sides, asked = ([side for side in s if side > 1] for s in (values.shape, shape))
    if values.ndim > 1 and sides != asked:
        raise TableError(
            f"holds ranges of shape {list(values.shape)}; the tensor's scale has {list(shape)}"
        )
    return values.reshape(shape)


def _shift(held: QuantType, asked: QuantType) -> int | None:
    """Return what turns a zero point of one type into the other's, None if nothing does."""
    if held == asked:
        return 0
    if not (held.is_integer and asked.is_integer and held.bits == asked.bits):
        return None
    return int(asked.qmin - held.qmin)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, Lpbq) and isinstance(b, Lpbq):
        return a.bits == b.bits and _same(a.channel_scale, b.channel_scale)
    return type(a) is type(b) and bool(a == b)


def _brief(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value:g}" if value.ndim == 0 else f"{list(value.shape)} of {value.dtype}"
    return str(value) if isinstance(value, QuantType) else repr(value)
