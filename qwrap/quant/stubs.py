"""What sits on the taps: modules that watch a tensor, then quantize and dequantize it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qwrap.config import QuantSpec
from qwrap.errors import NotCalibratedError
from qwrap.numerics import QParams, dequantize, fake_quantize, quantize_bias
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

    The scale is NaN until it is known. Scale and zero point have their final shape from the start
    and are written in place, so that wrappers which hold on to them (DDP) keep the right ones.

    Attributes:
        spec: how the tensor is quantized: what the scale is chosen for.
        grid: the same spec, with the ends at which values are clamped.
        scale: float32 ``[1]``, ``[C]``, or one for each block.
        zero_point: int32 of the same shape.
        observer: what watches the tensor, None where the scale needs no data.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        name: str,
        spec: QuantSpec,
        shape: Sequence[int] = (1,),
        observer: Observer | None = None,
        *,
        stored: bool = False,
    ) -> None:
        super().__init__(name)
        self.spec, self.observer = spec, observer
        self.grid = spec if stored else spec.as_computed()
        self.register_buffer("scale", torch.full(tuple(shape), float("nan")))
        self.register_buffer("zero_point", torch.zeros(tuple(shape), dtype=torch.int32))

    @property
    def qparams(self) -> QParams:
        """Scale and zero point.

        Raises:
            NotCalibratedError: they are not known yet.
        """
        if self.scale.isnan().any():
            raise NotCalibratedError(
                f"tensor {self.name!r} has no scale yet; run qwrap.calibrate() first"
            )
        return QParams(self.scale, self.zero_point, self.spec.axis, self.spec.block_size)

    @torch.no_grad()
    def set_qparams(self, qparams: QParams) -> None:
        """Write scale and zero point, in place."""
        self.scale.copy_(qparams.scale)
        self.zero_point.copy_(qparams.zero_point)

    @torch.no_grad()
    def forget(self, observer: Observer | None) -> None:
        """Drop the scale, in place, and watch with ``observer`` from now on."""
        self.scale.fill_(float("nan"))
        self.observer = observer

    def forward(self, x: Tensor) -> Tensor:
        """Observe, quantize or pass on ``x``."""
        if self.mode == "quantize":
            return fake_quantize(x, self.scale, self.zero_point, self.grid)
        if self.mode == "observe" and self.observer is not None:
            self.observer.observe(x)
        return x

    def extra_repr(self) -> str:
        """Describe type and granularity in ``print(model)``."""
        spec = self.spec
        axis = "" if spec.axis is None else f", axis={spec.axis}"
        block = "" if spec.block_size is None else f", block_size={spec.block_size}"
        return f"{spec.dtype}{axis}{block}, {self.mode}"


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
        rounded = dequantize(self.codes(bias), self.qparams)
        return rounded + (bias - bias.detach())  # adds zero, so that the value stays exact

    def extra_repr(self) -> str:
        """Describe the stub in ``print(model)``."""
        return f"int32, {self.mode}"
