"""Cross-layer equalization: channels scaled so that rounding costs least, all else the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from tqdm import tqdm

from qwrap.errors import ConfigError
from qwrap.graph.clips import bounded_clips, open_clips
from qwrap.graph.constants import Constants
from qwrap.graph.divisible import Divisible, divide_classes
from qwrap.graph.index import OnnxGraph
from qwrap.graph.passing import find_divisible
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.held_out import float_model
from qwrap.quant.edit import fixed_values
from qwrap.quant.equivalent import change_equivalently, left_out
from qwrap.quant.noise import Noise
from qwrap.quant.outcome import Outcome
from qwrap.quant.prepare import device_of, plan_of
from qwrap.quant.sizes import equal_ranges, range_ratio, sizes_of
from qwrap.quant.trial import Inputs, split

NAME = "cross-layer equalization"
Balance = Literal["noise", "ranges"]
Clipped = Literal["keep", "relu", "min"]
ROUNDS, TOLERANCE = 20, 1e-3  # of "ranges", where "noise" starts from its factors
STANDS_STILL = 1e-3  # logarithm of a factor that counts as none


def equalize(
    model: WrappedModel,
    batches: Iterable[Any],
    *,
    balance: Balance = "noise",
    clipped: Clipped = "keep",
    iterations: int = 150,
    tolerance: float = 1e-4,
    progress: bool = True,
) -> Outcome:
    """Divide channels, and multiply the weights that they go into, in place, if that helps.

    Between two layers each channel may be divided by any positive number, as long as what makes it
    and all that takes it change alike: through Relu and its like, pools, moves, residual adds and
    concatenations, from Conv, ConvTranspose, Gemm and MatMul into such. The float model computes
    what it did; its weights, and the ranges of its tensors, are other ones.

    The float graph of the model gets the new weights too; a parameter that was trained or rounded
    since is scaled as well. If the model is calibrated, it is calibrated again, with ``batches``,
    and the change is kept only if the outputs for half of them come closer to the float ones: give
    what it was calibrated with. One that is only prepared keeps any change that leaves the float
    outputs as they are, to 1e-5 of their norm.

    Left alone, each with its reason in the outcome, are graph outputs and what leads to them,
    weights that are read elsewhere too, tensors and weights with a range that the user gave, and
    what anything reads that does not pass factors on.

    Args:
        model: prepared; calibrated or not.
        batches: as for ``calibrate``; held in memory.
        balance: by what to choose the factors. "noise": the least sum of what rounding tensors and
            weights adds to the layers' outputs, as far as ranges and mean squares tell, for the
            types the model was prepared for. "ranges": weights that make a channel as large as
            those that take it, as in the paper, meant for weights with one scale.
        clipped: what to do with a Clip from 0 to an upper bound, which passes no factors on. "keep"
            it; make it a "relu" if no value of ``batches`` reaches the bound, which changes the
            float function for data that does; or give each channel a bound of its own in a "min",
            which is exact but one more node in float: layers around it may then not pay in
            integers either, and part of the gain is theirs (``plan.summary()`` says which).
        iterations: steps, or rounds over all layers for "ranges", at most.
        tolerance: change of a factor, as a share of it, with which "ranges" stops.
        progress: show a bar on a terminal.

    Returns:
        Whether it was kept, and what was left out.

    Raises:
        ConfigError: the model is not prepared, or a setting is none of these.
        InputError: there are no batches, or one does not fit.

    Source: Nagel et al., arXiv:1906.04721, section 4.1; for "noise", Widrow's model of rounding.
    """
    for name, value, choices in (("balance", balance, Balance), ("clipped", clipped, Clipped)):
        if value not in get_args(choices):
            raise ConfigError(f"{name}={value!r}: choose from {list(get_args(choices))}")
    if iterations < 1 or not tolerance > 0:
        raise ConfigError(
            f"iterations={iterations}, tolerance={tolerance}: give 1 or more, and a number above 0"
        )
    plan_of(model)
    teaching, deciding = split(model, batches)
    data = teaching if deciding is teaching else [*teaching, *deciding]
    problem = _Problem(model, clipped, data)
    if not problem.divisible.count:
        lines = ["no channels can be scaled", *left_out(problem.divisible)]
        return change_equivalently(model, NAME, data, deciding, None, lines)
    if balance == "noise":
        factors = problem.least_noise(teaching, iterations, progress=progress)
    else:
        factors = problem.equal_ranges(iterations, tolerance)
    return change_equivalently(
        model,
        NAME,
        data,
        deciding,
        lambda draft: problem.apply(draft, factors),
        problem.lines(factors),
        rewires=bool(problem.opened),
    )


class _Problem:
    """What can be divided in a model, after the Clips that were asked for are opened.

    Attributes:
        opened: keys of these Clips.
        divisible: what can be divided then.
    """

    def __init__(self, model: WrappedModel, clipped: Clipped, data: Sequence[Inputs]) -> None:
        self._model, self._fixed = model, fixed_values(model)
        self._bound: Literal["drop", "channels"] = "drop" if clipped == "relu" else "channels"
        self.opened: list[str] = []
        self._graph = model.graph
        if clipped != "keep" and not model.replaced:
            self._open(data)
        self.divisible = self._find(self._graph)
        self._layers = sizes_of(Constants(self._graph.model), self.divisible)

    def _open(self, data: Sequence[Inputs]) -> None:
        """Open those Clips that let something be divided; dropping a bound needs data below it."""
        graph = self._graph
        bounds = bounded_clips(graph)
        if self._bound == "drop":
            bounds = _not_reached(self._model, bounds, data)
        trial = self._opened(list(bounds))
        free = {
            trial.key(value)
            for value, place in self._find(trial).places.items()
            if (place >= 0).any()
        }
        self.opened = [k for k in bounds if graph.key(graph.nodes[k].outputs[0]) in free]
        self._graph = self._opened(self.opened) if self.opened else graph

    def _opened(self, keys: Sequence[str]) -> OnnxGraph:
        draft = self._model.graph.model.clone()
        open_clips(draft, keys, bound=self._bound)
        return OnnxGraph(draft)

    def _find(self, graph: OnnxGraph) -> Divisible:
        values = graph.values
        fixed = {values[key]: why for key, why in self._fixed.items() if key in values}
        return find_divisible(graph.model, fixed)

    def least_noise(self, data: Sequence[Inputs], iterations: int, *, progress: bool) -> Tensor:
        """Return the factors that rounding costs least with."""
        reference = float_model(self._model)
        if self.opened:
            reference = WrappedModel(self._graph, self._model.layout.settings).eval()
            reference.to(device_of(self._model))
        noise = Noise(self._model, self._graph, self.divisible)
        noise.observe(data, reference)
        start = self.equal_ranges(ROUNDS, TOLERANCE)
        off = None if progress else True  # None: where there is no terminal
        with tqdm(desc="equalizing", total=iterations, unit="step", disable=off) as bar:
            return noise.least(start, iterations=iterations, progress=bar.update)

    def equal_ranges(self, iterations: int, tolerance: float) -> Tensor:
        """Return the factors of the paper."""
        return equal_ranges(
            self._layers, self.divisible, iterations=iterations, tolerance=tolerance
        )

    def apply(self, draft: ir.Model, factors: Tensor) -> None:
        """Open the Clips, and divide channels, in place."""
        if self.opened:
            open_clips(draft, self.opened, bound=self._bound)
        divisible = self._find(OnnxGraph(draft))
        divide_classes(Constants(draft), divisible, factors.double().numpy())

    def lines(self, factors: Tensor) -> list[str]:
        """Return what is done, and what is left out."""
        by = np.append((factors.log().abs() > STANDS_STILL).numpy(), False)
        runs = [run for run in self.divisible.runs if by[run].any()]
        before = range_ratio(self._layers, torch.ones_like(factors))
        found = [
            f"{len(runs)} of {len(self.divisible.runs)} tensors scaled by channel",
            f"largest over median range of a weight's outputs, on average, {before:.3g} to "
            f"{range_ratio(self._layers, factors):.3g}",
        ]
        if self.opened:
            how = "without its bound" if self._bound == "drop" else "with a bound for each channel"
            found.append(f"{len(self.opened)} Clips became a Relu {how}")
        return found + left_out(self.divisible)


def _not_reached(
    model: WrappedModel, bounds: dict[str, float], data: Sequence[Inputs]
) -> dict[str, float]:
    """Return those Clips whose input stays below their bound in all of the data."""
    graph, below = model.graph, dict(bounds)

    def see(keys: Sequence[str], x: Tensor) -> None:
        for key in keys:
            if key in below and x.numel() and float(x.max()) >= below[key]:
                del below[key]

    readers = defaultdict(list)
    for key in bounds:
        value = graph.nodes[key].inputs[0]
        assert value is not None
        readers[graph.key(value)].append(key)
    reference = float_model(model)
    watchers = {value: partial(see, keys) for value, keys in readers.items()}
    with torch.no_grad(), reference.watching(watchers):
        for inputs in data:
            reference(**inputs)
    return below
