"""Quantization-aware training: what a training loop needs besides the module itself, and a loop."""

from qwrap.train.batch_norm import (
    fold_batch_norm,
    freeze_batch_norm,
    reestimate_batch_norm,
    reestimating_batch_norm,
    sync_batch_norm,
)
from qwrap.train.distill import Distillation, Losses, teacher_of
from qwrap.train.finetune import finetune
from qwrap.train.groups import param_groups
from qwrap.train.joints import joints
from qwrap.train.losses import cosine_distance, divergence, normalized_error
from qwrap.train.oscillation import OscillationFreezer, dampening
from qwrap.train.report import FinetuneReport, Record
from qwrap.train.schedule import (
    Schedule,
    fake_quant,
    freeze_observers,
    learn_scales,
    learn_zero_points,
)
from qwrap.train.split import Split, split
from qwrap.train.statistics import Monitor, statistics, statistics_table

__all__ = [
    "Distillation",
    "FinetuneReport",
    "Losses",
    "Monitor",
    "OscillationFreezer",
    "Record",
    "Schedule",
    "Split",
    "cosine_distance",
    "dampening",
    "divergence",
    "fake_quant",
    "finetune",
    "fold_batch_norm",
    "freeze_batch_norm",
    "freeze_observers",
    "joints",
    "learn_scales",
    "learn_zero_points",
    "normalized_error",
    "param_groups",
    "reestimate_batch_norm",
    "reestimating_batch_norm",
    "split",
    "statistics",
    "statistics_table",
    "sync_batch_norm",
    "teacher_of",
]
