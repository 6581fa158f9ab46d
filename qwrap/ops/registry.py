"""Which torch function computes which operator, by domain, type and revision.

A *revision* is named by the opset version that introduced it, the ``since_version`` of its schema:
Softmax has the revisions 1, 11 and 13, so a model of opset 17 uses Softmax-13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import onnx

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Operator:
    """One registered function.

    Attributes:
        function: inputs positional, attributes keyword-only with the schema's names and defaults.
        host: indices of the inputs that the function wants as Python numbers or (nested) lists,
            because they steer shapes. A negative ``-1`` entry means all inputs.
        wants_output_count: the function has a keyword ``output_count``: how many of the outputs
            the node names.
    """

    function: Callable[..., Any]
    host: tuple[int, ...]
    wants_output_count: bool

    def wants_host(self, index: int) -> bool:
        """Whether input ``index`` is handed over as a Python value."""
        return index in self.host or -1 in self.host


_OPERATORS: dict[tuple[str, str, int], Operator] = {}


def op(
    op_type: str, since: Sequence[int], *, domain: str = "", host: tuple[int, ...] = ()
) -> Callable[[Function], Function]:
    """Register the decorated function for the revisions ``since`` of ``domain::op_type``."""

    def register(function: Function) -> Function:
        names = function.__kwdefaults__ or {}
        record = Operator(function, host, "output_count" in names)
        for version in since:
            key = (domain, op_type, version)
            assert key not in _OPERATORS, f"{key} registered twice"
            _OPERATORS[key] = record
        return function

    return register


def revision(domain: str, op_type: str, opset: int) -> int | None:
    """Return the revision of ``op_type`` that a model importing ``opset`` uses, None if none."""
    try:
        return int(onnx.defs.get_schema(op_type, opset, domain).since_version)
    except onnx.defs.SchemaError:
        versions = registered(domain, op_type)
        return max((v for v in versions if v <= opset), default=None)


def registered(domain: str, op_type: str) -> list[int]:
    """Return the registered revisions of an operator, ascending."""
    return sorted(v for d, t, v in _OPERATORS if (d, t) == (domain, op_type))


def find(domain: str, op_type: str, opset: int) -> Operator | None:
    """Return what computes ``op_type`` in a model importing ``opset``, None if nothing does."""
    since = revision(domain, op_type, opset)
    return None if since is None else _OPERATORS.get((domain, op_type, since))
