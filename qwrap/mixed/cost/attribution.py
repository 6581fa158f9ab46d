"""Whose work each kernel of a profile is: that of a group, or of a border between groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from qwrap.mixed.cost.owners import Border
from qwrap.mixed.cost.profiling import Kernel
from qwrap.mixed.cost.trial import Trial

_CONVERTING = frozenset({
    *("Cast", "DequantizeLinear", "QuantizeLinear", "ReorderInput", "ReorderOutput", "Transpose"),
    "Max",  # keeps an operator apart from the DequantizeLinear in front of it
})
"""Operators that bring a tensor into another type or layout, unless they are the model's own."""


@dataclass(slots=True)
class Share:
    """Time of several kernels."""

    seconds: float = 0.0
    kernels: int = 0

    def add(self, kernel: Kernel) -> None:
        """Count one more, in place."""
        self.seconds += kernel.seconds
        self.kernels += 1


@dataclass(slots=True)
class Attribution:
    """The kernels of one file, each in exactly one place.

    Attributes:
        groups: name of a group -> its own kernels, and conversions inside of it.
        borders: tensor between groups -> its conversions, and what only moves it.
        rest: what belongs to no group.
    """

    groups: dict[str, Share] = field(default_factory=lambda: defaultdict(Share))
    borders: dict[str, Share] = field(default_factory=lambda: defaultdict(Share))
    rest: Share = field(default_factory=Share)

    @property
    def shares(self) -> list[Share]:
        """All of them."""
        return [*self.groups.values(), *self.borders.values(), self.rest]


def attribute(trial: Trial, kernels: Sequence[Kernel]) -> Attribution:
    """Return whose work the kernels of one file are."""
    return _Attributing(trial, kernels).found


class _Attributing:
    def __init__(self, trial: Trial, kernels: Sequence[Kernel]) -> None:
        self.trial, self.kernels = trial, kernels
        self.borders: dict[str | None, list[Border]] = defaultdict(list)
        for border in trial.owners.borders:
            self.borders[border.producer].append(border)
        self.maker = {name: i for i, kernel in enumerate(kernels) for name in kernel.outputs}
        self.readers: dict[str, list[int]] = defaultdict(list)
        for i, kernel in enumerate(kernels):
            for name in kernel.inputs:
                self.readers[name].append(i)
        self.keys = [self._key(kernel) for kernel in kernels]
        self.converting = [
            key in trial.owners.moving or (key is None and kernel.op_type in _CONVERTING)
            for key, kernel in zip(self.keys, kernels, strict=True)
        ]
        self.owner = [self._owner(i) for i in range(len(kernels))]
        self.found = Attribution()
        for i, kernel in enumerate(kernels):
            self._share(i).add(kernel)

    def _key(self, kernel: Kernel) -> str | None:
        """Return the node of the model that a kernel was made from, None for none."""
        number = self.trial.number(kernel.name, *kernel.outputs)
        if number is None:
            return None
        if kernel.op_type in _CONVERTING and self.trial.operators[number] != kernel.op_type:
            return None  # named after the tensor that it converts
        return self.trial.keys[number]

    def _owner(self, i: int) -> str | None:
        """Return the group of a kernel that computes, from its neighbours if it has no name."""
        key = self.keys[i]
        if key is not None or self.converting[i]:
            return self.trial.owners.of.get(key or "")
        near = [*self._above(i), *self._below(i)]
        return next((self.trial.owners.of.get(self.keys[j] or "") for j in near), None)

    def _share(self, i: int) -> Share:
        owner = self.owner[i] if not self.converting[i] else self._converter_of(i)
        if isinstance(owner, Border):
            return self.found.borders[owner.tensor]
        return self.found.rest if owner is None else self.found.groups[owner]

    def _converter_of(self, i: int) -> str | Border | None:
        """Return the group inside of which a conversion or move is, or the border it is on."""
        above = next(self._above(i), None)
        source = None if above is None else self.owner[above]
        below = list(dict.fromkeys(self.owner[j] for j in self._below(i)))
        if above is None and not self._is_activation(i):
            return next((owner for owner in below if owner is not None), None)
        if self._leaves(i):
            below.append(None)
        if all(owner == source for owner in below):
            return source
        key = None if above is None else self.keys[above]
        border = self._matching(source, key, below)
        if border is not None:
            return border
        return source if source is not None else next(filter(None, below), None)

    def _matching(
        self, source: str | None, key: str | None, below: Iterable[str | None]
    ) -> Border | None:
        """Return the border that fits producer and readers best."""
        wanted = set(below) - {source}

        def fit(border: Border) -> tuple[int, bool]:
            return len(wanted & set(border.consumers)), border.source == key

        best = max(self.borders[source], key=fit, default=None)
        return best if best is not None and fit(best)[0] else None

    # --- along the graph -------------------------------------------------------------------------

    def _above(self, i: int) -> Iterator[int]:
        """Yield the kernels that computed what a kernel reads, conversions passed over."""
        yield from self._beyond(i, self._makers)

    def _below(self, i: int) -> Iterator[int]:
        """Yield the kernels that compute with what a kernel makes, conversions passed over."""
        yield from self._beyond(i, self._users)

    def _beyond(self, i: int, step: Callable[[int], list[int]]) -> Iterator[int]:
        """Yield the next kernels that compute, in the order of ``step``, each once."""
        open_, seen = step(i)[::-1], {i}
        while open_:
            j = open_.pop()
            if j in seen:
                continue
            seen.add(j)
            if self.converting[j] or self.keys[j] is None:
                open_.extend(step(j)[::-1])
            else:
                yield j

    def _makers(self, i: int) -> list[int]:
        return [self.maker[name] for name in self.kernels[i].inputs if name in self.maker]

    def _users(self, i: int) -> list[int]:
        return [j for name in self.kernels[i].outputs for j in self.readers[name]]

    def _is_activation(self, i: int) -> bool:
        """Whether what a kernel reads comes from a graph input, and not from constants alone."""
        open_, seen = [i], {i}
        while open_:
            for name in self.kernels[open_.pop()].inputs:
                if name not in self.maker:
                    return True
                if self.maker[name] not in seen:
                    seen.add(self.maker[name])
                    open_.append(self.maker[name])
        return False

    def _leaves(self, i: int) -> bool:
        """Whether what a kernel makes is read by nothing: it is a graph output then."""
        open_, seen = [i], {i}
        while open_:
            j = open_.pop()
            if any(not self.readers[name] for name in self.kernels[j].outputs):
                return True
            on = [k for k in self._users(j) if self.converting[k] and k not in seen]
            seen.update(on)
            open_ += on
        return False
