"""The most that a file may cost: absolute, or against the same model in one type."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType

from qwrap.errors import ConfigError
from qwrap.mixed.choices import FLOAT, Assignment, Choice, Group, everywhere
from qwrap.mixed.search.linear import Limit, LinearCost

UNITS: Mapping[str, Mapping[str, float]] = MappingProxyType({
    "bytes": {
        "B": 1,
        "KB": 1e3,
        "MB": 1e6,
        "GB": 1e9,
        "KiB": 2**10,
        "MiB": 2**20,
        "GiB": 2**30,
    },
    "bit_ops": {"": 1, "M": 1e6, "G": 1e9, "T": 1e12},
    "latency": {"s": 1, "ms": 1e-3, "us": 1e-6},
})
"""Name of a cost to the units that it may be given in."""

_NUMBER = r"(?P<number>\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)"
_ABSOLUTE = re.compile(_NUMBER + r"\s*(?P<unit>[A-Za-z]*)")
_SHARE = re.compile(_NUMBER + r"\s*%")
_TIMES = re.compile(_NUMBER + r"\s*[x*]\s*(?P<choice>\S+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The most that a file may cost; None sets no limit.

    A number is absolute. A text is a number with a unit ("300 KB", "1.5 ms"), a share of the float
    model ("50%"), or a multiple of the model with all groups in one choice ("1.1 x uint8/int8").

    Attributes:
        bytes: of all constants in the file: weights, scales, zero points, biases.
        bit_ops: bits times bits of all multiplications in a forward.
        latency: seconds that a forward takes in onnxruntime, as predicted from its operators.
    """

    bytes: float | str | None = None
    bit_ops: float | str | None = None
    latency: float | str | None = None

    def __post_init__(self) -> None:
        for name, value in self.asked.items():
            if isinstance(value, str):
                _parse(name, value)
            elif not value > 0:
                raise ConfigError(f"Budget({name}={value}): has to be above 0")

    @property
    def asked(self) -> dict[str, float | str]:
        """What is limited: name of the cost to the limit."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in given.items() if value is not None}

    def limits(self, costs: Mapping[str, LinearCost], groups: Sequence[Group]) -> list[Limit]:
        """Return the limits in units of the costs.

        Args:
            costs: by name.
            groups: what there is to choose for.

        Raises:
            ConfigError: a choice that the budget names is offered to no group.
        """
        return [
            Limit(costs[name], self.most(name, costs[name].total, groups)) for name in self.asked
        ]

    def most(
        self, name: str, total: Callable[[Assignment], float], groups: Sequence[Group]
    ) -> float:
        """Return the limit of one cost that the budget limits, in its unit.

        Args:
            name: of the cost.
            total: says what an assignment costs, for a limit that is a multiple of one.
            groups: what there is to choose for.

        Raises:
            ConfigError: a choice that the budget names is offered to no group.
        """
        value = self.asked[name]
        if not isinstance(value, str):
            return float(value)
        number, choice = _parse(name, value)
        return number if choice is None else number * total(everywhere(groups, choice))

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Return the budget that a text such as ``"bytes=300 KB, latency=1.1 x uint8/int8"`` says.

        Raises:
            ConfigError: it is not of that form.
        """
        known = [field.name for field in fields(cls)]
        given: dict[str, float | str] = {}
        for part in text.split(","):
            name, equals, value = part.partition("=")
            name = name.strip()
            if not equals or name not in known:
                raise ConfigError(
                    f"budget {part.strip()!r}: expected one of {', '.join(known)}, '=' and how "
                    "much, as in 'bytes=50%', 'latency=1.1 x uint8/int8' or 'bytes=300 KB'"
                )
            given[name] = value.strip()
        return cls(**given)


def _parse(name: str, text: str) -> tuple[float, Choice | None]:
    """Return a number, and the choice that it is a multiple of, None if it is absolute."""
    text = text.strip()
    if found := _SHARE.fullmatch(text):
        number, choice = float(found["number"]) / 100, FLOAT
    elif found := _TIMES.fullmatch(text):
        number, choice = float(found["number"]), Choice.parse(found["choice"])
    elif found := _ABSOLUTE.fullmatch(text):
        units = {"": 1.0, **UNITS[name]}
        if found["unit"] not in units:
            raise ConfigError(
                f"Budget({name}={text!r}): unit {found['unit']!r} is none of "
                f"{', '.join(UNITS[name])}"
            )
        number, choice = float(found["number"]) * units[found["unit"]], None
    else:
        raise ConfigError(
            f"Budget({name}={text!r}): expected a number, perhaps with a unit "
            f"({', '.join(u for u in UNITS[name] if u)}), a share such as '50%' of the float "
            "model, or a multiple such as '1.1 x uint8/int8'"
        )
    if not number > 0:
        raise ConfigError(f"Budget({name}={text!r}): has to be above 0")
    return number, choice
