"""The programs of a wrapped model, ready to run side by side."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from qwrap.model.block import Block
from qwrap.model.points import Point, Program, ValuePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.verify.qdq_file import QuantizedTensor
from qwrap.verify.session import Array
from qwrap.verify.tally import TensorTally

Taps = dict[Point, Callable[[Tensor], Tensor]]


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
        *,
        isolated: bool = False,
    ) -> None:
        """Make ``program`` of ``model`` runnable until ``stack`` closes; ``tallies`` watch it.

        With ``isolated``, what goes on from a watched tensor is onnxruntime's value of it.
        """
        self._codes: Mapping[str, Array] = {}
        by_name: dict[str, list[TensorTally]] = defaultdict(list)
        for tally in tallies:
            if not tally.tensor.points:
                by_name[tally.tensor.name].append(tally)
        self._model = _sharing_copy(model).eval()
        program = replace(program, taps=self._own(program.taps))
        taps: Taps = dict(program.taps)
        for tally in tallies:
            if tally.tensor.points:
                taps |= self._converted(tally, program, isolated=isolated)
        if isolated:
            for name, found in by_name.items():
                point = ValuePoint(name)
                taps[point] = self._tapped(point, found, program, found[0].tensor)
            program = replace(program, taps=taps)
        else:
            watchers = {name: partial(self._compare, found) for name, found in by_name.items()}
            program = replace(program, taps=taps, watchers={**program.watchers, **watchers})
        stack.enter_context(self._model.running(program))

    def _own(self, taps: Mapping[Point, Callable[[Tensor], Tensor]]) -> Taps:
        """Return the modules of the copy, which is in evaluation mode, for those of the model."""
        own = dict(taps)
        for point in self._model.attached:
            if isinstance(own.get(point), nn.Module):
                own[point] = self._model.tap(point)
        return own

    def _converted(self, tally: TensorTally, program: Program, *, isolated: bool) -> Taps:
        """Return the taps of what is converted for some readers; compared at the first of these."""
        points = [point for point in tally.tensor.points if point in program.taps]
        instead = tally.tensor if isolated else None
        return {
            point: self._tapped(point, () if i else (tally,), program, instead)
            for i, point in enumerate(points)
        }

    def _compare(self, tallies: Sequence[TensorTally], value: Tensor) -> None:
        for tally in tallies:
            tally.add(value, self._codes[tally.tensor.returned])

    def _tapped(
        self,
        point: Point,
        tallies: Sequence[TensorTally],
        program: Program,
        instead: QuantizedTensor | None,
    ) -> Callable[[Tensor], Tensor]:
        """Return a tap that compares what the tap of ``program`` returns.

        With ``instead``, what goes on is onnxruntime's value of that tensor.
        """
        tap = program.taps.get(point)

        def compared(value: Tensor) -> Tensor:
            simulated = value if tap is None else tap(value)
            self._compare(tallies, simulated)
            if instead is None:
                return simulated
            return instead.dequantize(self._codes[instead.returned]).to(simulated)

        return compared

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
