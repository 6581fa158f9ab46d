"""Weights of few bits that jump to and fro between two codes: damped, or frozen.

A latent weight next to the middle between two codes is pushed over it by every other step, for the
straight-through gradient does not see how near it is. The codes never settle, and what was measured
of their products (batch normalisation) is wrong for the next step.

Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", arXiv:2203.08086.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwrap.errors import ConfigError
from qwrap.numerics import fake_quantize, quantize
from qwrap.quant.stubs import Stub
from qwrap.train.weights import RoundedWeight, rounded_weights


def dampening(model: nn.Module) -> Tensor:
    """Return how far latent weights lie from what they are rounded to, to be added to the loss.

    The sum of ``(rounded - clip(weight))^2`` over all weights in range, a scalar with gradients for
    the weights alone: neither scales nor weights beyond their range are drawn. Its factor should
    grow from 0 in the course of the training, or it holds weights where they started::

        loss = loss_fn(model(x), y) + factor * qwrap.train.dampening(model)

    Args:
        model: a calibrated model, or a module with such models in it.

    Raises:
        ConfigError: it has no quantized weight that is trained, or FSDP has sharded it.

    Source: arXiv:2203.08086, section 4.2.
    """
    losses = [_distance(item) for item in rounded_weights(model)]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def _distance(item: RoundedWeight) -> Tensor:
    stub, weight = item.stub, item.latent()
    if stub.mode != "quantize":
        return (0 * weight).sum()
    scale, zero_point = stub.scale, stub.zero_point
    with torch.no_grad():
        rounded = fake_quantize(weight, scale, zero_point, stub.grid)
        low = item.over((stub.grid.qmin - zero_point) * scale).to(weight.dtype)
        high = item.over((stub.grid.qmax - zero_point) * scale).to(weight.dtype)
    return (rounded - weight.clamp(low, high)).to(torch.float32).square().sum()


class OscillationFreezer:
    """Counts how often the code of each weight turns back, and freezes those that do so too often.

    Call ``step()`` after each step of the optimizer::

        freezer = qwrap.train.OscillationFreezer(model, threshold=(0.04, 0.01), steps=steps)
        for x, y in loader:
            ...
            optimizer.step()
            freezer.step()

    A frozen weight keeps the code that it had most of the time. It is written back to the middle of
    that code after each step, so that a learned scale moves it along; whatever gradients and
    momentum say does not count. Keeps 11 bytes for each weight of up to 8 bits, 12 of uint8 and
    int16, 14 of uint16.

    Attributes:
        momentum: weight of the last step in the average of how often a code turns back.
        taken: steps taken.

    Source: arXiv:2203.08086, section 4.3 and algorithm 1.
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float | tuple[float, float] = 0.02,
        momentum: float = 0.01,
        *,
        steps: int | None = None,
    ) -> None:
        """Look at the codes as they are now.

        Args:
            model: a prepared model, or a module with such models in it.
            threshold: share of the steps in which a code turns back, on average, beyond which it is
                frozen. Two numbers are its value at the start and, along a cosine, at the end.
            momentum: of that average; 0.01 looks back on some 100 steps.
            steps: how many there will be, for two thresholds.

        Raises:
            ConfigError: an argument makes no sense, the model has no trained weight of an integer
                type, or FSDP has sharded it.
        """
        ends = threshold if isinstance(threshold, tuple) else (threshold, threshold)
        if not all(end >= 0 for end in ends) or not 0 < momentum <= 1:
            raise ConfigError(
                f"threshold={threshold}, momentum={momentum}: expected 0 or more, and more than 0 "
                "up to 1"
            )
        if isinstance(threshold, tuple) and (steps is None or steps < 1):
            raise ConfigError(
                f"threshold={threshold} changes in the course of training: say of how many steps, "
                f"not steps={steps}"
            )
        self._ends, self._steps, self.momentum, self.taken = ends, steps or 1, momentum, 0
        self._items = rounded_weights(model, _is_integer)
        self._states = {item.name: _Codes.of(item) for item in self._items}

    @property
    def threshold(self) -> float:
        """The threshold of the next step."""
        start, end = self._ends
        share = min(self.taken / self._steps, 1.0)
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    @torch.no_grad()
    def step(self) -> None:
        """Look at what the optimizer has done, and write frozen weights back, in place.

        Weights that are not quantized now are passed over.
        """
        for item in self._items:
            state = self._states[item.name]
            if item.stub.mode == "quantize" and not item.stub.scale.isnan().any():
                state.look(item, self.threshold, self.momentum)
        self.taken += 1

    def frozen(self) -> dict[str, float]:
        """Return the share of frozen weights by the name of the tensor."""
        return {name: float(s.frozen.float().mean()) for name, s in self._states.items()}

    def frequencies(self) -> dict[str, Tensor]:
        """Return how often each code turns back, in shares of a step, by the name of the tensor."""
        return {name: state.frequency for name, state in self._states.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return all that was counted; tensors and numbers."""
        return {
            "taken": self.taken,
            "weights": {name: state.to_dict() for name, state in self._states.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was counted before, in place.

        Raises:
            ConfigError: it is of other weights.
        """
        saved = state["weights"]
        shapes = {name: tuple(s.frozen.shape) for name, s in self._states.items()}
        if {name: tuple(s["frozen"].shape) for name, s in saved.items()} != shapes:
            raise ConfigError("this state is of a model with other quantized weights")
        self.taken = int(state["taken"])
        for name, own in self._states.items():
            own.load(saved[name])


class _Codes:
    """What is known of the codes of one weight; all tensors have its shape."""

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes
        self.turned = torch.zeros_like(codes, dtype=torch.int8)  # where it went when it last moved
        self.frequency = torch.zeros_like(codes, dtype=torch.float32)
        self.average = codes.to(torch.float32)
        self.frozen = torch.zeros_like(codes, dtype=torch.bool)
        self.is_known = True

    @classmethod
    def of(cls, item: RoundedWeight) -> _Codes:
        stub, codes = item.stub, item.stub.spec.dtype
        widths = (torch.int8, torch.int16, torch.int32)
        width = next(t for t in widths if codes.qmax <= torch.iinfo(t).max)
        if not stub.scale.isnan().any():
            return cls(_codes_of(item).to(width))
        made = cls(torch.zeros_like(item.weight, dtype=width))
        made.is_known = False
        return made

    def look(self, item: RoundedWeight, threshold: float, momentum: float) -> None:
        """Compare with the codes of the step before; freeze and write back, in place."""
        self._move_to(item.weight.device)
        codes = _codes_of(item).to(self.codes.dtype)
        if not self.is_known:
            self.codes, self.average, self.is_known = codes, codes.to(torch.float32), True
            return
        codes = torch.where(self.frozen, self.codes, codes)
        direction = (codes > self.codes).to(torch.int8) - (codes < self.codes).to(torch.int8)
        turns = (direction * self.turned) < 0
        self.frequency.lerp_(turns.to(torch.float32), momentum)
        self.average.lerp_(codes.to(torch.float32), momentum)
        self.turned = torch.where(direction != 0, direction, self.turned)
        stuck = (self.frequency > threshold) & ~self.frozen
        self.codes = torch.where(stuck, self.average.round().to(codes.dtype), codes)
        self.frozen |= stuck
        self._write_back(item)

    def _write_back(self, item: RoundedWeight) -> None:
        if self.frozen.any():
            steps = (self.codes - item.over(item.stub.zero_point)).to(torch.float32)
            item.write(self.frozen, steps * item.over(item.stub.scale))

    def _move_to(self, device: torch.device) -> None:
        if self.codes.device != device:
            for name, value in self.to_dict().items():
                if isinstance(value, Tensor):
                    setattr(self, name, value.to(device))

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load(self, saved: Mapping[str, Any]) -> None:
        for name, own in self.to_dict().items():
            value = saved[name]
            is_tensor = isinstance(own, Tensor)
            setattr(self, name, value.to(own, copy=True) if is_tensor else bool(value))


def _codes_of(item: RoundedWeight) -> Tensor:
    return quantize(item.weight, item.stub.qparams, item.stub.grid)


def _is_integer(stub: Stub) -> bool:
    return stub.spec.dtype.is_integer
