"""What a layer's weight has to become so that, behind quantized ones, its output stays."""

from __future__ import annotations

import torch
from torch import Tensor

from qwrap.compensation import damped_factor
from qwrap.nbits.lessons import Held, Lesson


def corrected(weight: Tensor, lesson: Lesson, damping: float) -> tuple[Tensor, float]:
    """Return a weight that makes good, on inputs as they are, what they lack to the exact ones.

    For exact inputs x and those seen, s, least squares give ``W + W E[(x - s) s'] E[s s']^-1``:
    with it in place of W, whatever rounds a weight so that products with s stay rounds it so that
    the output of the float model stays. As much of the change is made, from none to all, as leaves
    the least error on the rows that judge.

    Args:
        weight: ``[N, K]``, one group after the other.
        lesson: of its inputs.
        damping: added to each input's power, relative to the mean.

    Returns:
        The weight in its dtype, and the share of the change.

    Source: the objective of Li et al., arXiv:2504.02692 (GPTAQ), section 3, whose error that
    stems from earlier layers is taken column by column there. Solved at once it left less error.
    """
    drift = lesson.taught.drift
    if drift is None or not lesson.held.seen:
        return weight, 0.0
    second, drift = (each.reshape(-1, *each.shape[-2:]) for each in (lesson.taught.second, drift))
    matrix = by_group(weight, len(second)).double()
    factor = damped_factor(second.to(matrix.device), damping)
    wanted = (matrix @ drift.to(matrix.device)).mT  # [G, K, R]
    change = torch.cholesky_solve(wanted, factor).mT
    share = _share(matrix, change, lesson.held)
    result = matrix + share * change
    return result.flatten(0, 1).to(weight.dtype), share


def by_group(weight: Tensor, groups: int) -> Tensor:
    """Return ``[N, K]`` as ``[G, R, K]``."""
    return weight.reshape(groups, -1, weight.shape[-1])


def _share(matrix: Tensor, change: Tensor, held: Held) -> float:
    matrix, change = matrix.float(), change.float()
    fit = power = 0.0
    for seen, exact in zip(held.seen, held.exact, strict=True):
        made = seen @ change.mT
        fit += float((made * ((exact - seen) @ matrix.mT)).sum(dtype=torch.float64))
        power += float(made.square().sum(dtype=torch.float64))
    return min(max(fit / power, 0.0), 1.0) if power else 0.0


def output_error(weight: Tensor, rounded: Tensor, held: Held) -> float:
    """Return the squared error of outputs on the rows that judge, relative to their power."""
    error = power = 0.0
    for seen, exact in zip(held.seen, held.exact, strict=True):
        matrix, other = (by_group(each.float(), len(seen)) for each in (weight, rounded))
        wanted = exact @ matrix.mT
        error += float((seen @ other.mT - wanted).square().sum(dtype=torch.float64))
        power += float(wanted.square().sum(dtype=torch.float64))
    return error / power if power else 0.0
