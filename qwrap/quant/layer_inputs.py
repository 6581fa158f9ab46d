"""What the weights of a quantized model are multiplied with, learnt from data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from tqdm import tqdm

from qwrap.model.wrapped import WrappedModel
from qwrap.quant.matrices import WeightMatrix
from qwrap.quant.row_moments import RowMoments
from qwrap.quant.trial import Inputs
from qwrap.quant.unfold import Unfold

ROOM = 2**27  # numbers in the matrices of one pass: half a gigabyte

Readers = tuple[WeightMatrix, ...]
"""One weight as each of the layers reads it that treat it alike."""

Source = tuple[tuple[str, Unfold], ...]
"""Which values rows are cut from, and how."""


def readers(matrices: Iterable[WeightMatrix]) -> list[Readers]:
    """Return the weights with all that read them alike: by the same rows, in the same type."""
    found: dict[tuple[Any, ...], list[WeightMatrix]] = {}
    for matrix in matrices:
        kind = matrix.node.op_type, matrix.is_turned, matrix.unfold.groups
        found.setdefault((matrix.value, matrix.stub.spec, *kind), []).append(matrix)
    return [tuple(group) for group in found.values()]


def source_of_rows(group: Readers) -> Source:
    """Return what the rows are cut from that a weight is multiplied with."""
    return tuple((matrix.input, matrix.unfold) for matrix in group)


def learn_inputs(
    model: WrappedModel, weights: Sequence[Readers], batches: Sequence[Inputs], *, progress: bool
) -> Iterator[tuple[Readers, RowMoments]]:
    """Yield every weight that runs with the moments of the rows that it is multiplied with.

    The data runs as often as memory demands, mostly once. What is changed in between, later weights
    learn with.

    Args:
        model: calibrated.
        weights: what to learn for.
        batches: graph input -> tensor.
        progress: show a bar on a terminal.
    """
    for together in _passes(weights):
        sources = [source_of_rows(group) for group in together]
        moments = {source: RowMoments() for source in sources}
        _run(model, moments, batches, progress=progress)
        for group, source in zip(together, sources, strict=True):
            if moments[source].count:
                yield group, moments[source]


def _passes(weights: Sequence[Readers]) -> Iterator[list[Readers]]:
    """Yield the weights whose moments fit into memory together."""
    room, together, seen = 0, list[Readers](), set[Source]()
    for group in weights:
        groups, inputs, _ = group[0].size
        size = 0 if source_of_rows(group) in seen else groups * inputs**2
        if together and room + size > ROOM:
            yield together
            room, together, seen = 0, [], set()
            size = groups * inputs**2
        room += size
        together.append(group)
        seen.add(source_of_rows(group))
    if together:
        yield together


def _run(
    model: WrappedModel,
    moments: dict[Source, RowMoments],
    batches: Sequence[Inputs],
    *,
    progress: bool,
) -> None:
    wanted: dict[str, dict[Unfold, list[RowMoments]]] = {}
    for source, found in moments.items():
        for value, unfold in source:
            wanted.setdefault(value, {}).setdefault(unfold, []).append(found)

    def learn(cuts: dict[Unfold, list[RowMoments]], x: Tensor) -> None:
        for unfold, learners in cuts.items():
            for each in learners:
                each.add(unfold.rows(x.float(), start=each.count))

    off = None if progress else True  # None: where there is no terminal
    with model.watching({value: partial(learn, cuts) for value, cuts in wanted.items()}):
        for inputs in tqdm(batches, desc="layer inputs", unit="batch", disable=off):
            model(**inputs)
