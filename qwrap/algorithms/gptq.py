"""GPTQ: round the weights of a layer so that their errors cancel on its input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwrap.compensation import compensate
from qwrap.errors import ConfigError
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import fake_quantize
from qwrap.quant.constants import deployed
from qwrap.quant.layer_inputs import Readers, learn_inputs, readers
from qwrap.quant.matrices import LARGEST_LAYER, WeightMatrix, weight_matrices
from qwrap.quant.outcome import Outcome
from qwrap.quant.prepare import plan_of
from qwrap.quant.row_moments import RowMoments, TargetMoments
from qwrap.quant.trial import Inputs, attempt, split
from qwrap.quant.turns import learn_in_turn

LEAST_GAIN = 0.05  # of the error; over some 15 samples, less may be chance
LEAST_DAMPING = 0.01
BY_CHANCE = 0.25  # of inputs per row; measured with sentences of some ten tokens through MiniLM


def round_weights(
    model: WrappedModel,
    batches: Iterable[Any],
    *,
    damping: float | None = None,
    sequential: bool = False,
    progress: bool = True,
) -> Outcome:
    """Choose the codes of all weights so that each layer's output stays near its float one.

    Weights are replaced in place, by values on the grid that calibration chose: quantizing them
    again gives these codes. The rounding error of one input is made good by the inputs after it,
    as far as they were correlated in the data; where a layer has a bias of its own, that takes
    the mean error. All layers learn in one pass, behind weights rounded to nearest, or, with
    ``sequential``, one after the other behind rounded ones.

    Half of the batches teach, three quarters if ``sequential``; the others decide: if the squared
    error of their outputs does not fall by a twentieth, everything stays as it was. One batch does
    both. A weight that several layers read is rounded for all their inputs. Those that are read as
    something else too, or have more than 8192 inputs, are left alone.

    Args:
        model: calibrated; biases not yet corrected.
        batches: as for ``calibrate``; some 30 samples do. They are held in memory.
        damping: what is added to each input's variance, relative to their mean. None: 0.01, and
            more where a layer has seen few rows of inputs, whose correlations are half chance.
        sequential: learn of each layer behind those that are rounded already, and towards the
            outputs of the float layer for what it is fed in the float model, so that errors do not
            pile up. The data then runs once for every tensor that weights are multiplied with.
        progress: show a bar on a terminal.

    Returns:
        Whether the new weights were kept, and what came of it.

    Raises:
        ConfigError: ``damping`` is not above 0, or the model is not prepared.
        InputError: there are no batches, or one does not fit.
        NotCalibratedError: the model is not calibrated.

    Source: Frantar et al., arXiv:2210.17323; for ``sequential`` the objective of Li et al. (GPTAQ),
    arXiv:2504.02692, here as plain GPTQ of the weight that fits the float outputs best.
    """
    if damping is not None and not damping > 0:
        raise ConfigError(f"damping={damping}: expected more than 0; 0.01 is usual")
    # Errors behind errors are learned from more data, for which fewer batches have to decide.
    teaching, deciding = split(model, batches, every=4 if sequential else 2)

    @torch.no_grad()
    def round_all() -> list[str]:
        weights, lines = _weights(model)
        done = 0
        for each in _learn(model, weights, teaching, sequential=sequential, progress=progress):
            _round(model, each, damping)
            done += len(each.group)
        return [f"{done} of {len(plan_of(model).constants)} weights", *lines]

    return attempt(model, "GPTQ rounding", deciding, round_all, least_gain=LEAST_GAIN)


def _weights(model: WrappedModel) -> tuple[list[Readers], list[str]]:
    """Return the weights that can be rounded anew, and a line on each other one."""
    matrices, lines = weight_matrices(model, LARGEST_LAYER)
    found = []
    for group in readers(matrices):
        if len(group) == len(model.graph.values[group[0].value].uses()) and _has_one_grid(group):
            found.append(group)
        else:
            lines.append(f"{group[0].value!r} is read in another way, too")
    return found, lines


def _has_one_grid(group: Readers) -> bool:
    qparams = [matrix.stub.qparams for matrix in group]
    same = [torch.equal(q.scale, qparams[0].scale) for q in qparams]
    return all(same) and all(torch.equal(q.zero_point, qparams[0].zero_point) for q in qparams)


@dataclass(frozen=True, slots=True)
class _Lesson:
    """What was learnt of a weight.

    Attributes:
        group: the weight.
        rows: moments of what it is multiplied with.
        targets: of the outputs in float, None to take those of these rows.
    """

    group: Readers
    rows: RowMoments
    targets: TargetMoments | None = None


def _learn(
    model: WrappedModel,
    weights: Sequence[Readers],
    batches: Sequence[Inputs],
    *,
    sequential: bool,
    progress: bool,
) -> Iterator[_Lesson]:
    if sequential:
        for group, rows, targets in learn_in_turn(model, weights, batches, progress=progress):
            yield _Lesson(group, rows, targets)
    else:
        for group, rows in learn_inputs(model, weights, batches, progress=progress):
            yield _Lesson(group, rows)


def _round(model: WrappedModel, lesson: _Lesson, damping: float | None) -> None:
    """Round a weight and let its bias take the mean error, in place."""
    matrix, rows = lesson.group[0], lesson.rows
    # With several layers the mean of all inputs is that of none.
    bias = None if matrix.bias is None or len(lesson.group) > 1 else model.stored(matrix.bias)
    weight = deployed(model, matrix.value)
    wanted = matrix.columns(weight.double())
    mean = (wanted * rows.mean[:, :, None]).sum(1)
    if damping is None:
        damping = LEAST_DAMPING + BY_CHANCE * matrix.size[1] / rows.count
    if bias is not None:
        mean += bias.reshape(mean.shape)
    second = rows.second if bias is None else rows.covariance
    if lesson.targets is not None:
        mean = lesson.targets.mean
        products = lesson.targets.second if bias is None else lesson.targets.covariance
        wanted = _fitted(second, products, lesson.targets.weight.double(), damping, rows.count)
    rounded = compensate(wanted, second, _grid(matrix), damping)
    if bias is not None:
        bias.copy_((mean - (rounded * rows.mean[:, :, None]).sum(1)).flatten())
    model.assign(matrix.value, matrix.stored(rounded).to(weight.dtype))


def _fitted(second: Tensor, products: Tensor, weight: Tensor, damping: float, count: int) -> Tensor:
    """Return the weight that makes the float outputs of the rows that there are, ``[G, K, R]``.

    What is left between its outputs and those of a rounded weight is all there is to minimise.
    It stays the nearer to ``weight`` the fewer rows there are for each of their inputs.
    """
    power = second.diagonal(dim1=1, dim2=2)
    ridge = max(damping, second.shape[1] / count) * power.mean(1, keepdim=True)
    ridge = torch.where(power > 0, ridge.expand_as(power), 1.0)
    damped = second + torch.diag_embed(ridge)
    factor = torch.linalg.cholesky(damped)
    return torch.cholesky_solve(products + ridge[:, :, None] * weight, factor)


def _grid(matrix: WeightMatrix) -> Callable[[Tensor, Tensor], Tensor]:
    qparams, index = matrix.stub.qparams, matrix.scale_index()
    spec = replace(matrix.stub.grid, axis=0, block_size=None)
    scale, zero_point = qparams.scale.flatten(), qparams.zero_point.flatten()

    def round_to_grid(rest: Tensor, inputs: Tensor) -> Tensor:
        """Round what one input of each group contributes to every output, ``[G, R]``."""
        values = rest[:, 0]
        rows = inputs[:, None, None].expand(-1, 1, values.shape[1])
        own = index.gather(1, rows).flatten()
        rounded = fake_quantize(
            values.flatten().to(torch.float32), scale[own], zero_point[own], spec
        )
        return rounded.reshape(values.shape).to(values.dtype)

    return round_to_grid
