"""The programs of a wrapped model, ready to run side by side."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from qwrap.model.block import Block
from qwrap.model.points import Program
from qwrap.model.wrapped import WrappedModel
from qwrap.verify.session import Array
from qwrap.verify.tally import TensorTally


class Simulation:
    """One program of a model, in evaluation mode, on tensors shared with the model.

    Works on a copy of the module tree, so that neither the program nor the mode of the user's
    model changes, and none of its code is generated anew for every batch.
    """

    def __init__(
        self,
        model: WrappedModel,
        program: Program,
        stack: ExitStack,
        tallies: Sequence[TensorTally] = (),
    ) -> None:
        """Make ``program`` of ``model`` runnable until ``stack`` closes; ``tallies`` watch it."""
        self._codes: Mapping[str, Array] = {}
        by_name: dict[str, list[TensorTally]] = defaultdict(list)
        for tally in tallies:
            by_name[tally.tensor.name].append(tally)
        self._model = _sharing_copy(model).eval()
        stack.enter_context(self._model.running(program))
        stack.enter_context(
            self._model.watching({n: self._watcher(found) for n, found in by_name.items()})
        )

    def _watcher(self, tallies: Sequence[TensorTally]) -> Callable[[Tensor], None]:
        return partial(self._compare, tallies)

    def _compare(self, tallies: Iterable[TensorTally], value: Tensor) -> None:
        for tally in tallies:
            tally.add(value, self._codes[tally.tensor.codes])

    def run(
        self, inputs: Mapping[str, Tensor], codes: Mapping[str, Array] | None = None
    ) -> dict[str, Tensor]:
        """Return the graph outputs by name; compare what is watched with ``codes``, by name."""
        self._codes = codes or {}
        with torch.no_grad():
            result = self._model(*(inputs[name] for name in self._model.input_names))
        self._codes = {}
        outputs = result if isinstance(result, tuple) else (result,)
        return dict(zip(self._model.output_names, outputs, strict=True))


def training_form(model: WrappedModel) -> Program:
    """Return the program of the operators with every attached tap."""
    return Program(taps={point: model.tap(point) for point in model.attached})


def _sharing_copy(model: WrappedModel) -> WrappedModel:
    """Return a copy of the modules with the tensors, and the names that the code uses, shared."""
    shared: list[object] = [*chain(model.parameters(), model.buffers()), model.programs]
    shared += [block.namespace for block in model.modules() if isinstance(block, Block)]
    return copy.deepcopy(model, {id(item): item for item in shared})
