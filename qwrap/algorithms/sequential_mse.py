"""Sequential MSE: the range of each weight channel with which its output errs least."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.errors import ConfigError
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import QParams, choose_qparams, fake_quantize, round_scale
from qwrap.quant.constants import deployed, fit_biases
from qwrap.quant.layer_inputs import Readers, learn_inputs, readers
from qwrap.quant.matrices import LARGEST_LAYER, is_given, users, weight_matrices
from qwrap.quant.outcome import Outcome
from qwrap.quant.prepare import set_mode
from qwrap.quant.ranges import choose_weight_range
from qwrap.quant.row_moments import RowMoments
from qwrap.quant.stubs import Stub
from qwrap.quant.trial import attempt, split

Loss = Literal["mse", "sqnr"]
Scales = tuple[Tensor, Tensor]
"""Scales and zero points of a weight, flat."""

LOSSES = ("mse", "sqnr")
INPUTS = ("quantized", "float")
FAR = 4.0  # times the least error: where all scales err more, narrower ranges are not tried


def sequential_mse(
    model: WrappedModel,
    batches: Iterable[Any],
    *,
    candidates: int = 20,
    inputs: Literal["quantized", "float"] = "quantized",
    loss: Loss = "mse",
    progress: bool = True,
) -> Outcome:
    """Choose the scale of each weight channel by the error of the channel's output, in place.

    Tried are the scale that is there and the ranges ``i / candidates`` of all values, for each
    output channel, for each block of one with the other blocks as they are by then, or for the
    whole weight where it has one scale. Weights stay; biases still fit int32.

    The error of a channel is ``(w - q)^T E[x x^T] (w - q)``. So no layer runs for a candidate, and
    one pass of the data is enough for all layers, each behind others rounded as they were before.
    One after the other, behind new ranges and towards the outputs of the float layers, they take 2
    to 7 times as long for errors that are a few hundredths smaller.

    Half of the batches teach; the other half decide whether the change is kept. One batch does
    both. Left alone are scales that the user gave, and weights of more than 8192 inputs.

    Args:
        model: calibrated.
        batches: as for ``calibrate``; some 30 samples do. They are held in memory.
        candidates: how many shares of the whole range are tried.
        inputs: those of layers in the quantized model, or in float.
        loss: what is summed where channels share a scale: squared errors ("mse"), or each one's
            relative to the power of its channel ("sqnr").
        progress: show a bar on a terminal.

    Returns:
        Whether the new scales were kept, and what came of it.

    Raises:
        ConfigError: an option is none of these, or the model is not prepared.
        InputError: there are no batches, or one does not fit.
        NotCalibratedError: the model is not calibrated.

    Source: AIMET, "Sequential MSE"; the error by second moments is that of Frantar et al.,
    arXiv:2210.17323, equation 1.
    """
    if candidates < 1 or inputs not in INPUTS or loss not in LOSSES:
        raise ConfigError(
            f"candidates={candidates!r}, inputs={inputs!r}, loss={loss!r}: expected 1 or more, "
            f"one of {', '.join(INPUTS)} and one of {', '.join(LOSSES)}"
        )
    teaching, deciding = split(model, batches)

    @torch.no_grad()
    def choose() -> list[str]:
        weights, lines = _weights(model)
        if inputs == "float":
            set_mode(model, "float")
        done = moved = 0
        for group, moments in learn_inputs(model, weights, teaching, progress=progress):
            weight = deployed(model, group[0].value)
            qparams = _Search(group, moments, loss).run(weight, candidates)
            for matrix in group:
                moved += _set(matrix.stub, qparams)
            done += 1
        set_mode(model, "quantize")
        fit_biases(model)
        return [f"{moved} scales in {done} weights", *lines]

    return attempt(model, "sequential MSE", deciding, choose)


def _weights(model: WrappedModel) -> tuple[list[Readers], list[str]]:
    """Return the weights whose scales can be chosen, and a line on each other one."""
    matrices, lines = weight_matrices(model, LARGEST_LAYER)
    found = []
    for group in readers(matrices):
        own = [matrix.stub for matrix in group]
        if any(is_given(model, matrix.use) for matrix in group):
            lines.append(f"{group[0].value!r} has the scale or range that it was given")
        elif group[0].stub.spec.dtype.function is not None:
            lines.append(f"{group[0].value!r} is of a type without codes")
        elif any(users(model, matrix)[1] > own.count(matrix.stub) for matrix in group):
            lines.append(f"{group[0].value!r} shares its scale with what is no such weight")
        else:
            found.append(group)
    return found, lines


def _set(stub: Stub, qparams: QParams) -> int:
    """Give a stub its scales, in place; return how many are new."""
    moved = (qparams.scale != stub.scale) | (qparams.zero_point != stub.zero_point)
    if moved.any():
        stub.set_qparams(qparams)
    return int(moved.sum())


class _Search:
    """Finds the scales of one weight with the least error of its outputs.

    Args:
        group: the layers that read it.
        moments: of what it is multiplied with.
        loss: see ``sequential_mse``.
    """

    def __init__(self, group: Readers, moments: RowMoments, loss: Loss) -> None:
        self._matrix, self._stub = group[0], group[0].stub
        self._second = moments.second.to(torch.float32)  # [G, K, K]
        self._index = self._matrix.scale_index()  # [G, K, R]
        self._loss = loss
        self._by_element = replace(self._stub.grid, axis=0, block_size=None)

    def run(self, weight: Tensor, candidates: int) -> QParams:
        """Return the best scales for ``weight``, of which ``candidates`` shares are tried."""
        now = self._stub.qparams
        columns = self._matrix.columns(weight.to(torch.float32))
        best = now.scale.flatten().clone(), now.zero_point.flatten().clone()
        tried = list(_candidates(weight, self._stub.spec, candidates))
        error = self._error(columns, self._index, *best)
        pull = self._second @ error
        share = self._shares(columns)
        for part in self._parts():
            change = self._improve(columns, part, (error, pull), best, tried, share)
            error[:, part] += change
            if isinstance(part, Tensor):
                pull += self._second[:, :, part] @ change
        spec = self._stub.spec
        scale = round_scale(best[0].reshape(now.scale.shape), spec).to(torch.float32)
        return replace(now, scale=scale, zero_point=best[1].reshape(now.scale.shape))

    def _improve(
        self,
        columns: Tensor,
        part: Tensor | slice,
        state: tuple[Tensor, Tensor],
        best: Scales,
        tried: Sequence[Scales],
        share: Tensor,
    ) -> Tensor:
        """Choose the scales of some inputs, in ``best``; return the change of error ``[G, n, R]``.

        Args:
            columns: the weight as a matrix.
            part: numbers of the inputs; their weights to one output share a scale.
            state: the error of each element, and the product of the second moments with it.
            best: scales and zero points so far, flat.
            tried: others, widest first.
            share: what the error of each output counts, ``[G, R]``.
        """
        error, pull = state
        values, owner = columns[:, part], self._index[:, part][:, 0]
        own, place = torch.unique(owner, return_inverse=True)
        index = place[:, None].expand(values.shape)
        second, old = self._second[:, part][:, :, part], error[:, part]
        others = pull[:, part] - second @ old
        rest = (error * pull).sum(1, dtype=torch.float64)
        rest -= (old * (second @ old + 2 * others)).sum(1, dtype=torch.float64)

        def cost(new: Tensor) -> Tensor:
            each = (new * (second @ new + 2 * others)).sum(1, dtype=torch.float64)
            total = torch.zeros(own.shape, dtype=torch.float64, device=own.device)
            return total.index_add_(0, place.flatten(), ((rest + each) * share).flatten())

        scale, zero_point = (each[own] for each in best)
        least = cost(old)
        for scales, zero_points in tried:
            found = cost(self._error(values, index, scales[own], zero_points[own]))
            better = found < least
            least = torch.where(better, found, least)
            scale = torch.where(better, scales[own], scale)
            zero_point = torch.where(better, zero_points[own], zero_point)
            if (found > FAR * least).all():
                break
        best[0][own], best[1][own] = scale, zero_point
        return self._error(values, index, scale, zero_point) - old

    def _error(self, values: Tensor, index: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return ``values`` minus what is left of them after rounding."""
        own = index.flatten()
        flat = values.flatten()
        rounded = fake_quantize(flat, scale[own], zero_point[own], self._by_element)
        return (flat - rounded).reshape(values.shape)

    def _parts(self) -> list[Tensor | slice]:
        """Return the numbers of the inputs whose weights to an output share a scale."""
        number = self._index[0, :, 0]
        found = dict.fromkeys(number.tolist())
        if len(found) == 1:
            return [slice(None)]
        return [(number == part).nonzero()[:, 0] for part in found]

    def _shares(self, columns: Tensor) -> Tensor:
        if self._loss == "mse":
            return columns.new_ones(columns.shape[0], columns.shape[2], dtype=torch.float64)
        power = (columns * (self._second @ columns)).sum(1, dtype=torch.float64)
        return torch.where(power > 0, 1 / power, 0.0)


def _candidates(weight: Tensor, spec: QuantSpec, count: int) -> Iterator[Scales]:
    """Yield scales for ``count`` shares of the whole range, widest first."""
    low, high = choose_weight_range(weight, spec, "minmax")
    for number in range(count, 0, -1):
        qparams = choose_qparams(low * (number / count), high * (number / count), spec)
        yield qparams.scale.flatten(), qparams.zero_point.flatten()
