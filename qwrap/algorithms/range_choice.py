"""A range method for each activation, chosen by what comes of it at the outputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.samples import keep, keeping
from qwrap.quant.outcome import Outcome
from qwrap.quant.prepare import config_of, plan_of
from qwrap.quant.rescale import rescale
from qwrap.quant.trial import attempt, split

SAMPLES = 64
LEAST_GAIN = 0.05  # of the error; over some tens of samples, less may be chance


def choose_methods(model: WrappedModel, batches: Iterable[Any]) -> Outcome:
    """Let each activation have the range method that serves the outputs best, in place.

    It is method "auto" of calibration, as a change that has to stand the test of batches which had
    no say in it. All scales are chosen again, those of weights too: it comes before what works on
    weights. Tensors whose method or range the user gave keep it.

    Args:
        model: calibrated, for a method that needs a histogram.
        batches: as for ``calibrate``; every other one decides whether the change is kept.

    Returns:
        Whether it was kept, and which methods were chosen.

    Raises:
        InputError: there are no batches, or one does not fit.
        NotCalibratedError: the model is not calibrated.
        ConfigError: there is no histogram.
    """
    teaching, deciding = split(model, batches)

    def choose() -> list[str]:
        config, samples = config_of(model), model.samples
        with keeping(model, SAMPLES):
            for inputs in teaching:
                keep(model, inputs)
        rescale(model, method="auto")
        model.config, model.samples = config, samples
        chosen = sorted(set(plan_of(model).methods.values()))
        return [f"{', '.join(chosen)} for {len(plan_of(model).methods)} tensors"]

    return attempt(model, "range methods", deciding, choose, least_gain=LEAST_GAIN)
