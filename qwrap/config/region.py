"""Nodes in other types than the rest of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qwrap.config.spec import QuantSpec, activation_spec, check_width
from qwrap.dtypes import QuantType
from qwrap.errors import ConfigError

FLOATS = ("float32", "float16")
"""What a region can be left in, beside the types of codes."""

Selector = str | Iterable[str] | Any
"""A name or pattern, several of them, or a Block of a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Nodes that are quantized in other types than the rest of the model.

    Attributes:
        selectors: each a node's name, a shell pattern over node names, an operator type, the path
            of a Block (``"layers.0.attention"``), or a tensor or pattern over tensors, which stands
            for what writes and what reads it: the first of these kinds that fits.
        to: if there are any, the region is all nodes on a way from the selected ones to these.
        activation: type of the nodes' inputs and outputs, as in ``QConfig``; "float32" leaves them
            float, "float16" computes them in half precision; None says nothing of it.
        weight: type of the nodes' weights, as in ``QConfig``; "float32" leaves them float; None
            says nothing of it.
    """

    selectors: tuple[str, ...]
    to: tuple[str, ...] = ()
    activation: QuantType | QuantSpec | str | None = None
    weight: QuantType | QuantSpec | str | None = None

    @property
    def text(self) -> str:
        """What was asked, for messages."""
        where = f"{list(self.selectors)}" + (f" to {list(self.to)}" if self.to else "")
        types = {"activation": self.activation, "weight": self.weight}
        given = [f"{k}={getattr(v, 'dtype', v)}" for k, v in types.items() if v is not None]
        return f"set {where}: {', '.join(given)}"


def names_of(selector: Selector) -> tuple[str, ...]:
    """Return the patterns of a selector; a Block has a path as its name."""
    if isinstance(selector, str):
        return (selector,)
    path = getattr(selector, "path", None)
    if isinstance(path, tuple):
        if not path:
            raise ConfigError("the root Block is the whole model; set QConfig's own fields instead")
        return (".".join(path),)
    names = tuple(selector) if isinstance(selector, Iterable) else ()
    names = tuple(sorted(names)) if isinstance(selector, (set, frozenset)) else names
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"{selector!r} selects nothing; give a name or pattern, several of them, or a Block"
        )
    return names


def check_region(region: Region) -> None:
    """Refuse types that contradict each other, or that tensors cannot have."""
    if isinstance(region.activation, QuantSpec) or region.activation not in (None, *FLOATS):
        check_width(activation_spec(region.activation))
    if region.weight == "float16":
        raise ConfigError(f"{region.text}: weights are of float16 with activation='float16'")
    if isinstance(region.weight, QuantSpec) or region.weight not in (None, *FLOATS):
        check_width(activation_spec(region.weight))
    if region.activation == "float16" and region.weight not in (None, "float32"):
        raise ConfigError(
            f"{region.text}: what computes in float16 has weights of float16; leave out weight="
        )
