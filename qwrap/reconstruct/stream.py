"""Samples on their way through the units of a model, float and quantized side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from qwrap.model.part import part_of
from qwrap.model.wrapped import WrappedModel
from qwrap.reconstruct.samples import Samples
from qwrap.reconstruct.units import Unit

HELD = 8  # every so many samples one is held back
Values = dict[str, dict[int, Any]]
"""Activation -> sample -> value."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples for one unit, side by side.

    Attributes:
        size: how many they are.
        quantized: what goes into its part, behind the quantized units before.
        floats: the same in float, if the stream has ``both``.
        targets: what the float model makes of them: the outputs of the unit.
    """

    size: int
    quantized: list[Any]
    floats: list[Any]
    targets: list[Any]


class Stream:
    """Holds what is alive between two units, of as many samples as fit.

    Each sample goes through each unit once, in float and behind the quantized units before.
    Where activations are large there may be room for few samples: those that leave do not come
    back, and others, which find room only later, go through all units before in one go then.

    Args:
        model: calibrated; units change it in place.
        reference: the float model.
        units: of the model, in order.
        samples: graph inputs.
        memory: bytes that the activations held may take.
        both: whether units train on float inputs too.
    """

    def __init__(
        self,
        model: WrappedModel,
        reference: WrappedModel,
        units: Sequence[Unit],
        samples: Samples,
        memory: int,
        *,
        both: bool = False,
    ) -> None:
        self._model, self._reference = model, reference
        self._samples, self._memory, self._both = samples, memory, both
        self._next = {a: b.alive for a, b in pairwise(units)}
        self._ids: list[int] = []
        self._started = 0
        self._fewest = len(samples.rows)
        self._quantized: Values = {}
        self._float: Values = {}

    @property
    def learning(self) -> list[int]:
        """The samples here that units learn from; a single one also decides."""
        held = set(self.deciding)
        return [i for i in self._ids if i not in held] or self._ids

    @property
    def deciding(self) -> list[int]:
        """The samples here that are held back, at least one."""
        return [i for i in self._ids if i % HELD == 0] or self._ids[-1:]

    @property
    def notes(self) -> list[str]:
        """What to tell of the samples, one line each."""
        total = len(self._samples.rows)
        few = f"as few as {self._fewest} of {total} samples at a time, for they take much memory"
        return [few] if self._fewest < total else []

    @torch.no_grad()
    def enter(self, unit: Unit) -> None:
        """Let the samples stand before ``unit``, with what it should make of them."""
        room = max(self._memory // max(self._bytes(unit), 1), 2)
        for values in (*self._quantized.values(), *self._float.values()):
            for i in self._ids[room:]:
                del values[i]
        stop = min(self._started + room - len(self._ids[:room]), len(self._samples.rows))
        new = list(range(self._started, stop))
        self._ids, self._started = [*self._ids[:room], *new], stop
        self._fewest = min(self._fewest, len(self._ids))
        if new and unit.alive:
            keys = sorted(unit.alive)
            for model, side in ((self._model, self._quantized), (self._reference, self._float)):
                self._run(part_of(model, [], keys, shared=True), keys, side, new)
        outputs = unit.outputs
        part = part_of(self._reference, unit.inputs, outputs, shared=True)
        self._run(part, outputs, self._float, self._ids)
        if not self._both:
            self._keep(self._float, {*outputs, *self._next.get(unit, ())})

    @torch.no_grad()
    def leave(self, unit: Unit) -> None:
        """Let the samples go through ``unit`` as it is now."""
        alive = self._next.get(unit)
        if alive:
            part = part_of(self._model, unit.inputs, unit.outputs, shared=True)
            self._run(part, unit.outputs, self._quantized, self._ids)
            self._keep(self._quantized, alive)
            self._keep(self._float, alive)

    def batches(self, unit: Unit, names: Sequence[str], ids: Iterable[int]) -> Iterator[Batch]:
        """Yield samples in batches of equal shapes.

        Args:
            unit: the one that was entered.
            names: of the values that go into its part.
            ids: which samples.
        """
        for some in self._groups(self._quantized, names, ids):
            quantized = self._inputs(self._quantized, names, some)
            floats = self._inputs(self._float, names, some) if self._both else quantized
            targets = [self._joined(self._float, key, some) for key in unit.outputs]
            yield Batch(len(some), quantized, floats, targets)

    # --- values --------------------------------------------------------------------------------

    def _bytes(self, unit: Unit) -> int:
        sizes = self._samples.sizes
        return 2 * sum(sizes[key] for key in unit.alive | {*unit.outputs})

    def _run(
        self, part: WrappedModel, outputs: Sequence[str], values: Values, ids: Sequence[int]
    ) -> None:
        """Let samples go through ``part``, in place of ``values``."""
        names = part.input_names
        for key in outputs:
            values.setdefault(key, {})
        for some in self._groups(values, names, ids):
            found = part(*self._inputs(values, names, some))
            made = found if isinstance(found, tuple) else (found,)
            for key, value in zip(outputs, made, strict=True):
                pieces = self._samples.cut(key, value, len(some))
                values[key].update(zip(some, pieces, strict=True))

    def _groups(self, values: Values, names: Iterable[str], ids: Iterable[int]) -> list[list[int]]:
        given = {name: values[name] for name in names if name in values}
        return self._samples.groups(ids, given)

    def _inputs(self, values: Values, names: Iterable[str], ids: Sequence[int]) -> list[Any]:
        return [
            self._joined(values, name, ids) if name in values else self._samples.inputs(name, ids)
            for name in names
        ]

    def _joined(self, values: Values, key: str, ids: Sequence[int]) -> Any:
        return self._samples.join(key, [values[key][i] for i in ids])

    @staticmethod
    def _keep(values: Values, keys: Iterable[str]) -> None:
        kept = set(keys)
        for key in [key for key in values if key not in kept]:
            del values[key]
