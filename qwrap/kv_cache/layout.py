"""Which axes of a cache have scales of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qwrap.errors import ConfigError

Granularity = Literal["tensor", "head", "channel"]
GRANULARITIES = get_args(Granularity)


@dataclass(frozen=True, slots=True)
class Layout:
    """What the axes of a cache are.

    Attributes:
        rank: how many there are.
        batch: the axis of the sequences.
        time: the axis of the tokens, along which a cache grows or is filled.
    """

    rank: int
    batch: int
    time: int

    @property
    def channels(self) -> tuple[int, ...]:
        """The other axes: heads, and the channels of a head."""
        return tuple(a for a in range(self.rank) if a not in (self.batch, self.time))

    def axes(self, granularity: Granularity, name: str) -> tuple[int, ...]:
        """Return the axes along which scales differ.

        Raises:
            ConfigError: there are no heads in tensor ``name``.
        """
        if granularity == "tensor":
            return ()
        if granularity == "channel":
            return self.channels
        if len(self.channels) < 2:
            raise ConfigError(
                f"cache {name!r} of rank {self.rank} has no axis of heads; choose granularity "
                "'tensor' or 'channel' for it"
            )
        return self.channels[:-1]


def check_granularity(what: str, granularity: str) -> None:
    """Refuse an unknown granularity.

    Raises:
        ConfigError: it is none of them.
    """
    if granularity not in GRANULARITIES:
        raise ConfigError(f"{what}={granularity!r}: choose one of {GRANULARITIES}")
