"""Operators on values that torch stores but does not compute with, and on text.

Torch has no arithmetic for unsigned integers of 16 to 64 bits nor for floats of 8, and some of its
kernels that only move values refuse them; text is no tensor at all. Every operator in ``CARRY``
runs its ordinary function on other tensors instead, which stand for those values, and its results
are turned back. What stands for them depends on what the operator looks at (``Way``).

Which nodes need that is known when the model is loaded, so that others pay nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwrap.errors import UnsupportedOpError
from qwrap.ops import unsigned
from qwrap.ops.element_types import TORCH_DTYPES
from qwrap.ops.registry import Operator, function_of, key_of
from qwrap.ops.text.numerals import Text

Function = Callable[..., Any]


class Way(Enum):
    """What an operator looks at, which decides what may stand for the values."""

    BITS = "bits"  # only where a value is, or whether two are equal: integers of the same bits
    VALUES = "values"  # the number, but for multiples of 2^bits: wider integers, which wrap
    ORDER = "order"  # which of two is larger: wider integers; uint64 as int64 less 2^63
    FLOATS = "floats"  # the number, in float64


@dataclass(frozen=True, slots=True)
class Carry:
    """How an operator is computed on other tensors.

    Attributes:
        way: what may stand for the values.
        like: index of the input whose type the results have.
        results: indices of the results that have that type; None means all.
        uint64: what computes uint64 instead, on int64 of the same bits.
    """

    way: Way
    like: int = 0
    results: tuple[int, ...] | None = None
    uint64: Function | None = None


_BITS = Carry(Way.BITS)
_VALUES = Carry(Way.VALUES)
_ORDER = Carry(Way.ORDER)
_COMPARES = Carry(Way.ORDER, results=())
_FLOATS = Carry(Way.FLOATS)

MOVES = (
    *("Compress", "Concat", "ConcatFromSequence", "DepthToSpace", "Expand", "Flatten", "Gather"),
    *("GatherElements", "GatherND", "Identity", "Reshape", "ReverseSequence", "Slice"),
    *("SpaceToDepth", "Split", "SplitToSequence", "Squeeze", "TensorScatter", "Tile", "Transpose"),
    *("Trilu", "Unsqueeze", "CenterCropPad"),
)

CARRY: Mapping[str, Carry] = MappingProxyType({
    **dict.fromkeys(MOVES, _BITS),
    "Where": Carry(Way.BITS, like=1),
    "Equal": Carry(Way.BITS, results=()),
    "NonZero": Carry(Way.BITS, results=()),
    **dict.fromkeys(("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot"), _BITS),
    **dict.fromkeys(("Pad", "Scatter", "ScatterElements", "ScatterND"), _VALUES),
    "OneHot": Carry(Way.VALUES, like=2),
    "IsNaN": Carry(Way.VALUES, results=()),
    "IsInf": Carry(Way.VALUES, results=()),
    **dict.fromkeys(("Add", "Sub", "Mul", "Sum", "MatMul", "Gemm", "Einsum"), _VALUES),
    **dict.fromkeys(("CumSum", "CumProd", "ReduceSum", "ReduceProd", "ReduceSumSquare"), _VALUES),
    "Div": Carry(Way.VALUES, uint64=unsigned.divide),
    "Mod": Carry(Way.VALUES, uint64=unsigned.remainder),
    "BitShift": Carry(Way.VALUES, uint64=unsigned.shift),
    **dict.fromkeys(("Abs", "PRelu"), Carry(Way.VALUES, uint64=unsigned.unchanged)),
    "ReduceL1": Carry(Way.VALUES, uint64=unsigned.reduce_sum),
    "Sign": Carry(Way.VALUES, uint64=unsigned.sign),
    **dict.fromkeys(("Greater", "GreaterOrEqual", "Less", "LessOrEqual"), _COMPARES),
    **dict.fromkeys(("ArgMax", "ArgMin"), _COMPARES),
    **dict.fromkeys(("Max", "Min", "Clip", "ReduceMax", "ReduceMin", "MaxPool"), _ORDER),
    "TopK": Carry(Way.ORDER, results=(0,)),
    "Unique": Carry(Way.ORDER, results=(0,)),
    **dict.fromkeys(("Pow", "ReduceL2", "ReduceMean"), _FLOATS),
    **dict.fromkeys(("ReduceLogSum", "ReduceLogSumExp"), _FLOATS),
})
"""Operator type to how it is computed on types that torch has no kernels for."""

TEXT = frozenset((*MOVES, "Where", "Equal", "Pad", "Scatter", "ScatterElements", "ScatterND"))
TEXT |= {"OneHot", "Unique"}
"""The operators of ``CARRY`` that take text."""

WIDER = MappingProxyType({torch.uint16: torch.int32, torch.uint32: torch.int64})
SAME_BITS = MappingProxyType({
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e4m3fnuz: torch.uint8,
    torch.float8_e5m2: torch.uint8,
    torch.float8_e5m2fnuz: torch.uint8,
    torch.float8_e8m0fnu: torch.uint8,
})
"""The types that torch does not compute with, and an integer type of the same width."""

ORDINARY = frozenset(t for t, dtype in TORCH_DTYPES.items() if dtype not in SAME_BITS)
"""The ``onnx.TensorProto`` data types that need no stand-in."""


def suited(operator: Operator, op_type: str, types: Sequence[int | None]) -> Operator:
    """Return what computes an ai.onnx operator on inputs of the given types.

    Args:
        operator: what computes it on types that torch has kernels for.
        op_type: its type.
        types: the ``onnx.TensorProto`` data types of the inputs, None where they are unknown;
            then the tensors tell when they come.
    """
    if op_type not in CARRY or ORDINARY.issuperset(types):
        return operator
    return replace(
        operator,
        function=carried(op_type, operator.function, operator.wants_device),
        literal=(),
        wants_device=True,
    )


class Carried:
    """An operator's function that also takes what torch does not compute with."""

    def __init__(self, op_type: str, function: Function, wants_device: bool) -> None:
        self.op_type, self.function, self.wants_device = op_type, function, wants_device
        self.__name__ = function.__name__
        self.__wrapped__ = function  # whose signature this has

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.op_type, key_of(self.function), self.wants_device)

    def __call__(self, *inputs: Any, device: torch.device | None = None, **attributes: Any) -> Any:
        """Run the function on stand-ins where an input needs one."""
        function = self.function
        if self.wants_device:
            attributes["device"] = device
        values = list(_flat(inputs))
        if any(isinstance(value, np.ndarray) for value in values):
            return _on_text(self.op_type, function, inputs, attributes, device)
        if not any(isinstance(value, Tensor) and value.dtype in SAME_BITS for value in values):
            return function(*inputs, **attributes)
        return _on_stand_ins(CARRY[self.op_type], function, inputs, attributes)


