"""What the data shows of the inputs of weights: group after group, each gone before the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from torch import Tensor

from qwrap.errors import InputError
from qwrap.model.points import UsePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.nbits.cuts import Cuts
from qwrap.nbits.prefix import Fixed, Prefix
from qwrap.nbits.statistics import InputStatistics
from qwrap.quant.unfold import Unfold

HELD = 8  # one batch in so many teaches nothing, and judges
JUDGES = 2048  # rows of those that are looked at, at most


@dataclass(frozen=True, slots=True)
class Product:
    """A node that multiplies its input with a constant matrix.

    Attributes:
        node: of the model that is to be quantized.
        point: of its weight, in the graph that runs.
        input: key of its input there.
        weight: what is equal for two nodes that are to get the same codes.
        unfold: how its input falls into rows; equal for nodes with an equal ``weight``.
    """

    node: ir.Node
    point: UsePoint
    input: str
    weight: object
    unfold: Unfold


@dataclass(slots=True)
class Held:
    """Rows that judge: inputs as they are, and what they would be without quantization.

    Attributes:
        seen: ``[G, P, K]`` of each batch.
        exact: the same; without an exact prefix, ``seen`` itself.
    """

    seen: list[Tensor] = field(default_factory=list)
    exact: list[Tensor] = field(default_factory=list)

    def add(self, unfold: Unfold, x: Tensor, exact: Tensor | None, most: int) -> None:
        """Take some rows of a batch, evenly spread."""
        for rows, given in ((self.seen, x), (self.exact, x if exact is None else exact)):
            if given.numel():
                found = unfold.rows(given)
                step = -(-found.shape[1] // most)
                rows.append(found[:, ::step].float())


@dataclass(slots=True)
class Lesson:
    """What is known of the inputs of one weight.

    Attributes:
        taught: sums over the rows that teach.
        held: the rows that judge.
    """

    taught: InputStatistics
    held: Held

    @classmethod
    def of(cls, unfold: Unfold) -> Lesson:
        """Return an empty one."""
        return cls(InputStatistics(None if unfold == Unfold() else unfold), Held())


def lessons(
    model: WrappedModel,
    products: Sequence[Product],
    batches: Sequence[Mapping[str, Any]],
    streams: Streams,
) -> Iterator[tuple[list[Product], dict[object, Lesson]]]:
    """Yield nodes that share inputs or weights, and the lesson of each weight, in graph order.

    What the caller fixes in ``streams`` before it asks for more is what later inputs come through.

    Args:
        model: float.
        products: of its nodes.
        batches: its inputs by name; every eighth judges, one alone does both.
        streams: the runs over the data.

    Raises:
        InputError: a tensor holds what is not finite.
    """
    cuts, parts = streams.cuts, _Parts.of(len(batches))
    for group in sorted(_groups(products), key=lambda each: _first(model, cuts, each)):
        first, last = _first(model, cuts, group), _last(model, cuts, group)
        sources = _sources(group)
        made = {source: Lesson.of(source[0][1]) for source in sources.values()}
        keys = list(dict.fromkeys(p.input for p in group))
        streams.advance(first)
        for i, (seen, exact) in enumerate(streams.look(keys, last + 1)):
            for source, lesson in made.items():
                for key, unfold in source:
                    for x, y in zip(seen[key], exact[key], strict=True):
                        parts.take(lesson, key, unfold, i, x, y)
        taught = {w: made[source] for w, source in sources.items() if made[source].taught.rows}
        yield group, taught


Source = tuple[tuple[str, Unfold], ...]


def _sources(group: Sequence[Product]) -> dict[object, Source]:
    """Return what each weight is multiplied with; weights that read the same learn together."""
    sources: dict[object, dict[tuple[str, Unfold], None]] = {}
    for product in group:
        sources.setdefault(product.weight, {})[product.input, product.unfold] = None
    return {weight: tuple(each) for weight, each in sources.items()}


@dataclass(frozen=True, slots=True)
class _Parts:
    """Which batches teach, which judge, and how many rows of one of those do."""

    judges: frozenset[int]
    alone: bool
    most: int

    @classmethod
    def of(cls, count: int) -> _Parts:
        """Return them: the last of every eight judges, or else the last; one does both."""
        judges = frozenset(range(HELD - 1, count, HELD)) or frozenset({count - 1})
        return cls(judges, count == 1, max(1, JUDGES // len(judges)))

    def take(
        self, lesson: Lesson, key: str, unfold: Unfold, batch: int, x: Tensor, y: Tensor | None
    ) -> None:
        """Add what is read in a batch to a lesson, in place."""
        if self.alone or batch not in self.judges:
            try:
                lesson.taught.add(x, y)
            except InputError as error:
                raise InputError(f"tensor {key!r}: {error}") from error
        if batch in self.judges:
            lesson.held.add(unfold, x, y, self.most)


def _groups(products: Sequence[Product]) -> list[list[Product]]:
    """Return products by what hangs together through inputs or weights."""
    parent: dict[object, object] = {}

    def root(key: object) -> object:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for product in products:
        parent[root(("input", product.input))] = root(("weight", product.weight))
    groups: dict[object, list[Product]] = {}
    for product in products:
        groups.setdefault(root(("input", product.input)), []).append(product)
    return list(groups.values())


def _first(model: WrappedModel, cuts: Cuts, group: Sequence[Product]) -> int:
    return min(cuts.place(model.graph.nodes[p.point.node]) for p in group)


def _last(model: WrappedModel, cuts: Cuts, group: Sequence[Product]) -> int:
    return max(cuts.place(model.graph.nodes[p.point.node]) for p in group)


class Streams:
    """A run of the float model, of the one that is being quantized, or of both side by side.

    Args:
        model: float.
        batches: its inputs by name.
        sequential: whether there is one of the quantized model.
        exact: whether there is one of the float model beside it; without the other there is.
        memory: bytes of tensors between cuts that each keeps in memory; None: all.

    Attributes:
        cuts: of the model's graph.
    """

    def __init__(
        self,
        model: WrappedModel,
        batches: Sequence[Mapping[str, Any]],
        *,
        sequential: bool = False,
        exact: bool = False,
        memory: int | None = None,
    ) -> None:
        self.cuts = Cuts(model.graph)
        self._own = Prefix(model, self.cuts, batches, memory)
        self._sequential = sequential
        both = sequential and exact
        self._exact = Prefix(model, self.cuts, batches, memory) if both else None

    def advance(self, place: int) -> None:
        """Move on to a cut, in place."""
        for stream in (self._own, self._exact):
            if stream is not None and stream.place < place:
                stream.advance(place)

    def look(
        self, keys: Sequence[str], place: int
    ) -> Iterator[tuple[dict[str, list[Tensor]], dict[str, list[Tensor | None]]]]:
        """Yield what tensors are for each batch, and what they were without quantization."""
        own = self._own.look(keys, place)
        if self._exact is None:
            for seen in own:
                yield seen, {key: [None] * len(found) for key, found in seen.items()}
            return
        for seen, exact in zip(own, self._exact.look(keys, place), strict=True):
            yield seen, {key: _beside(found, exact[key]) for key, found in seen.items()}

    def fix(self, fixed: Fixed) -> None:
        """Let nodes read other weights from now on, where a quantized model runs, in place."""
        if self._sequential:
            self._own.fixed.update(fixed)


def _beside(seen: Sequence[Tensor], exact: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the exact ones, None for those of a loop that has run otherwise."""
    if [x.shape for x in seen] != [x.shape for x in exact]:
        return [None] * len(seen)
    return list(exact)
