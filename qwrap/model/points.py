"""The places of a graph where something may sit, and what may stand in for a node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, order=True)
class ValuePoint:
    """On a tensor, after its producer and before every consumer."""

    value: str

    @property
    def text(self) -> str:
        """What the point is called in the module tree."""
        return self.value


@dataclass(frozen=True, slots=True, order=True)
class UsePoint:
    """On one input of one node: only that consumer sees the result."""

    node: str
    index: int

    @property
    def text(self) -> str:
        """What the point is called in the module tree."""
        return f"{self.node}:{self.index}"


@dataclass(frozen=True, slots=True, order=True)
class OutputPoint:
    """On one graph output: what the caller gets, while nodes read the tensor as it is."""

    index: int

    @property
    def text(self) -> str:
        """What the point is called in the module tree."""
        return f"output:{self.index}"


Point = ValuePoint | UsePoint | OutputPoint


@dataclass(frozen=True, slots=True)
class Program:
    """One way to run a model: what sits on its points and what computes its nodes.

    Attributes:
        taps: point -> called with the tensor, returns the tensor that goes on.
        kernels: node key -> called with the node's inputs in ONNX order (None where left out)
            instead of the operator.
        watchers: value key -> called with the tensor after its tap; the result is ignored.
    """

    taps: Mapping[Point, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    kernels: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    watchers: Mapping[str, Callable[[Tensor], object]] = field(default_factory=dict)
