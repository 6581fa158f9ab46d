"""Rounding to a table of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

MOST_COMPARED = 64
"""Levels up to which a processor is faster comparing with all than searching, which it mispredicts:
17 against 79 ms for a million values and 15 levels."""

_TENSORS: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def middles_of(levels: Sequence[float]) -> tuple[float, ...]:
    """Return what a float32 has to exceed to lie nearer to the next level, for all but the last.

    It is the largest float32 not above the middle of two levels, so that comparing with it is
    exact, and of two equally near levels the lower is taken.

    Args:
        levels: float32 numbers, ascending.
    """
    return tuple(_floor((Fraction(a) + Fraction(b)) / 2) for a, b in pairwise(levels))


def _floor(exact: Fraction) -> float:
    """Return the largest float32 not above ``exact``."""
    near = np.float32(float(exact))
    if Fraction(float(near)) > exact:
        near = np.nextafter(near, np.float32(-math.inf))
    return float(near)


def nearest(steps: Tensor, middles: tuple[float, ...]) -> Tensor:
    """Return the int64 index of the level nearest to each of ``steps``, of two the lower.

    Args:
        steps: float32 of any shape; NaN may get any level.
        middles: as ``middles_of`` returns them.
    """
    if steps.device.type == "cpu" and len(middles) <= MOST_COMPARED:
        index = torch.zeros_like(steps, dtype=torch.uint8)
        for middle in middles:
            index += steps > middle
        return index.to(torch.int64)
    # Of what does not lie in order torch makes a copy too, and warns.
    return torch.bucketize(steps.contiguous(), as_tensor(middles, steps.device))


def as_tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers as a float32 tensor, which nobody may write to.

    It is made once for each device: a copy to an accelerator makes the host wait.
    """
    if torch.compiler.is_compiling():  # becomes a constant of what is compiled
        return torch.tensor(values, dtype=torch.float32, device=device)
    found = _TENSORS.get((values, device))
    if found is None:
        with torch.inference_mode(False):
            found = torch.tensor(values, dtype=torch.float32, device=device)
        if type(found) is Tensor:  # a tracer's stand-in holds no numbers
            _TENSORS[values, device] = found
    return found
