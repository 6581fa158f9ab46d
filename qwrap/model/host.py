"""Shape arithmetic on Python integers.

A value is *host* when it is made of Shape and Size outputs and integer constants by operators of
the table below and has rank 0 or 1. Host values are Python ints or lists, which ``torch.compile``
keeps symbolic: one compiled graph then serves all shapes, and nothing waits for a device.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx

Number = Any  # int, bool or torch.SymInt
HostValue = Any  # Number or list of Number


@dataclass(frozen=True, slots=True)
class HostType:
    """Static knowledge of a host value: ``length`` is None for a scalar, -1 for an unknown one."""

    length: int | None

    @property
    def is_list(self) -> bool:
        """Whether the value is a list (rank 1)."""
        return self.length is not None


SCALAR = HostType(None)
HostInput = HostType | None
Attributes = Mapping[str, Any]
Rule = Callable[[Sequence[HostInput], Sequence[Any], Attributes], HostType | None]


@dataclass(frozen=True, slots=True)
class HostOperator:
    """A host function and the rule that says what it returns (None: not a host value).

    The rule gets the input types, the inputs' constant values (None where not constant) and the
    attributes.
    """

    function: Callable[..., HostValue]
    rule: Rule


INTEGERS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
HOST_OPERATORS: dict[str, HostOperator] = {}


def host_op(*op_types: str, rule: Rule) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the host form of ``op_types``."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for op_type in op_types:
            HOST_OPERATORS[op_type] = HostOperator(function, rule)
        return function

    return register


def _broadcast(types: Sequence[HostInput], *_: object) -> HostType | None:
    lengths = {t.length for t in types if t is not None and t.length is not None}
    if -1 in lengths or len(lengths - {1}) > 1:
        return None
    return HostType(_size(lengths)) if lengths else SCALAR


def _size(lengths: set[int]) -> int:
    """Return the length that lists of these lengths broadcast to."""
    return next(iter(lengths - {1}), 1)


def _same(types: Sequence[HostInput], *_: object) -> HostType | None:
    return types[0]


def elementwise(function: Callable[..., Number], *inputs: HostValue) -> HostValue:
    """Apply ``function`` with the broadcasting of ONNX to ints and lists."""
    lengths = [len(x) for x in inputs if isinstance(x, list)]
    if not lengths:
        return function(*inputs)
    size = _size(set(lengths))
    lists = [x if isinstance(x, list) else [x] for x in inputs]
    rows = [x if len(x) == size else x * size for x in lists]
    return [function(*row) for row in zip(*rows, strict=True)]


def _divide(a: Number, b: Number) -> Number:
    return a // b if (a >= 0) == (b > 0) else -(-a // b)  # ONNX truncates towards zero


def _truth(a: Number) -> Number:
    return a != 0


def _itself(a: Number) -> Number:
    return +a  # a bool becomes an integer


def _least(*values: Number) -> Number:
    return min(values)


def _greatest(*values: Number) -> Number:
    return max(values)


def _where(condition: Number, a: Number, b: Number) -> Number:
    return a if condition else b


_ELEMENTWISE: dict[str, Callable[..., Number]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": _divide,
    "Neg": operator.neg,
    "Abs": abs,
    "Min": _least,
    "Max": _greatest,
    "Equal": operator.eq,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
    "And": operator.and_,
    "Or": operator.or_,
    "Not": operator.not_,
    "Where": _where,
}
for _name, _function in _ELEMENTWISE.items():
    HOST_OPERATORS[_name] = HostOperator(partial(elementwise, _function), _broadcast)


def _cast_rule(
    types: Sequence[HostInput], _: Sequence[Any], attributes: Attributes
) -> HostType | None:
    return types[0] if attributes["to"] in INTEGERS else None


@host_op("Cast", rule=_cast_rule)
def cast(x: HostValue, *, to: int) -> HostValue:
    """Keep integers; compare with zero for booleans."""
    return elementwise(_truth if to == onnx.TensorProto.BOOL else _itself, x)


@host_op("Identity", rule=_same)
def identity(x: HostValue) -> HostValue:
    """Return the value itself."""
    return x


def _gather_rule(
    types: Sequence[HostInput], constants: Sequence[Any], attributes: Attributes
) -> HostType | None:
    data, indices = types
    if data is None or not data.is_list or attributes.get("axis", 0) not in (0, -1):
        return None
    return indices if constants[1] is not None else None


@host_op("Gather", rule=_gather_rule)
def gather(data: list[Number], indices: int | list[int], *, axis: int = 0) -> HostValue:
    """Pick entries by constant indices."""
    return [data[i] for i in indices] if isinstance(indices, list) else data[indices]


def _concat_rule(types: Sequence[HostInput], *_: object) -> HostType | None:
    lengths = [-1 if t is None or t.length is None else t.length for t in types]
    return HostType(-1 if -1 in lengths else sum(lengths))


@host_op("Concat", rule=_concat_rule)
def concat(*inputs: list[Number], axis: int = 0) -> list[Number]:
    """Join lists."""
    return [item for x in inputs for item in x]


def _slice_rule(
    types: Sequence[HostInput], constants: Sequence[Any], attributes: Attributes
) -> HostType | None:
    data = types[0]
    unknown = [t for t, c in zip(types[1:], constants[1:], strict=True) if t is not None is c]
    if data is None or not data.is_list or unknown:
        return None
    if data.length == -1:
        return HostType(-1)
    names = ("starts", "ends", "axes")  # attributes up to opset 9, inputs after
    given = {name: attributes[name] for name in names if name in attributes}
    return HostType(len(slice_(list(range(data.length or 0)), *constants[1:], **given)))


@host_op("Slice", rule=_slice_rule)
def slice_(
    data: list[Number],
    starts: list[int],
    ends: list[int],
    axes: list[int] | None = None,
    steps: list[int] | None = None,
) -> list[Number]:
    """Cut a list as ONNX Slice does; starts, ends and steps are constants."""
    step = steps[0] if steps else 1
    start, end = (n + len(data) if n < 0 else n for n in (starts[0], ends[0]))
    if step > 0:
        return data[max(start, 0) : max(end, 0) : step]
    # Unlike Python, ONNX starts no further back than at the first entry.
    start, end = max(start, 0), max(end, -1)
    return data[start : None if end < 0 else end : step]


def _unsqueeze_rule(types: Sequence[HostInput], *_: object) -> HostType | None:
    return HostType(1) if types[0] is not None and not types[0].is_list else None


@host_op("Unsqueeze", rule=_unsqueeze_rule)
def unsqueeze(x: Number, axes: object = None) -> list[Number]:
    """Make a scalar a list of one."""
    return [x]


def _squeeze_rule(types: Sequence[HostInput], *_: object) -> HostType | None:
    return SCALAR if types[0] is not None and types[0].length == 1 else None


@host_op("Squeeze", rule=_squeeze_rule)
def squeeze(x: list[Number], axes: object = None) -> Number:
    """Make a list of one a scalar."""
    return x[0]


def _reshape_rule(
    types: Sequence[HostInput], constants: Sequence[Any], _: Attributes
) -> HostType | None:
    source, shape = types[0], constants[1]
    if source is None or not isinstance(shape, list) or len(shape) > 1:
        return None
    if not shape:
        return SCALAR if source.length in (None, 1) else None
    return HostType(1 if source.length is None else source.length)


@host_op("Reshape", rule=_reshape_rule)
def reshape(x: HostValue, shape: list[int], *, allowzero: int = 0) -> HostValue:
    """Reshape between rank 0 and rank 1."""
    flat = x if isinstance(x, list) else [x]
    return flat if shape else flat[0]


def _reduce_rule(
    types: Sequence[HostInput], constants: Sequence[Any], attributes: Attributes
) -> HostType | None:
    if types[0] is None or not types[0].is_list:
        return None
    axes = constants[1] if len(types) > 1 else attributes.get("axes")
    if (len(types) > 1 and axes is None) or (not axes and attributes.get("noop_with_empty_axes")):
        return None
    return HostType(1) if attributes.get("keepdims", 1) else SCALAR


@host_op("ReduceProd", rule=_reduce_rule)
def reduce_prod(
    x: list[Number],
    axes: object = None,
    *,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> HostValue:
    """Multiply all entries: how exporters write the number of elements."""
    product = math.prod(x)
    return [product] if keepdims else product
