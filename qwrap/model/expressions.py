"""Text of expressions. What comes from a model file gets into code through here, or not at all."""

from __future__ import annotations

import inspect
import keyword
import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import onnx_ir as ir

from qwrap.errors import ModelError


def literal(value: Any) -> str:
    """Write plain data as an expression, infinities and NaN included.

    Raises:
        ModelError: ``value`` is no number, text or list of them.
    """
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(literal(v) for v in value)}]"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{float(value)}")'
    if isinstance(value, ir.DataType):
        return repr(int(value))
    # Exactly these types: the repr of any other object may be any text.
    if value is None or type(value) in (bool, int, float, str, bytes):
        return repr(value)
    raise ModelError(f"a value of type {type(value).__name__} cannot be an operator attribute")


def access(start: str, path: tuple[str, ...]) -> str:
    """Write the way from ``start`` through attributes with names of any kind."""
    text = start
    for part in path:
        plain = re.fullmatch(r"[A-Za-z_][A-Za-z_0-9]*", part) and not keyword.iskeyword(part)
        text = f"{text}.{part}" if plain else f"getattr({text}, {part!r})"
    return text


def comment(key: str) -> str:
    """Write a node key as a comment: escaped, so that it ends with its line."""
    return f"  # {key!r}"


@cache
def keyword_names(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names that ``function`` takes by keyword; none for functions of torch itself."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return frozenset()
    return frozenset(p.name for p in parameters if p.kind in kinds)
