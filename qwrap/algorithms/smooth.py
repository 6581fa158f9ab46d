"""SmoothQuant of a prepared model: what is hard to round in activations, moved into weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qwrap.errors import ConfigError
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
from qwrap.quant.prepare import plan_of
from qwrap.quant.sizes import FARTHEST, Sizes, groups_of, sizes_of
from qwrap.quant.trial import split

NAME = "SmoothQuant"
OPERATORS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.95)  # what "auto" chooses from, or nothing at all
LEAST = 1e-5  # of the largest weight, what counts as one


def smooth(
    model: WrappedModel,
    batches: Iterable[Any],
    *,
    alpha: float | Literal["auto"] = "auto",
    op_types: Collection[str] = ("MatMul", "Gemm"),
) -> Outcome:
    """Divide the channels of what layers read, and multiply their weights, in place, if that helps.

    Channel j is divided by ``max|X_j|**alpha / max|W_j|**(1 - alpha)``, over the data and over all
    weights that multiply it: a channel far larger than the others no longer decides on the scale
    of them all. What makes the channels is divided in exchange: a layer with a constant weight, or
    the gains of a normalisation, behind moves, attention heads, gates and whatever else passes
    factors on. Where nothing can be, the channels stay; ``qwrap.smooth_quant`` inserts a Mul there,
    before the model is prepared.

    The float graph of the model gets the new weights too. A calibrated model is calibrated again,
    with ``batches``, and the change is kept only if the outputs for half of them come closer to the
    float ones; one that is only prepared keeps any change that leaves the float outputs as they
    are, to 1e-5 of their norm.

    Args:
        model: prepared; calibrated or not.
        batches: as for ``calibrate``; held in memory.
        alpha: share of the difficulty that goes to the weights, from 0 to 1. "auto" chooses it for
            each tensor, from 0.3 to 0.95 or not at all, by the rounding noise it predicts for the
            types that the model was prepared for.
        op_types: operators whose inputs are divided: MatMul, Gemm, Conv, ConvTranspose.

    Returns:
        Whether it was kept, and what was left out.

    Raises:
        ConfigError: the model is not prepared, or a setting is none of these.
        InputError: there are no batches, or one does not fit.

    Source: Xiao et al., arXiv:2211.10438, equation 4.
    """
    if alpha != "auto" and not 0 <= alpha <= 1:
        raise ConfigError(f'alpha={alpha!r}: give a number from 0 to 1, or "auto"')
    if unknown := sorted(set(op_types) - set(OPERATORS)):
        raise ConfigError(f"op_types: {unknown}: choose from {list(OPERATORS)}")
    plan_of(model)
    teaching, deciding = split(model, batches)
    data = teaching if deciding is teaching else [*teaching, *deciding]
    fixed = fixed_values(model)
    divisible = _find(model.graph, fixed)
    smoothing = _Smoothing(model, divisible, op_types)
    if not smoothing.groups:
        lines = ["no channels can be smoothed", *left_out(divisible)]
        return change_equivalently(model, NAME, data, deciding, None, lines)
    smoothing.noise.observe(teaching, float_model(model))
    factors, shares = smoothing.factors(None if alpha == "auto" else alpha)
    chosen = [share for share in shares if share is not None]
    lines = [f"{len(chosen)} of {len(divisible.runs)} tensors smoothed"]
    if alpha == "auto" and chosen:
        lines[0] += f", alpha {min(chosen)} to {max(chosen)}"
    lines += left_out(divisible)
    by = factors.double().numpy()
    return change_equivalently(
        model,
        NAME,
        data,
        deciding,
        lambda draft: divide_classes(Constants(draft), _find(OnnxGraph(draft), fixed), by),
        lines,
    )


def _find(graph: OnnxGraph, fixed: dict[str, str]) -> Divisible:
    values = {graph.values[key]: why for key, why in fixed.items() if key in graph.values}
    return find_divisible(graph.model, values)


Group = tuple[Tensor, list[Sizes], list[Sizes]]


class _Smoothing:
    """The tensors of a model that can be smoothed.

    Attributes:
        noise: of the model.
        groups: classes that are divided together, and the layers on both sides.
    """

    def __init__(
        self, model: WrappedModel, divisible: Divisible, op_types: Collection[str]
    ) -> None:
        self._count = divisible.count
        self.noise = Noise(model, model.graph, divisible)
        layers = sizes_of(Constants(model.graph.model), divisible)
        kinds = [layer.node.op_type in op_types for layer in divisible.layers]
        asked = np.zeros(divisible.count + 1, bool)
        for layer, is_asked in zip(divisible.layers, kinds, strict=True):
            if is_asked:
                asked[layer.inputs[layer.inputs >= 0]] = True
        self.groups: list[Group] = [
            (classes[asked[classes.numpy()]], makers, takers)
            for classes, makers, takers in groups_of(layers, divisible)
            if takers and asked[classes.numpy()].any()
        ]

    def factors(self, alpha: float | None) -> tuple[Tensor, Sequence[float | None]]:
        """Return a factor for each class, and the alpha of each group, None where it stays.

        Args:
            alpha: for all groups; None chooses by the noise.
        """
        reach, cost = self.noise.reach(), self.noise.cost()
        factors, shares = torch.ones(self._count), list[float | None]()
        for classes, _, takers in self.groups:
            weights = torch.zeros(self._count + 1)
            ones = torch.ones(self._count + 1)
            for layer in takers:
                found, values = layer.inputs.reshape(-1), layer.taken(ones).reshape(-1)
                weights.scatter_reduce_(0, found, values, "amax")
            taken, sizes = weights[classes], reach[classes]
            taken = taken.clamp(min=LEAST * float(taken.max()))
            candidates = [
                _scale(sizes, taken, a) for a in (ALPHAS[1:] if alpha is None else [alpha])
            ]
            trials = []
            for each in candidates:
                trial = factors.clone()
                trial[classes] = each
                trials.append(trial)
            if alpha is not None:
                factors = trials[0]
                shares.append(alpha)
                continue
            costs = [float(cost(trial.log())) for trial in (factors, *trials)]
            best = int(np.argmin(costs))
            shares.append(None if best == 0 else ALPHAS[best])
            factors = factors if best == 0 else trials[best - 1]
        return factors, shares


def _scale(sizes: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Return what to divide channels by; 1 for those that are always 0."""
    scale = (sizes**alpha / weights ** (1 - alpha)).clamp(1 / FARTHEST, FARTHEST)
    is_used = (sizes > 0) & (weights > 0) & scale.isfinite()
    return torch.where(is_used, scale, torch.ones_like(scale))
