"""Scales that go with the data while a model is trained."""

from __future__ import annotations

from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.numerics import QParams, choose_qparams
from qwrap.quant.observe.observers import Observer
from qwrap.quant.ranges import choose_weight_range


def range_now(x: Tensor, spec: QuantSpec, observer: Observer | None) -> QParams:
    """Return the scale for a tensor as it is, or for the average of what was seen of it.

    Args:
        x: the tensor.
        spec: how it is quantized.
        observer: what has watched it, and now sees ``x``; its moving average counts. None for a
            constant, whose own range counts.

    Source: Jacob et al., arXiv:1712.05877, section 3.1.
    """
    if observer is None:
        return choose_qparams(*choose_weight_range(x, spec, "minmax"), spec)
    observer.observe(x)
    return choose_qparams(observer.ema_low, observer.ema_high, spec)