@cache
def carried(op_type: str, function: Function, wants_device: bool) -> Carried:
    """Return ``function`` for values of any type, the same object every time."""
    return Carried(op_type, function, wants_device)


def _restored(op_type: str, key: tuple[str, str, int], wants_device: bool) -> Carried:
    return carried(op_type, function_of(key), wants_device)


def _flat(values: Any) -> Iterator[Any]:
    """Yield the values in nested sequences."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply ``function`` to every value in nested sequences."""
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(function, item) for item in value)
    return function(value)


def _restore_results(result: Any, results: tuple[int, ...] | None, back: Function) -> Any:
    """Turn those results of an operator back that are of the carried type."""
    if not isinstance(result, tuple):
        return result if results == () else _mapped(back, result)
    wanted = range(len(result)) if results is None else results
    return tuple(_mapped(back, r) if i in wanted else r for i, r in enumerate(result))


# --- numbers -------------------------------------------------------------------------------------

LOWEST = -(2**63)


def _on_stand_ins(
    carry: Carry, function: Function, inputs: tuple[Any, ...], attributes: dict[str, Any]
) -> Any:
    tensors = [value for value in _flat(inputs) if isinstance(value, Tensor)]
    way = carry.way
    if attributes.get("reduction") in ("max", "min"):
        way = Way.ORDER
    elif way is Way.BITS and any(t.requires_grad for t in tensors if t.dtype in SAME_BITS):
        way = Way.VALUES  # bits have no gradient
    if carry.uint64 is not None and any(t.dtype == torch.uint64 for t in tensors):
        function = carry.uint64
    like = next((v for v in _flat(inputs[carry.like : carry.like + 1])), None)
    result = function(*_mapped(lambda value: _stand_in(value, way), inputs), **attributes)
    if not isinstance(like, Tensor) or like.dtype not in SAME_BITS:
        return result
    dtype = like.dtype
    return _restore_results(result, carry.results, lambda value: _restore(value, dtype, way))


def _stand_in(value: Any, way: Way) -> Any:
    if isinstance(value, int) and value >= 2**63:  # an input that came as a Python number
        return value - 2**64
    if not isinstance(value, Tensor) or value.dtype not in SAME_BITS:
        return value
    if way is Way.BITS:
        return value.view(SAME_BITS[value.dtype])
    if way is Way.FLOATS:
        return value.to(torch.float64)
    if value.dtype == torch.uint64:
        signed = value.view(torch.int64)
        return signed ^ LOWEST if way is Way.ORDER else signed
    return value.to(WIDER.get(value.dtype, torch.float32))


def _restore(value: Tensor, dtype: torch.dtype, way: Way) -> Tensor:
    if way is Way.BITS:
        return value.view(dtype)
    if dtype == torch.uint64 and way is not Way.FLOATS:
        return (value ^ LOWEST if way is Way.ORDER else value).view(dtype)
    return value.to(dtype)


# --- text ----------------------------------------------------------------------------------------


def _on_text(
    op_type: str,
    function: Function,
    inputs: tuple[Any, ...],
    attributes: dict[str, Any],
    device: torch.device | None,
) -> Any:
    """Run ``function`` on the ranks of all texts among each other: equal or ordered as they are."""
    if op_type not in TEXT or attributes.get("reduction", "none") != "none":
        raise UnsupportedOpError(f"{op_type} of text with attributes {attributes}")
    texts = [v for v in _flat(inputs) if isinstance(v, (np.ndarray, str))]
    arrays = [np.asarray(text, object) for text in texts]
    # The empty text comes first in any order, so that the padding 0 means it.
    every = np.concatenate([np.array([""], object), *(a.ravel() for a in arrays)])
    pool, ranks = np.unique(every, return_inverse=True)
    parts = iter(np.split(ranks[1:], np.cumsum([a.size for a in arrays])[:-1]))

    def rank(value: Any) -> Any:
        if isinstance(value, str):
            return int(next(parts)[0])
        if not isinstance(value, np.ndarray):
            return value
        return torch.from_numpy(next(parts).reshape(value.shape)).to(device)

    def text(value: Tensor) -> Text:
        found: Text = pool[value.cpu().numpy()]
        return np.asarray(found, object)

    carry = CARRY[op_type]
    like = next((v for v in _flat(inputs[carry.like : carry.like + 1])), None)
    result = function(*_mapped(rank, inputs), **attributes)
    if not isinstance(like, np.ndarray):
        return result
    return _restore_results(result, carry.results, text)
