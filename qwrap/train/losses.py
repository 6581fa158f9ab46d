"""How far a student's tensor is from its teacher's, as numbers that can be compared and added."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = 1e30  # and beyond: stands for "not there", as in calibration
MASKED_HALF = 6e4  # the same in float16


def normalized_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared error over the teacher's variance, float32 ``[]``.

    It is 1 for a student that puts out the teacher's mean, whatever the unit; ``-10 * log10`` of
    it is the signal-to-noise ratio in dB. What is masked in the teacher (magnitudes of 1e30 and
    more, 6e4 in float16, and NaN) is left out. A teacher that never varies is held against its
    power instead, and one that is zero against 1.

    Args:
        student: float, any shape.
        teacher: of the same shape.
        mask: bool, of the first dimensions of that shape: what counts. None: everything.

    Source: the weighting by variance is that of a coefficient of determination.
    """
    student, teacher = student.float(), teacher.detach()
    counts = _counting(teacher, mask)
    teacher = torch.where(counts, teacher.float(), 0.0)
    number = counts.sum().clamp(min=1)
    error = (torch.where(counts, student, 0.0) - teacher).square().sum() / number
    power = teacher.square().sum() / number
    variance = torch.where(counts, teacher - teacher.sum() / number, 0.0).square().sum() / number
    # A constant's variance is rounding noise: some 1e-14 of its power in float32.
    scale = torch.where(variance > 1e-12 * power, variance, power)
    return error / torch.where(scale > 0, scale, 1.0)


def divergence(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    axis: int = -1,
) -> Tensor:
    """Return the mean Kullback-Leibler divergence of the student's softmax, float32 ``[]``.

    It is that from the teacher's, times the squared temperature, with which gradients keep their
    size at any temperature. Classes that the teacher masks (see ``normalized_error``) are left out.

    Args:
        student: logits, any shape.
        teacher: of the same shape.
        mask: bool, of the first dimensions of that shape, before ``axis``: what counts. None:
            everything.
        temperature: both are divided by it; above 1 the unlikely classes weigh more.
        axis: that of the classes.

    Source: Hinton et al., arXiv:1503.02531, section 2.
    """
    student, teacher = student.float().movedim(axis, -1), teacher.detach().movedim(axis, -1)
    there = _counting(teacher, None)
    lowest = torch.finfo(torch.float32).min
    student, wanted = (
        torch.where(there, x / temperature, lowest).log_softmax(-1)
        for x in (student, teacher.float())
    )
    each = F.kl_div(student, wanted, reduction="none", log_target=True)
    each = torch.where(there, each, 0.0).sum(-1)
    return temperature**2 * _mean(each, mask)


def cosine_distance(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, axis: int = -1
) -> Tensor:
    """Return 1 minus the mean cosine of the angle between vectors along ``axis``, float32 ``[]``.

    Args:
        student: float, any shape.
        teacher: of the same shape.
        mask: bool, of the first dimensions of that shape, before ``axis``: what counts. None:
            everything.
        axis: along which the vectors lie.
    """
    student, teacher = student.float().movedim(axis, -1), teacher.detach().float().movedim(axis, -1)
    return _mean(1 - F.cosine_similarity(student, teacher, dim=-1), mask)


def _counting(teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return which elements count, bool of the teacher's shape."""
    limit = MASKED_HALF if teacher.dtype == torch.float16 else MASKED
    there = teacher.abs() < limit  # False for NaN
    return there if mask is None else there & _aligned(mask, teacher)


def _aligned(mask: Tensor, x: Tensor) -> Tensor:
    """Return the mask with axes of size 1 for those of ``x`` that it lacks."""
    return mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))


def _mean(each: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of what counts, 0 of nothing."""
    if mask is None:
        return each.mean() if each.numel() else each.sum()
    weights = _aligned(mask, each).expand_as(each)
    return torch.where(weights, each, 0.0).sum() / weights.sum().clamp(min=1)
