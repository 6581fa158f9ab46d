"""Average pooling as onnxruntime computes it on 8-bit codes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.quant.kernels.conv import AutoPad, same_pads
from qwrap.quant.kernels.grid import Grid


@dataclass(frozen=True, slots=True, eq=False)
class QLinearGlobalAveragePool:
    """GlobalAveragePool of one activation.

    Attributes:
        x: grid of the input.
        y: grid of the output.
    """

    x: Grid
    y: Grid

    def __call__(self, x: Tensor) -> Tensor:
        """Return the mean over all spatial axes of x [N, C, ...], kept as axes of length 1."""
        codes = self.x.codes(x).flatten(2)
        size = float(codes.shape[-1])
        # The sum is exact in float64; onnxruntime's is an int32 that it converts to float32.
        total = codes.sum(-1, dtype=torch.float64).float()
        total.mul_(self.x.scale / (self.y.scale * size))
        return self.y.from_steps(total).reshape(*x.shape[:2], *(1,) * (x.dim() - 2))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class QLinearAveragePool:
    """AveragePool of one activation; its attributes are those of the ONNX node.

    onnxruntime adds float32 values, window position by window position, and divides by their count.
    """

    y: Grid
    kernel_shape: tuple[int, ...]
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: AutoPad = "NOTSET"
    ceil_mode: int = 0
    count_include_pad: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the pooled x [N, C, ...], whose values lie on its grid, on the output grid."""
        axes = [self._axis(i, size) for i, size in enumerate(x.shape[2:])]
        total = self._window_sum(F.pad(x, _flat_pads(axes)), axes)
        if self.count_include_pad:
            count = torch.tensor(float(torch.tensor(self.kernel_shape).prod()))
        else:
            inside = F.pad(x.new_ones(x.shape[2:])[None, None], _flat_pads(axes))
            count = self._window_sum(inside, axes)
        steps = total.div_(count.to(x.device)).div_(self.y.scale).add_(self.y.zero_point_u8)
        return self.y.from_shifted_steps(steps)

    def _axis(self, i: int, size: int) -> _Axis:
        rank = len(self.kernel_shape)
        stride = self.strides[i] if self.strides else 1
        kernel = self.kernel_shape[i]
        begin, end = (self.pads[i], self.pads[i + rank]) if self.pads else (0, 0)
        if self.auto_pad.startswith("SAME"):
            begin, end = same_pads(size, kernel, stride, 1, self.auto_pad == "SAME_UPPER")
        length = size + begin + end - kernel
        steps = -(-length // stride) if self.ceil_mode else length // stride
        if self.ceil_mode and steps * stride >= size + begin:
            steps -= 1  # a window that would start in the end padding is dropped
        reach = steps * stride + kernel - size - begin
        return _Axis(kernel, stride, begin, max(reach, 0), steps + 1)

    def _window_sum(self, x: Tensor, axes: Sequence[_Axis]) -> Tensor:
        """Add the window positions in order, first the leading spatial axis."""
        total: Tensor | None = None
        for offset in itertools.product(*(range(a.kernel) for a in axes)):
            view = x
            for i, (start, axis) in enumerate(zip(offset, axes, strict=True)):
                view = view.narrow(i + 2, start, x.shape[i + 2] - start)
                view = view[(slice(None),) * (i + 2) + (slice(0, None, axis.stride),)]
                view = view.narrow(i + 2, 0, axis.outputs)
            total = view.clone() if total is None else total.add_(view)
        assert total is not None, "a kernel has at least one position"
        return total


@dataclass(frozen=True, slots=True)
class _Axis:
    kernel: int
    stride: int
    begin: int
    end: int
    outputs: int


def _flat_pads(axes: Sequence[_Axis]) -> list[int]:
    return [p for a in reversed(axes) for p in (a.begin, a.end)]
