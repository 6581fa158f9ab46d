"""What sits on the taps: modules that watch a tensor, then quantize and dequantize it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from qwrap.config import QuantSpec
from qwrap.errors import NotCalibratedError
from qwrap.numerics import QParams, dequantize, fake_quantize, quantize_bias
from qwrap.quant.observers import Observer

Mode = Literal["float", "observe", "quantize"]


class Stub(nn.Module):
    """Rounds a tensor to the grid of its codes once its scale is known; before, passes it on.

    The scale is NaN until it is known. Scale and zero point have their final shape from the start
    and are written in place, so that wrappers which hold on to them (DDP) keep the right ones.

    Attributes:
        name: the ONNX tensor.
        spec: how it is quantized.
        scale: float32 ``[1]`` or ``[C]``.
        zero_point: int32 of the same shape.
        mode: "observe" shows the tensor to ``observer`` and passes it on, "quantize" rounds it,
            "float" passes it on.
        observer: what watches the tensor, None where the scale needs no data.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, name: str, spec: QuantSpec, channels: int = 1, observer: Observer | None = None
    ) -> None:
        super().__init__()
        self.name, self.spec, self.observer = name, spec, observer
        self.mode: Mode = "float"
        self.register_buffer("scale", torch.full((channels,), float("nan")))
        self.register_buffer("zero_point", torch.zeros(channels, dtype=torch.int32))

    @property
    def is_calibrated(self) -> bool:
        """Whether the scale is known."""
        return not bool(self.scale.isnan().any())

    @property
    def qparams(self) -> QParams:
        """Scale and zero point.

        Raises:
            NotCalibratedError: they are not known yet.
        """
        if not self.is_calibrated:
            raise NotCalibratedError(
                f"tensor {self.name!r} has no scale yet; run calibrate() first"
            )
        return QParams(self.scale, self.zero_point, self.spec.axis)

    @torch.no_grad()
    def set_qparams(self, qparams: QParams) -> None:
        """Write scale and zero point, in place."""
        self.scale.copy_(qparams.scale)
        self.zero_point.copy_(qparams.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Observe, quantize or pass on ``x``."""
        if self.mode == "quantize":
            return fake_quantize(x, self.scale, self.zero_point, self.spec)
        if self.mode == "observe" and self.observer is not None:
            self.observer.observe(x)
        return x

    def get_extra_state(self) -> dict[str, Any]:
        """Return the mode."""
        return {"mode": self.mode}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over a saved mode."""
        self.mode = state["mode"]

    def extra_repr(self) -> str:
        """Describe type and granularity in ``print(model)``."""
        axis = "" if self.spec.axis is None else f", axis={self.spec.axis}"
        return f"{self.spec.dtype}{axis}, {self.mode}"


class BiasStub(nn.Module):
    """Rounds a bias to int32 codes at the accumulator's scale: activation scale times weight scale.

    Attributes:
        mode: "quantize" or "float", as in ``Stub``.
    """

    def __init__(self, name: str, activation: Stub, weight: Stub) -> None:
        super().__init__()
        self.name = name
        self.mode: Mode = "float"
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
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        return QParams(scale, zero_point, 0 if scale.numel() > 1 else None)

    def codes(self, bias: Tensor) -> Tensor:
        """Return the int32 codes of ``bias`` ``[C]``."""
        return quantize_bias(bias, self.scale)

    def forward(self, bias: Tensor) -> Tensor:
        """Return the bias that the codes stand for; its gradient passes straight through."""
        if self.mode != "quantize":
            return bias
        rounded = dequantize(self.codes(bias), self.qparams)
        return bias + (rounded - bias).detach()

    def get_extra_state(self) -> dict[str, Any]:
        """Return the mode."""
        return {"mode": self.mode}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over a saved mode."""
        self.mode = state["mode"]

    def extra_repr(self) -> str:
        """Describe the stub in ``print(model)``."""
        return f"int32, {self.mode}"
