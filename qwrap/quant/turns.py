"""What layers are fed one after the other, behind changed ones, and what float makes of that."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from tqdm import tqdm

from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.held_out import float_model
from qwrap.quant.layer_inputs import Readers, Source, source_of_rows
from qwrap.quant.row_moments import RowMoments, TargetMoments
from qwrap.quant.trial import Inputs


def learn_in_turn(
    model: WrappedModel, weights: Sequence[Readers], batches: Sequence[Inputs], *, progress: bool
) -> Iterator[tuple[Readers, RowMoments, TargetMoments]]:
    """Yield weights in the order of the graph, each learnt of behind the ones yielded before.

    For every tensor that weights are multiplied with, the data runs up to there, in the float model
    and in this one.

    Args:
        model: calibrated.
        weights: what to learn for; those that never run are not yielded.
        batches: graph input -> tensor.
        progress: show a bar on a terminal.
    """
    place = {node: number for number, node in enumerate(model.layout.homes)}

    def position(group: Readers) -> tuple[int, str]:
        makers = [model.graph.values[matrix.input].producer() for matrix in group]
        # Hashes of text differ from run to run, its order does not.
        last = max(-1 if maker is None else place.get(maker, -1) for maker in makers)
        return last, str(source_of_rows(group))

    teacher = float_model(model)
    off = None if progress else True  # None: where there is no terminal
    with tqdm(total=len(weights), desc="layers in turn", unit="layer", disable=off) as bar:
        for _, found in groupby(sorted(weights, key=position), key=position):
            together = list(found)
            stage = _Stage(teacher, together)
            for inputs in batches:
                stage.run(model, teacher, inputs)
            if stage.rows.count:
                for group, targets in zip(together, stage.targets, strict=True):
                    yield group, stage.rows, targets
            bar.update(len(together))


class _Stage:
    """Weights that are multiplied with the same rows.

    Attributes:
        rows: moments of these.
        targets: for each weight.
    """

    def __init__(self, teacher: WrappedModel, together: Sequence[Readers]) -> None:
        self._source: Source = source_of_rows(together[0])
        self.rows = RowMoments()
        self.targets = [_targets(teacher, group, self.rows) for group in together]

    def run(self, model: WrappedModel, teacher: WrappedModel, inputs: Inputs) -> None:
        """Learn from one batch."""
        seen: dict[str, deque[Tensor]] = {value: deque() for value, _ in self._source}
        _run_to(teacher, {value: values.append for value, values in seen.items()}, inputs)
        watchers = {value: partial(self._learn, value, values) for value, values in seen.items()}
        _run_to(model, watchers, inputs)

    def _learn(self, value: str, wanted: deque[Tensor], x: Tensor) -> None:
        # In a loop that the float model left earlier, what is there has to do.
        target = wanted.popleft() if wanted and wanted[0].shape == x.shape else x
        for name, unfold in self._source:
            if name == value:
                start = self.rows.count
                centred = self.rows.add(unfold.rows(x.float(), start=start))
                rows = unfold.rows(target.float(), start=start)
                for targets in self.targets:
                    targets.add(centred, rows)


def _targets(teacher: WrappedModel, group: Readers, rows: RowMoments) -> TargetMoments:
    matrix, weight = group[0], teacher.stored(group[0].value)
    assert weight is not None
    # With several layers the bias of one is not that of all outputs.
    bias = None if matrix.bias is None or len(group) > 1 else teacher.stored(matrix.bias)
    return TargetMoments(matrix.columns(weight.detach().to(torch.float32)), rows, bias)


class _Seen(Exception):  # noqa: N818  # no error: what follows need not be computed
    pass


def _run_to(
    model: WrappedModel, watchers: Mapping[str, Callable[[Tensor], object]], inputs: Inputs
) -> None:
    """Run a batch until every watcher was called; to the end where one is in a body."""
    unseen, graph = set(watchers), model.graph
    makers = [graph.values[value].producer() for value in watchers]
    ends = all(maker is None or maker.graph is graph.model.graph for maker in makers)

    def seen(value: str, x: Tensor) -> None:
        watchers[value](x)
        unseen.discard(value)
        if ends and not unseen:
            raise _Seen

    with model.watching({value: partial(seen, value) for value in watchers}):
        try:
            model(**inputs)
        except _Seen:
            return
