"""What is switched on and off in the course of a training.

Each verb works in place on any module with prepared models in it, under DistributedDataParallel
too: no parameter comes, goes or stops requiring a gradient; gradients of what is frozen are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from qwrap.errors import ConfigError, NotCalibratedError
from qwrap.quant.batch_norm import LiveBatchNorm
from qwrap.quant.stubs import Stub, Switch
from qwrap.train.batch_norm import freeze_batch_norm

SHOWN = 5  # names in a message


def freeze_observers(model: nn.Module, frozen: bool = True, *, tensors: str = "*") -> int:
    """Stop scales from following the data, in place; ``frozen=False`` lets them follow again.

    Args:
        model: a prepared model, or a module with such models in it.
        frozen: whether scales stay as they are.
        tensors: shell pattern over the names of the tensors meant.

    Returns:
        How many tensors are meant: those with ``training="follow"``.

    Raises:
        ConfigError: there is no prepared model, or no quantized tensor of such a name.
    """
    return _switch(
        model,
        tensors,
        lambda stub: stub.training_by == "follow",
        lambda stub: setattr(stub, "following", not frozen),
    )


def learn_scales(model: nn.Module, enabled: bool = True, *, tensors: str = "*") -> int:
    """Let scales, clips and zero points be learned from now on, in place, or freeze them.

    What is frozen keeps its value exactly, whatever the momentum of the optimizer; it gets
    gradients of 0.

    Args:
        model: a prepared model, or a module with such models in it.
        enabled: whether they are learned.
        tensors: shell pattern over the names of the tensors meant.

    Returns:
        How many tensors are meant: those with something to learn.

    Raises:
        ConfigError: there is no prepared model, or no quantized tensor of such a name.
    """
    return _switch(
        model,
        tensors,
        lambda stub: bool(stub.trained()),
        lambda stub: setattr(stub, "learning", enabled),
    )


def learn_zero_points(model: nn.Module, enabled: bool = True, *, tensors: str = "*") -> int:
    """Let zero points be learned where scales are, in place, or freeze them and not the scales.

    A zero point moves by whole codes. Freeze it for the last fifth of the steps or so, for the
    weights and scales to settle.

    Args:
        model: a prepared model, or a module with such models in it.
        enabled: whether they are learned.
        tensors: shell pattern over the names of the tensors meant.

    Returns:
        How many tensors are meant: those with ``training="lsq+"`` and a zero point to choose.

    Raises:
        ConfigError: there is no prepared model, or no quantized tensor of such a name.
    """
    return _switch(
        model,
        tensors,
        lambda stub: "zero_point" in stub.trained(),
        lambda stub: setattr(stub, "learning_zero_point", enabled),
    )


def fake_quant(model: nn.Module, enabled: bool = True, *, tensors: str = "*") -> int:
    """Simulate quantization from now on, in place, or compute in float.

    Args:
        model: a calibrated model, or a module with such models in it.
        enabled: whether tensors are rounded.
        tensors: shell pattern over the names of the tensors meant: activations, weights, biases.

    Returns:
        How many tensors are meant.

    Raises:
        ConfigError: there is no prepared model, or no quantized tensor of such a name.
        NotCalibratedError: some are to be rounded but have no scale; nothing was switched.
    """
    found = _named(model, tensors)
    unknown = sorted({s.name for s in found if isinstance(s, Stub) and s.scale.isnan().any()})
    if enabled and unknown:
        names = ", ".join(map(repr, unknown[:SHOWN]))
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise NotCalibratedError(
            f"tensors {names}{more} have no scale yet; run qwrap.calibrate() first"
        )
    for switch in found:
        switch.mode = "quantize" if enabled else "float"
    return len(found)


def _switch(
    model: nn.Module,
    tensors: str,
    is_meant: Callable[[Stub], bool],
    change: Callable[[Stub], None],
) -> int:
    meant = [s for s in _named(model, tensors) if isinstance(s, Stub) and is_meant(s)]
    for stub in meant:
        change(stub)
    return len(meant)


def _named(model: nn.Module, tensors: str) -> list[Switch]:
    """Return all that can be switched on tensors of a name."""
    found = [module for module in model.modules() if isinstance(module, Switch)]
    if not found:
        raise ConfigError(
            "there is no prepared model in this module; call qwrap.prepare(model) first"
        )
    named = [s for s in found if s.name == tensors or fnmatchcase(s.name, tensors)]
    if not named:
        raise ConfigError(f"tensors={tensors!r}: no quantized tensor has such a name")
    return named


When = float | int | None
"""A share of all steps as a float from 0.0 to 1.0, a step as an int, or never."""


class Schedule:
    """Calls the verbs at their steps; a float names a share of all steps, an int a step.

    Making it brings the model to where step 0 has it, in place. What a model has no tensors for is
    left out. With ``state_dict`` a training goes on where it was::

        schedule = qwrap.train.Schedule(model, steps=len(loader) * epochs, learn_scales=0.1)
        for x, y in loader:
            ...
            optimizer.step()
            schedule.step()

    Attributes:
        steps: how many there are.
        taken: how many were taken.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        *,
        fake_quant: When = 0.0,
        learn_scales: When = 0.0,
        freeze_observers: When = 0.5,
        freeze_batch_norm: When = 2 / 3,
        freeze_zero_points: When = 0.8,
    ) -> None:
        """Say when what happens; None is never.

        Args:
            model: a calibrated model, or a module with such models in it.
            steps: how often ``step`` will be called.
            fake_quant: when quantization is simulated; float before.
            learn_scales: when scales and zero points start to be learned.
            freeze_observers: when scales that follow the data stop to.
            freeze_batch_norm: when the statistics of live batch normalizations stay.
            freeze_zero_points: when zero points that are learned stop to be.

        Raises:
            ConfigError: a time lies outside of the steps, or there is no prepared model.
        """
        if steps < 1:
            raise ConfigError(f"steps={steps}: expected 1 or more")
        self.model, self.steps, self.taken = model, steps, 0
        times = {
            "fake_quant": fake_quant,
            "learn_scales": learn_scales,
            "freeze_observers": freeze_observers,
            "freeze_batch_norm": freeze_batch_norm,
            "freeze_zero_points": freeze_zero_points,
        }
        self._at = {verb: _step_of(verb, when, steps) for verb, when in times.items()}
        self._apply(self._at)

    def step(self) -> None:
        """Count a step of the optimizer, and switch in place what comes after it."""
        self.taken += 1
        self._apply([verb for verb, at in self._at.items() if at == self.taken])

    def state_dict(self) -> dict[str, int]:
        """Return how far it is; when what happens is for the caller to say again."""
        return {"taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, and bring the model to it, in place."""
        self.taken = int(state["taken"])
        self._apply(self._at)

    def _apply(self, verbs: Iterable[str]) -> None:
        for verb in verbs:
            at = self._at[verb]
            _VERBS[verb](self.model, at is not None and self.taken >= at)

    def __repr__(self) -> str:
        """Say when what happens."""
        lines = [
            f"  {verb}: " + ("never" if at is None else f"step {at}")
            for verb, at in self._at.items()
        ]
        return "\n".join([f"Schedule({self.taken} of {self.steps} steps", *lines, ")"])


def _freeze_zero_points(model: nn.Module, frozen: bool) -> int:
    return learn_zero_points(model, not frozen)


def _freeze_batch_norm(model: nn.Module, frozen: bool) -> None:
    if any(isinstance(module, LiveBatchNorm) for module in model.modules()):
        freeze_batch_norm(model, frozen)


_VERBS: Mapping[str, Callable[[nn.Module, bool], object]] = {
    "fake_quant": fake_quant,
    "learn_scales": learn_scales,
    "freeze_observers": freeze_observers,
    "freeze_batch_norm": _freeze_batch_norm,
    "freeze_zero_points": _freeze_zero_points,
}


def _step_of(verb: str, when: When, steps: int) -> int | None:
    """Return the number of steps after which ``verb`` holds, None for never."""
    if when is None:
        return None
    end = 1 if isinstance(when, float) else steps
    if isinstance(when, bool) or not 0 <= when <= end:
        raise ConfigError(
            f"{verb}={when}: expected a share of the steps from 0.0 to 1.0, a step from 0 to "
            f"{steps}, or None for never"
        )
    return round(when * steps) if isinstance(when, float) else when
