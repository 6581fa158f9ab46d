"""What became of the caches of a decoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwrap.config import QuantSpec
from qwrap.errors import ConfigError
from qwrap.kv_cache.layout import Granularity, Layout
from qwrap.kv_cache.names import Role
from qwrap.kv_cache.way import Form


@dataclass(frozen=True, slots=True, eq=False)
class KVCache:
    """One cache, as it was quantized.

    Attributes:
        past: name of the graph input; None if the graph only makes the cache.
        present: name of the graph output; None if the graph only reads it.
        role: whether it holds keys or values, if that is known.
        spec: type and symmetry of its codes.
        layout: its axes.
        granularity: what has a scale of its own.
        form: how codes get from input to output.
        scale: float32 ``[C]``: in order of the axes along which scales differ.
        zero_point: int32 ``[C]``.
        sizes: of these axes, and behind them that of the packed one.
    """

    past: str | None
    present: str | None
    role: Role
    spec: QuantSpec
    layout: Layout
    granularity: Granularity
    form: Form
    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.int32]
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        """The graph input, or the output if there is none."""
        return self.past or self.present or ""


@dataclass(frozen=True, slots=True, eq=False)
class KVCaches:
    """All caches of a decoder; ``print`` shows them.

    Attributes:
        caches: in the order of the graph inputs.
    """

    caches: tuple[KVCache, ...]

    def __len__(self) -> int:
        return len(self.caches)

    def __getitem__(self, name: str) -> KVCache:
        """Return the cache with that graph input or output.

        Raises:
            ConfigError: there is none.
        """
        for cache in self.caches:
            if name in (cache.past, cache.present):
                return cache
        known = [cache.name for cache in self.caches]
        raise ConfigError(f"no cache has the graph input or output {name!r}; there are {known}")

    def __contains__(self, name: object) -> bool:
        return any(name in (cache.past, cache.present) for cache in self.caches)

    def summary(self) -> str:
        """Return a line for each cache."""
        lines = [
            f"{c.past or '-'} -> {c.present or '-'}  {c.role or 'keys and values'} {c.spec.dtype}, "
            f"{len(c.scale)} scale{'s' * (len(c.scale) > 1)} (per {c.granularity}), {c.form}"
            for c in self.caches
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()
