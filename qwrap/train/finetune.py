"""A training loop for those who have none: closer to the float model, without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from qwrap.errors import ConfigError
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.live import live_layers
from qwrap.quant.prepare import device_of, plan_of, stubs
from qwrap.train.distill import Distillation
from qwrap.train.groups import param_groups
from qwrap.train.loop import Loop
from qwrap.train.ranks import Ranks
from qwrap.train.rates import RateSchedule, factor_of, weight_rate
from qwrap.train.report import FinetuneReport
from qwrap.train.split import Split, split
from qwrap.train.targets import Measure

STEPS = 1000
LOOKS = 20  # at what was held out, in a whole training

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]


def finetune(
    model: WrappedModel,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    epochs: int | None = None,
    loss: Measure | Mapping[str, Measure] | Distillation = "mse",
    lr: float | None = None,
    scale_lr: float | None = 3e-3,
    weight_scale_lr: float | None = 1e-4,
    zero_point_lr: float | None = None,
    weight_decay: float = 0.0,
    optimizer: MakeOptimizer = torch.optim.Adam,
    schedule: RateSchedule = "cosine",
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    held_out: float | Iterable[Any] = 0.2,
    evaluate: int | None = None,
    patience: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FinetuneReport:
    """Train a calibrated model to put out what the float model does, in place, without labels.

    The float model that was prepared teaches: outputs and inner tensors are compared, the inner
    ones less and less (see ``Distillation``). Before the first step, and again and again, the loss
    of the outputs is measured on batches that were held out. The state with the lowest is what the
    model has in the end; if none is lower than before training, that is the one it had, bit for
    bit. It is held in memory, on the CPU, once.

    Live batch normalizations go by their running statistics meanwhile, as the teacher does.

    However training ends, by an error or ``KeyboardInterrupt`` too, which go on to the caller, the
    model has the best state so far.

    On the CPU the same seed gives the same bits. Where torch.distributed is initialised, every
    rank trains on batches of its own, gradients are averaged, and all ranks end with the same
    model; each has to have about as many batches, because training ends where one has no more.
    For sharded models, write a loop with ``Distillation``.

    Args:
        model: prepared and calibrated; it may be on any device.
        batches: as for ``calibrate``; some 200 samples and more. A list or ``DataLoader`` is read
            once in each epoch, and only what is held out of other data stays in memory; an
            iterator, which can be read once, gives one epoch, and its first batches are held out.
        steps: of the optimizer; 1000 if ``epochs`` is None too.
        epochs: how often all batches are trained on, in place of ``steps``.
        loss: how outputs are compared, see ``outputs`` of ``Distillation``; for other inner
            tensors, masks or teachers a ``Distillation`` of ``model``.
        lr: learning rate of weights; None goes by the distance between their codes, see
            ``weight_rate``: about 1e-5 with 8 bits and 1e-4 with 4.
        scale_lr: learning rate of scales of activations, which is relative: three thousandths of a
            scale in each step of Adam. None for ``lr``.
        weight_scale_lr: that of the scales of weights, None for ``scale_lr``; 0 serves weights best
            that lie on their grid already, see ``param_groups``.
        zero_point_lr: that of zero points (lsq+), None for ``scale_lr``.
        weight_decay: as in ``param_groups``.
        optimizer: makes an optimizer from parameter groups, as in
            ``functools.partial(torch.optim.SGD, momentum=0.9)``.
        schedule: what learning rates are multiplied with: a cosine from 1 to 0, 1, or a function of
            the part that is done, from 0 to 1.
        accumulate: batches in each step.
        autocast: float16 or bfloat16: compute in this type what ``torch.autocast`` does; the
            teacher stays in float32.
        held_out: share of the batches to hold out, 0 for no check, or other batches for it. What
            is held out is never trained on. Of data that is neither list, ``DataLoader`` nor
            iterator, batches have to come in the same order each time.
        evaluate: steps between two looks at what was held out; None looks 20 times.
        patience: end after so many looks without a lower held-out loss; None: never.
        seed: of the division, the order of a list, and torch's random numbers meanwhile.
        progress: show a bar on a terminal.

    Returns:
        What happened; ``print`` it.

    Raises:
        ConfigError: the model is not calibrated, a setting is out of range, or nothing is
            trainable.
        InputError: there are too few batches, or one does not fit.
        TrainingError: a loss is NaN or infinite; the error names the step.

    Source: Hinton et al., arXiv:1503.02531, with the teacher's own outputs as the only target.
    """
    _check_settings(
        steps=steps, epochs=epochs, accumulate=accumulate, evaluate=evaluate, patience=patience
    )
    _check_calibrated(model)
    lr = weight_rate(model) if lr is None else lr
    groups = param_groups(
        model,
        lr=lr,
        weight_decay=weight_decay,
        scale_lr=scale_lr,
        zero_point_lr=zero_point_lr,
        weight_scale_lr=weight_scale_lr,
    )
    distillation = loss if isinstance(loss, Distillation) else Distillation(model, outputs=loss)
    if distillation.model is not model:
        raise ConfigError("loss= is the Distillation of another model; make one of this model")
    data = split(batches, model, held_out, seed)
    ranks = Ranks(device_of(model))
    (least,) = ranks.least(_total_steps(data, steps, epochs, accumulate))
    loop = Loop(
        distillation,
        data,
        optimizer(groups),
        total=int(least),
        factor=factor_of(schedule),
        accumulate=accumulate,
        autocast=autocast,
        interval=evaluate or max(1, -(-int(least) // LOOKS)),
        patience=patience,
        ranks=ranks,
    )
    with _as_before(model, seed), distillation:
        return loop.run(progress=progress)


def _check_settings(
    *,
    steps: int | None,
    epochs: int | None,
    accumulate: int,
    evaluate: int | None,
    patience: int | None,
) -> None:
    if steps is not None and epochs is not None:
        raise ConfigError(f"steps={steps} and epochs={epochs}: give one of them")
    counts = {"steps": steps, "epochs": epochs, "accumulate": accumulate}
    for name, value in {**counts, "evaluate": evaluate, "patience": patience}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: expected 1 or more")


def _check_calibrated(model: WrappedModel) -> None:
    """Refuse what would train the float model to be itself.

    Raises:
        NotCalibratedError: a scale is not known.
    """
    plan_of(model)
    found = [stub for _, stub in stubs(model)]
    for stub in found:
        assert stub.qparams
    if not any(stub.mode == "quantize" for stub in found):
        raise ConfigError(
            "nothing in the model is quantized now, so there is nothing to make good; see "
            "model.plan.summary(), or switch fake quantization on again"
        )


def _total_steps(data: Split, steps: int | None, epochs: int | None, accumulate: int) -> int:
    """Return how many steps to do, on this rank."""
    known = None if data.count is None else -(-data.count // accumulate)
    if epochs is None:
        wanted = steps or STEPS
        return min(wanted, known) if data.is_once and known is not None else wanted
    if data.is_once and epochs > 1:
        raise ConfigError(f"epochs={epochs}: the data is an iterator, which can be read once")
    if known is None:
        raise ConfigError("epochs= needs data that tells its length; give steps=")
    return epochs * known


@contextmanager
def _as_before(model: WrappedModel, seed: int) -> Iterator[None]:
    """Put back, at the end, modes and the state of random numbers; batch norm goes by its own."""
    modes = [(module, module.training) for module in model.modules()]
    norms = [(layer, layer.frozen) for _, layer in live_layers(model)]
    for layer, _ in norms:
        layer.frozen = True  # the teacher goes by these statistics, and so will what is deployed
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield
    finally:
        for module, training in modes:
            module.training = training
        for layer, frozen in norms:
            layer.frozen = frozen
