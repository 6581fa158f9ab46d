"""Scales that go with the data while a model is trained."""

from __future__ import annotations

import torch
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.numerics import QParams, choose_qparams
from qwrap.quant.observe.observers import MinMaxObserver, Observer
from qwrap.quant.observe.sync import merge_extremes
from qwrap.quant.ranges import choose_weight_range


def range_now(x: Tensor, spec: QuantSpec, observer: Observer | None) -> QParams:
    """Return the scale for a tensor as it is, or for the average of what was seen of it.

    Where torch.distributed is initialised, the ends are those of the batch of all ranks together,
    so that all get the same scale: every rank has to run the tensor equally often, as for
    ``torch.nn.SyncBatchNorm``.

    Args:
        x: the tensor.
        spec: how it is quantized.
        observer: what has watched it, and now sees ``x``; its moving average counts. None for a
            constant, whose own range counts.

    Source: Jacob et al., arXiv:1712.05877, section 3.1.
    """
    if observer is None:
        return choose_qparams(*choose_weight_range(x, spec, "minmax"), spec)
    batch = MinMaxObserver(observer.name, observer.axis)
    batch.observe(x)
    merge_extremes(batch, observer.ends.channels or 1, x.device)
    observer.take_ends(batch)
    return choose_qparams(observer.ema_low, observer.ema_high, spec)


def is_repeated() -> bool:
    """Whether this forward pass repeats an earlier one, for activations that were not kept.

    Checkpointing of activations runs a forward pass again within the backward pass. What was seen
    then must not count twice, and scales must be those of the first time.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1  # what torch.utils.checkpoint asks too
