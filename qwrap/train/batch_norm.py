"""Batch normalization that is live in training: freeze it, measure it again, fold it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from qwrap.errors import ConfigError, InputError
from qwrap.model.batches import count_batches, iterate
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.batch_norm import BIAS, LiveBatchNorm
from qwrap.quant.live import fold, live_layers, merge_live, stored_at
from qwrap.quant.moments import Moments
from qwrap.quant.observe.sync import is_distributed
from qwrap.quant.prepare import keep_live
from qwrap.train.weights import models_in

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # missing where torch was built without


def freeze_batch_norm(model: nn.Module, frozen: bool = True, *, nodes: str = "*") -> int:
    """Let training go by the running statistics of live batch normalizations, in place.

    They then stay as they are, and training computes what will be deployed, rounded biases
    included; gamma and beta go on learning. Usual for the last third of training.

    Args:
        model: a prepared model, or a module with such models in it.
        frozen: False lets batches be normalized by their own statistics again.
        nodes: shell pattern over the names of the layers meant.

    Returns:
        How many layers are meant; ``QConfig(bn="live")`` says which are live.

    Raises:
        ConfigError: there is no prepared model, or no node of such a name.
    """
    layers = _layers(model, nodes)
    for layer in layers:
        layer.frozen = frozen
    return len(layers)


def sync_batch_norm(
    model: nn.Module,
    synced: bool = True,
    *,
    nodes: str = "*",
    group: ProcessGroup | None = None,
) -> int:
    """Normalize batches by their statistics over all ranks of torch.distributed, in place.

    As ``torch.nn.SyncBatchNorm`` does, on any device. All ranks then have to run the model in
    training mode equally often. It is not saved with the ``state_dict``, nor ``group`` with a copy.
    In a single process it changes nothing.

    Args:
        model: a prepared model, or a module with such models in it.
        synced: False gives each rank its own statistics again.
        nodes: shell pattern over the names of the layers meant.
        group: the ranks, all if None.

    Returns:
        How many layers are meant.

    Raises:
        ConfigError: there is no prepared model, or no node of such a name.
    """
    layers = _layers(model, nodes)
    for layer in layers:
        layer.synced, layer.group = synced, group
    return len(layers)


def reestimate_batch_norm(
    model: WrappedModel,
    batches: Iterable[Any],
    *,
    progress: bool = True,
    total: int | None = None,
    group: ProcessGroup | None = None,
) -> None:
    """Replace the statistics of live batch normalizations by those of ``batches``, in place.

    The moving averages of training lag behind the weights, and behind what rounds them. Here all
    batches count alike, as if they were one, with quantization as it is switched; some hundred do.
    Scales stay. Layers that have no statistics yet get their first ones, and compute what they did.

    Args:
        model: prepared with ``QConfig(bn="live")``; for one inside of another module, or with a
            loop of your own, use ``reestimating_batch_norm``.
        batches: as for ``calibrate``.
        progress: show a bar on a terminal.
        total: how many batches there are, for the bar, where ``len(batches)`` does not tell.
        group: with torch.distributed, the ranks whose batches count together, all if None.

    Raises:
        ConfigError: no layer has a live batch normalization.
        InputError: there is no batch, or one does not fit.

    Source: Nagel et al., arXiv:2203.11086, section 4.1 (re-estimation for oscillating weights).
    """
    off = None if progress else True  # None: where there is no terminal
    total = count_batches(batches) if total is None else total
    with reestimating_batch_norm(model, group=group):
        data = iterate(batches, model, may_be_empty=is_distributed(group))
        for inputs in tqdm(data, desc="batch norm", total=total, unit="batch", disable=off):
            model(**inputs)


@contextmanager
def reestimating_batch_norm(
    model: nn.Module, *, group: ProcessGroup | None = None
) -> Iterator[None]:
    """Replace running statistics by those of what the user runs in the ``with`` block, in place.

    See ``reestimate_batch_norm``. The model is in ``eval`` mode meanwhile, and has no gradients.
    Where the block fails, the statistics stay as they were.

    Args:
        model: a model prepared with ``QConfig(bn="live")``, or a module with such models in it.
        group: with torch.distributed, the ranks whose batches count together, all if None.

    Raises:
        ConfigError: no layer has a live batch normalization.
        InputError: nothing was run.
    """
    layers, training = _layers(model), [(m, m.training) for m in model.modules()]
    if not layers:
        raise ConfigError(
            "no layer has a live batch normalization; prepare the model with QConfig(bn='live')"
        )
    model.eval()
    for layer in layers:
        layer.moments, layer.renewing = Moments(len(layer.gamma)), layer.known
    try:
        with torch.no_grad():
            yield
        _renew(model, group)
    finally:
        for layer in layers:
            layer.moments, layer.renewing = None, False
        for module, was in training:
            module.training = was


def _renew(model: nn.Module, group: ProcessGroup | None) -> None:
    for wrapped, layers in _named(model, "*"):
        if is_distributed(group):
            merge_live(wrapped, group)
        unseen = [k for k, la in layers.items() if la.moments is None or la.moments.count < 2]
        if unseen:
            raise InputError(
                f"batch normalization of {', '.join(map(repr, unseen))} saw no data, or one value; "
                "run at least one batch through the model"
            )
        for key, layer in layers.items():
            layer.renew(stored_at(wrapped, key, BIAS))


def fold_batch_norm(model: nn.Module, *, nodes: str = "*") -> int:
    """Fold live batch normalizations into weights and biases for good, in place.

    ``export`` folds in the file alone. Afterwards these layers train as any other; make a new
    optimizer then, for gamma is gone, and weight and bias have jumped.

    Args:
        model: a prepared model, or a module with such models in it.
        nodes: shell pattern over the names of the layers meant.

    Returns:
        How many layers are meant.

    Raises:
        ConfigError: there is no prepared model, or no node of such a name.
    """
    count = 0
    for wrapped, layers in _named(model, nodes):
        fold(wrapped, layers.keys())
        keep_live(wrapped, [key for key, _ in live_layers(wrapped) if key not in layers])
        count += len(layers)
    return count


def _layers(model: nn.Module, nodes: str = "*") -> list[LiveBatchNorm]:
    return [layer for _, layers in _named(model, nodes) for layer in layers.values()]


def _named(model: nn.Module, nodes: str) -> list[tuple[WrappedModel, dict[str, LiveBatchNorm]]]:
    """Return the prepared models with their live layers of a name."""
    found = list(models_in(model).values())
    if nodes != "*" and not any(fnmatchcase(key, nodes) for m in found for key in m.graph.nodes):
        raise ConfigError(f"nodes={nodes!r}: no node has such a name")
    return [(m, {k: la for k, la in live_layers(m) if fnmatchcase(k, nodes)}) for m in found]
