"""Quantization-aware training: what a training loop needs besides the module itself."""

from qwrap.train.groups import param_groups
from qwrap.train.schedule import (
    Schedule,
    fake_quant,
    freeze_observers,
    learn_scales,
    learn_zero_points,
)

__all__ = [
    "Schedule",
    "fake_quant",
    "freeze_observers",
    "learn_scales",
    "learn_zero_points",
    "param_groups",
]
