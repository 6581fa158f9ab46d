"""A model that runs over all of the data bit by bit, so that its rest can still change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwrap.model.part import part_of
from qwrap.model.points import UsePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.nbits.cuts import Cuts
from qwrap.nbits.shelf import Shelf

Fixed = Mapping[UsePoint, Callable[[], Tensor]]
Seen = dict[str, list[Tensor]]


class Prefix:
    """What crosses one cut of a graph, for every batch; the cut moves on through the graph.

    No node runs twice, and of what was computed only what is read later stays.

    Args:
        model: float; not modified.
        cuts: of its graph.
        batches: its inputs by name.
        memory: see ``Shelf``.

    Attributes:
        place: of the cut.
        fixed: what a node reads instead of its weight, from now on; made when it is needed.
    """

    def __init__(
        self,
        model: WrappedModel,
        cuts: Cuts,
        batches: Sequence[Mapping[str, Any]],
        memory: int | None = None,
    ) -> None:
        self.place, self.fixed = 0, dict[UsePoint, Callable[[], Tensor]]()
        self._model, self._cuts, self._count = model, cuts, len(batches)
        self._shelf, self._keys = Shelf(memory), cuts.crossing(0)
        for i, batch in enumerate(batches):
            for key in self._keys:
                self._shelf.put(i, key, batch[key])

    def advance(self, place: int) -> None:
        """Move the cut on, in place."""
        keys = self._cuts.crossing(place)
        if new := [key for key in keys if key not in self._keys]:
            part = self._part(new)
            for i in range(self._count):
                for key, value in self._run(part, i, new).items():
                    self._shelf.put(i, key, value)
        for key in set(self._keys) - set(keys):
            for i in range(self._count):
                self._shelf.drop(i, key)
        self.place, self._keys = place, keys
        gone = [p for p in self.fixed if self._cuts.place(self._model.graph.nodes[p.node]) < place]
        for point in gone:
            del self.fixed[point]

    def look(self, keys: Sequence[str], place: int) -> Iterator[Seen]:
        """Yield, for each batch, all that tensors are on the way to a cut; this one stays.

        Args:
            keys: of tensors that cross the cut, or are made between it and ``place``.
            place: not before the cut.
        """
        ahead = [key for key in keys if key not in self._keys]
        part = self._ahead(ahead, place) if ahead else None
        for i in range(self._count):
            seen: Seen = {key: [] for key in keys}
            for key in set(keys) - set(ahead):
                seen[key].append(self._shelf.get(i, key))
            if part is not None:
                watchers = {key: seen[key].append for key in ahead}
                with part.watching(watchers):
                    part(**self._inputs(i))
            yield seen

    def _ahead(self, keys: Sequence[str], place: int) -> WrappedModel:
        # Tensors of bodies are made where the nodes that hold them run, for whatever they make.
        outside = self._cuts.made_between(self.place, place)
        main = [key for key in keys if key in outside]
        return self._part(main if len(main) == len(keys) else outside)

    def _part(self, outputs: Sequence[str]) -> WrappedModel:
        part = part_of(self._model, self._keys, outputs, shared=False)
        nodes = part.graph.nodes
        part.attach({point: _Fixed(made()) for point, made in self.fixed.items()
                     if point.node in nodes})  # fmt: skip
        return part.eval()

    def _inputs(self, batch: int) -> dict[str, Any]:
        return {key: self._shelf.get(batch, key) for key in self._keys}

    @torch.no_grad()
    def _run(self, part: WrappedModel, batch: int, outputs: Sequence[str]) -> dict[str, Any]:
        found = part(**self._inputs(batch))
        return dict(zip(outputs, found if isinstance(found, tuple) else (found,), strict=True))


class _Fixed(nn.Module):
    """Gives one tensor for whatever it is called with."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values, persistent=False)

    def forward(self, _: Tensor) -> Tensor:
        """Return the tensor."""
        values = self.values
        assert isinstance(values, Tensor)
        return values
