"""Learning rates: from what to start, and how they go down."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch

from qwrap.errors import ConfigError
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.prepare import stubs

RateSchedule = Literal["cosine", "constant"] | Callable[[float], float]
"""Part done, 0 to 1 -> what learning rates are multiplied with, or the name of such a function."""

STEPS_PER_CODE = 150  # of an optimizer that moves a weight by its learning rate each time
WITHOUT_CODES = 1e-5


def weight_rate(model: WrappedModel) -> float:
    """Return a learning rate for weights of a calibrated model, under Adam.

    Rounding is made good by weights that come to other codes, so the rate goes by the distance
    between codes: a 150th of the median scale. That is about 1e-5 for weights of 8 bits and 1e-4
    for those of 4. Where no weight has integer codes it is 1e-5.
    """
    medians = [
        stub.scale.median()
        for _, stub in stubs(model)
        if stub.stored and stub.mode == "quantize" and stub.spec.dtype.is_integer
    ]
    return float(torch.stack(medians).median()) / STEPS_PER_CODE if medians else WITHOUT_CODES


def factor_of(schedule: RateSchedule) -> Callable[[float], float]:
    """Return the function that a schedule is, or names.

    Raises:
        ConfigError: there is none of that name.
    """
    if callable(schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise ConfigError(
            f"schedule={schedule!r}: choose one of {', '.join(SCHEDULES)}, or give a function"
        )
    return SCHEDULES[schedule]


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda _: 1.0,
}
