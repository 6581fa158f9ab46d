"""Host operators as expressions of their own.

Exporters make every Reshape out of a dozen of these, and a call costs ten times the work.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx

from qwrap.model.host import HostInput

LONGEST = 8  # entries; longer lists are left to the functions
BINARY = {
    "Add": "+",
    "Sub": "-",
    "Mul": "*",
    "Equal": "==",
    "Less": "<",
    "LessOrEqual": "<=",
    "Greater": ">",
    "GreaterOrEqual": ">=",
    "And": "&",
    "Or": "|",
}


def inline(
    op_type: str,
    inputs: Sequence[str],
    types: Sequence[HostInput],
    attributes: Mapping[str, Any],
) -> str | None:
    """Write a host operator as an expression, None where only its function can compute it.

    Args:
        op_type: what to compute.
        inputs: text of each input, ``"None"`` where it is left out: a local or a literal.
        types: what is known of each input.
        attributes: of the node.
    """
    if op_type in BINARY or op_type in ("Div", "Where"):
        return _elementwise(_ITEMS.get(op_type) or _binary(BINARY[op_type]), inputs, types)
    if op_type == "Cast" and attributes["to"] != onnx.TensorProto.BOOL:
        return _elementwise("+{}".format, inputs, types)  # a bool becomes an integer
    writer = _WRITERS.get(op_type)
    return None if writer is None else writer(inputs, types)


def _literal(text: str) -> Any:
    """Return the constant that ``text`` is, None if it is a local or an entry of one."""
    return None if text[0].isidentifier() else ast.literal_eval(text)


def _binary(symbol: str) -> Callable[..., str]:
    return lambda a, b: f"{a} {symbol} {b}"


def _divide(a: str, b: str) -> str | None:
    divisor = _literal(b)
    if not isinstance(divisor, int) or divisor <= 0:
        return None
    return f"({a} // {b} if {a} >= 0 else -(-{a} // {b}))"  # ONNX truncates towards zero


def _where(condition: str, a: str, b: str) -> str:
    return f"({a} if {condition} else {b})"


_ITEMS: dict[str, Callable[..., str | None]] = {"Div": _divide, "Where": _where}


def _elementwise(
    write: Callable[..., str | None], inputs: Sequence[str], types: Sequence[HostInput]
) -> str | None:
    """Write out the entries of what broadcasting makes of ``inputs``, one by one."""
    lengths = {t.length for t in types if t is not None and t.length is not None}
    if not lengths:
        return write(*inputs)
    size = next(iter(lengths - {1}), 1)
    if None in types or not 0 <= size <= LONGEST:
        return None
    columns = [_entries(text, kind, size) for text, kind in zip(inputs, types, strict=True)]
    items = [write(*row) for row in zip(*columns, strict=True)]
    return None if None in items else f"[{', '.join(map(str, items))}]"


def _entries(text: str, kind: HostInput, size: int) -> list[str]:
    assert kind is not None
    if kind.length is None:
        return [text] * size
    known = _literal(text)
    names = (
        [f"{text}[{i}]" for i in range(kind.length)] if known is None else list(map(repr, known))
    )
    return names if kind.length == size else names * size


def _concat(inputs: Sequence[str], types: Sequence[HostInput]) -> str:
    parts: list[str] = []
    for text, kind in zip(inputs, types, strict=True):
        known = _literal(text)
        if known is not None:
            parts += map(repr, known)
        else:
            parts.append(f"{text}[0]" if kind is not None and kind.length == 1 else f"*{text}")
    return f"[{', '.join(parts)}]"


def _gather(inputs: Sequence[str], _: Sequence[HostInput]) -> str | None:
    data, indices = inputs[0], _literal(inputs[1])
    if isinstance(indices, int):
        return f"{data}[{indices}]"
    if not isinstance(indices, list) or len(indices) > LONGEST:
        return None
    return f"[{', '.join(f'{data}[{i}]' for i in indices)}]"


def _slice(inputs: Sequence[str], _: Sequence[HostInput]) -> str | None:
    """Cut as Python does, which forwards is what ONNX does."""
    if len(inputs) < 3:  # starts and ends are attributes
        return None
    start, end = _literal(inputs[1]), _literal(inputs[2])
    (step,) = _literal(inputs[4]) if len(inputs) > 4 and inputs[4] != "None" else [1]
    return f"{inputs[0]}[{start[0]}:{end[0]}:{step}]".replace(":1]", "]") if step > 0 else None


def _reshape(inputs: Sequence[str], types: Sequence[HostInput]) -> str | None:
    shape, source = _literal(inputs[1]), types[0]
    if not isinstance(shape, list) or source is None:
        return None
    if not shape:
        return f"{inputs[0]}[0]" if source.is_list else inputs[0]
    return inputs[0] if source.is_list else f"[{inputs[0]}]"


_WRITERS: dict[str, Callable[[Sequence[str], Sequence[HostInput]], str | None]] = {
    "Concat": _concat,
    "Gather": _gather,
    "Identity": lambda inputs, _: inputs[0],
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": lambda inputs, _: f"{inputs[0]}[0]",
    "Unsqueeze": lambda inputs, _: f"[{inputs[0]}]",
}
