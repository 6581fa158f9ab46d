"""Sampling at the points of a grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.errors import UnsupportedOpError
from qwrap.ops.limits import one_of
from qwrap.ops.precision import accumulator
from qwrap.ops.registry import op

MODES = {"linear": "bilinear", "nearest": "nearest", "cubic": "bicubic"}
PADDINGS = one_of("zeros", "border", "reflection")
NAMES_16 = {"bilinear": "linear", "bicubic": "cubic", "nearest": "nearest"}


@op(
    "GridSample",
    since=(20, 22),
    allowed={"mode": one_of(*MODES), "padding_mode": PADDINGS},
)
def grid_sample(
    X: Tensor,
    grid: Tensor,
    *,
    align_corners: int = 0,
    mode: str = "linear",
    padding_mode: str = "zeros",
) -> Tensor:
    """Interpolate ``X`` at points whose coordinates run from -1 to 1 over each spatial axis.

    ``X`` is ``[N, C, ...]``; the last axis of ``grid`` holds the coordinates, that along the last
    axis of ``X`` first.
    """
    rank = X.ndim - 2
    if not 1 <= rank <= 3 or (rank == 3 and mode == "cubic"):
        raise UnsupportedOpError(
            f"GridSample with mode {mode!r} over {rank} spatial axes; linear and nearest take "
            "1 to 3, cubic 1 or 2"
        )
    wide = accumulator(X)
    x, at = X.to(wide), grid.to(wide)
    if rank == 1:  # a line is an image of one row, sampled in its middle
        x = x.unsqueeze(2)
        at = F.pad(at, (0, 1)).unsqueeze(1)
    y = F.grid_sample(x, at, MODES[mode], padding_mode, bool(align_corners)).to(X.dtype)
    return y.squeeze(2) if rank == 1 else y


@op("GridSample", since=(16,), allowed={"mode": one_of(*NAMES_16), "padding_mode": PADDINGS})
def grid_sample_16(
    X: Tensor,
    grid: Tensor,
    *,
    align_corners: int = 0,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
) -> Tensor:
    """Interpolate images; the modes have the names of two dimensions."""
    return grid_sample(
        X, grid, align_corners=align_corners, mode=NAMES_16[mode], padding_mode=padding_mode
    )


@op("AffineGrid", since=(20,), host=(1,))
def affine_grid(theta: Tensor, size: Sequence[int], *, align_corners: int = 0) -> Tensor:
    """Return the points that the elements of an output of shape ``size`` are mapped to.

    ``theta`` is an affine map of coordinates from -1 to 1, ``[N, 2, 3]`` or ``[N, 3, 4]``.
    """
    axes = [_centres(n, bool(align_corners), theta) for n in size[2:]]
    points = torch.stack([*reversed(torch.meshgrid(axes, indexing="ij"))], -1)
    matrix, shift = theta[:, :, :-1], theta[:, :, -1]
    grid = points.reshape(1, -1, len(axes)) @ matrix.mT + shift.unsqueeze(1)
    return grid.reshape(-1, *size[2:], len(axes))


def _centres(count: int, align_corners: bool, like: Tensor) -> Tensor:
    """Return coordinates from -1 to 1: of elements' centres, or with the outer ones at the ends."""
    at = torch.arange(count, dtype=like.dtype, device=like.device)
    if align_corners:
        return at * (2 / (count - 1)) - 1 if count > 1 else at + 1  # 1 as in onnxruntime
    return (at * 2 + 1) / count - 1
