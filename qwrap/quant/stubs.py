"""What sits on the taps: modules that watch a tensor, then quantize and dequantize it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qwrap.config import QuantSpec, Training
from qwrap.errors import NotCalibratedError
from qwrap.learned import Grid, Known, keep_in_graph, learned_fake_quantize
from qwrap.model import shards
from qwrap.numerics import QParams, choose_qparams, fake_quantize, fake_quantize_bias, quantize_bias
from qwrap.quant.follow import is_repeated, range_now
from qwrap.quant.held import Held
from qwrap.quant.learners import LEARNERS, Kind, rule
from qwrap.quant.observe.observers import Observer

Mode = Literal["float", "observe", "quantize"]


class Switch(nn.Module):
    """A tap that can be switched; saves its mode with the ``state_dict``.

    Attributes:
        name: the ONNX tensor.
        mode: "observe" watches the tensor and passes it on, "quantize" rounds it, "float" passes
            it on.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.mode: Mode = "float"

    def get_extra_state(self) -> dict[str, Any]:
        """Return the mode."""
        return {"mode": self.mode}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over a saved mode."""
        self.mode = state["mode"]


class Stub(Switch):
    """Rounds a tensor to the grid of its codes once its scale is known; before, passes it on.

    The initial scale is NaN until it is known. It and the initial zero point are what calibration,
    the user or a file said; training adds to them what its parameters hold, which is nothing at
    first. All have their final shape from the start and are written in place, so that wrappers
    which hold on to them (DDP) keep the right ones.

    Attributes:
        spec: how the tensor is quantized: what the scale is chosen for.
        grid: the same spec, with the ends at which values are clamped.
        initial_scale: float32 ``[1]``, ``[C]``, or one for each block.
        initial_zero_point: int32 of the same shape.
        scale_limit: largest scale, float32 ``[1]``; infinite where there is none.
        training_by: how the scale moves in training.
        observer: what watches the tensor, None where the scale needs no data.
        stored: whether the tensor is a constant of the model, which lives on anyway.
        following: whether the scale goes with the data in training mode, for "follow".
    """

    initial_scale: Tensor
    initial_zero_point: Tensor
    scale_limit: Tensor

    def __init__(
        self,
        name: str,
        spec: QuantSpec,
        shape: Sequence[int] = (1,),
        observer: Observer | None = None,
        *,
        stored: bool = False,
        training_by: Training = "fixed",
    ) -> None:
        super().__init__(name)
        self.spec, self.observer, self.stored = spec, observer, stored
        self.grid = spec if stored else spec.as_computed()
        self.training_by = training_by
        self.following = training_by == "follow"
        self._learning, self._learning_zero_point = True, True
        self.register_buffer("initial_scale", torch.full(tuple(shape), float("nan")))
        zero = torch.zeros(tuple(shape), dtype=torch.int32)
        self.register_buffer("initial_zero_point", zero)
        self.register_buffer("scale_limit", torch.tensor([float("inf")]))
        self._converts: tuple[Stub, ...] = ()
        self._kinds = LEARNERS[training_by].kinds
        self._held: Held | None = None
        for parameter, value in self._start().items():
            self.register_parameter(parameter, nn.Parameter(value))
            self.register_buffer(f"frozen_{parameter}", value.clone())

    def _start(self) -> dict[str, Tensor]:
        learner = LEARNERS[self.training_by]
        return learner.start(self.initial_scale, self.initial_zero_point, self.grid)

    # --- scale and zero point --------------------------------------------------------------------

    def trained(self) -> dict[Kind, nn.Parameter]:
        """Return the parameters that training moves: of the scale, the zero point or the clip."""
        # Not ``get_parameter``: ``torch.func.functional_call`` puts other tensors in their places.
        return {kind: getattr(self, name) for name, kind in self._kinds.items()}

    @property
    def learning(self) -> bool:
        """Whether trained parameters get gradients and count; else gradients are zero.

        What stops learning stays exactly where it is: a copy of the parameter counts, for the
        momentum of an optimizer goes on moving one whose gradient is zero. What starts again goes
        on from there.
        """
        return self._learning

    @learning.setter
    def learning(self, on: bool) -> None:
        self._learn(on, self._learning_zero_point)

    @property
    def learning_zero_point(self) -> bool:
        """Whether, while the stub is learning, so is its zero point."""
        return self._learning_zero_point

    @learning_zero_point.setter
    def learning_zero_point(self, on: bool) -> None:
        self._learn(self._learning, on)

    @torch.no_grad()
    def _learn(self, learning: bool, zero_point: bool) -> None:
        before = self._learns()
        self._learning, self._learning_zero_point = learning, zero_point
        for name, on in self._learns().items():
            if on and not before[name]:
                shards.write(self.get_parameter(name), self._frozen(name))
            elif before[name] and not on:
                self._frozen(name).copy_(shards.whole(self.get_parameter(name)))

    def _frozen(self, name: str) -> Tensor:
        kept: Tensor = getattr(self, f"frozen_{name}")
        return kept

    def _learns(self) -> dict[str, bool]:
        """Return which parameters get gradients."""
        fine = self._learning_zero_point
        return {
            name: self._learning and (fine or kind != "zero_point")
            for name, kind in self._kinds.items()
        }

    @torch.no_grad()
    def _own(self) -> dict[str, Tensor]:
        return {
            name: shards.whole(getattr(self, name)) if on else self._frozen(name)
            for name, on in self._learns().items()
        }

    @property
    def scale(self) -> Tensor:
        """Scale as it is now, NaN where it is not known; without gradient."""
        return self._now()[0]

    @property
    def zero_point(self) -> Tensor:
        """Zero point as it is now, int32."""
        return self._now()[1]

    @torch.no_grad()
    def _now(self) -> tuple[Tensor, Tensor]:
        if not self._kinds:
            return self.initial_scale, self.initial_zero_point
        learner, own = LEARNERS[self.training_by], self._own()
        zero_point = learner.zero_point(self.initial_zero_point, self.grid, own)
        scale = learner.scale(self.initial_scale, zero_point, self.grid, own)
        return torch.minimum(scale, self.scale_limit), zero_point

    @property
    def qparams(self) -> QParams:
        """Scale and zero point as they are now.

        Raises:
            NotCalibratedError: they are not known yet.
        """
        scale, zero_point = self._now()
        if scale.isnan().any():
            raise NotCalibratedError(
                f"tensor {self.name!r} has no scale yet; run qwrap.calibrate() first"
                if self.initial_scale.isnan().any()
                else f"tensor {self.name!r}: its scale has become NaN in training; look for NaN in "
                "the loss, or give scales a lower learning rate"
            )
        return QParams(scale, zero_point, self.spec.axis, self.spec.block_size)

    @torch.no_grad()
    def set_qparams(self, qparams: QParams, limit: float = float("inf")) -> None:
        """Write scale and zero point, in place; training starts from there.

        Args:
            qparams: of the shape of ``initial_scale``.
            limit: largest scale that training may come to.
        """
        self.initial_scale.copy_(qparams.scale)
        self.initial_zero_point.copy_(qparams.zero_point)
        self.scale_limit.fill_(limit)
        for parameter, value in self._start().items():
            shards.write(self.get_parameter(parameter), value)
            self._frozen(parameter).copy_(value)

    @torch.no_grad()
    def forget(self, observer: Observer | None) -> None:
        """Drop the scale, in place, and watch with ``observer`` from now on."""
        unknown = torch.full_like(self.initial_scale, float("nan"))
        self.set_qparams(QParams(unknown, torch.zeros_like(self.initial_zero_point)))
        self.observer = observer

    def convert(self, base: Stub) -> None:
        """Let the scale, where it follows the data, go with that of ``base``, which comes before.

        In place.
        """
        self._converts = (base,)  # in a tuple, so that it is no submodule of this one

    def reach(self) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest value that there are codes for."""
        scale, zero_point = self._now()
        ends = (
            (self.spec.dtype.qmin - zero_point) * scale,
            (self.spec.dtype.qmax - zero_point) * scale,
        )
        return ends[0].amin(), ends[1].amax()

    # --- running ---------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Observe, quantize or pass on ``x``."""
        if self.mode == "quantize":
            if self.following and self.training and not is_repeated():
                self._follow(x)
            return self._quantized(x)
        if self.mode == "observe" and self.observer is not None:
            self.observer.observe(x)
        if self._kinds and self.training and torch.is_grad_enabled():
            return keep_in_graph(x, [*self.trained().values()])
        return x

    def _quantized(self, x: Tensor) -> Tensor:
        scale, zero_point = self._now()
        parameters = [*self.trained().values()]
        if self.grid.dtype.function is not None or not torch.is_grad_enabled():
            self._held = None
            return fake_quantize(x, scale, zero_point, self.grid)
        grid = Grid(scale, zero_point, self.grid, is_alive=self.stored)
        by = None
        learns = [*self._learns().values()]
        if any(learns):
            by = rule(LEARNERS[self.training_by], grid, self.scale_limit, learns)
        known = self._hold(x, grid) if self.stored else None
        return learned_fake_quantize(x, grid, parameters, by, known)

    def _hold(self, x: Tensor, grid: Grid) -> Known | None:
        """Return a constant rounded once for all forward passes until it or its scale changes."""
        frozen = map(self._frozen, self._kinds)
        parts = [self.initial_scale, self.initial_zero_point, *self.trained().values(), *frozen]
        if not all(map(Held.is_possible, (x, *parts))):
            return None
        if self._held is None or not self._held.is_of(x, parts):
            with torch.no_grad():
                self._held = Held.of(x, grid, parts)
        return self._held.known

    def drop_held(self) -> None:
        """Round the constant anew at the next forward pass, in place."""
        self._held = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # observers count in Python
    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        """Give the tensor the scale that goes with what it is now, in place."""
        if self._converts:
            qparams = choose_qparams(*self._converts[0].reach(), self.spec)
        else:
            qparams = range_now(x, self.spec, self.observer)
        self.initial_scale.copy_(torch.minimum(qparams.scale, self.scale_limit))
        self.initial_zero_point.copy_(qparams.zero_point)

    def get_extra_state(self) -> dict[str, Any]:
        """Return mode and flags."""
        return {
            **super().get_extra_state(),
            "learning": self._learning,
            "learning_zero_point": self._learning_zero_point,
            "following": self.following,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over saved mode and flags."""
        super().set_extra_state(state)
        self._learning = state["learning"]  # values and parameters are loaded as they were
        self._learning_zero_point = state["learning_zero_point"]
        self.following = state["following"]

    def extra_repr(self) -> str:
        """Describe type and granularity in ``print(model)``."""
        spec = self.spec
        axis = "" if spec.axis is None else f", axis={spec.axis}"
        block = "" if spec.block_size is None else f", block_size={spec.block_size}"
        trained = "" if self.training_by == "fixed" else f", training={self.training_by}"
        return f"{spec.dtype}{axis}{block}, {self.mode}{trained}"


class BiasStub(Switch):
    """Rounds a bias to int32 codes at the accumulator's scale: activation scale times weight scale.

    It has no scale of its own, so that it follows those two wherever they go.
    """

    def __init__(self, name: str, activation: Stub, weight: Stub) -> None:
        super().__init__(name)
        # In a tuple, so that the stubs are not submodules of this one too.
        self._stubs = (activation, weight)

    @property
    def scale(self) -> Tensor:
        """Scale of the codes, float32 ``[1]`` or ``[C]``."""
        activation, weight = self._stubs
        return activation.scale * weight.scale

    @property
    def qparams(self) -> QParams:
        """Scale, zero point 0, and axis 0 where the weight is quantized per channel."""
        scale = self.scale
        axis = None if self._stubs[1].spec.axis is None else 0
        return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), axis)

    def codes(self, bias: Tensor) -> Tensor:
        """Return the int32 codes of ``bias`` ``[C]``."""
        return quantize_bias(bias, self.scale)

    def forward(self, bias: Tensor) -> Tensor:
        """Return the bias that the codes stand for; its gradient passes straight through."""
        if self.mode != "quantize":
            return bias
        rounded = fake_quantize_bias(bias, self.scale)
        return rounded + (bias - bias.detach())  # adds zero, so that the value stays exact

    def extra_repr(self) -> str:
        """Describe the stub in ``print(model)``."""
        return f"int32, {self.mode}"
