"""Resize and Upsample.

Every axis is resized on its own: each output position is a weighted sum of a few input positions
(``Taps``). Coordinates are computed in float32, in the order of onnxruntime's operations, because
a nearest neighbour flips when a coordinate moves by one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.ops.limits import at_least, one_of
from qwrap.ops.registry import op


@dataclass(frozen=True, slots=True)
class Axis:
    """How one axis is resized: size before and after, and input elements covered by the roi."""

    axis: int
    before: int
    after: int
    scale: float
    roi: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Sampling:
    """The attributes that say where output elements lie and how input elements are weighed."""

    mode: str = "nearest"
    coordinates: str = "half_pixel"
    nearest: str = "round_prefer_floor"
    cubic_a: float = -0.75
    exclude_outside: bool = False
    extrapolation_value: float = 0.0
    antialias: bool = False


def _coordinates(axis: Axis, how: str, device: torch.device) -> Tensor:
    """Return where in the input each output element lies."""
    x = torch.arange(axis.after, device=device, dtype=torch.float32)
    n, scale = axis.before, axis.scale
    if how == "half_pixel" or (how == "pytorch_half_pixel" and axis.after > 1):
        return (x + 0.5) / scale - 0.5
    if how == "pytorch_half_pixel":
        return x * 0
    if how == "asymmetric":
        return x / scale
    if how == "align_corners":
        return x * (n - 1) / (axis.after - 1) if axis.after > 1 else x * 0
    if how == "tf_half_pixel_for_nn":
        return (x + 0.5) / scale
    if how == "half_pixel_symmetric":
        # onnxruntime rounds the offset to float32 and computes the rest in double.
        size = torch.full((), n, dtype=torch.float32, device=device)
        # Not `axis.after / ...`: torch divides a number by a tensor as a rounded inverse.
        adjustment = torch.full_like(size, axis.after) / (size * scale)
        offset = size / 2 * (1 - adjustment)
        return (offset.double() + (x.double() + 0.5) / scale - 0.5).float()
    assert how == "tf_crop_and_resize"
    low, high = axis.roi
    if axis.after > 1:
        return low * (n - 1) + x * (high - low) * (n - 1) / (axis.after - 1)
    return x + 0.5 * (low + high) * (n - 1)


ROUNDINGS: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "round_prefer_floor": lambda x, _: torch.ceil(x - 0.5),
    "round_prefer_ceil": lambda x, _: torch.floor(x + 0.5),
    "floor": lambda x, _: torch.floor(x),
    "ceil": lambda x, _: torch.ceil(x),
    # Before opset 11 nothing was said; this is what onnxruntime does.
    "simple": lambda x, shrinks: torch.ceil(x) if shrinks else torch.trunc(x),
}


def _linear(distance: Tensor, _: float) -> Tensor:
    return (1 - distance.abs()).clamp(min=0)


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' kernel of width 4."""
    d = distance.abs()
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))


KERNELS: dict[str, tuple[int, Callable[[Tensor, float], Tensor]]] = {
    "linear": (1, _linear),
    "cubic": (2, _cubic),
}


def _taps(axis: Axis, how: Sampling, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return input positions and their weights, both ``[taps, after]``."""
    reach, kernel = KERNELS[how.mode]
    stretch = max(1 / axis.scale, 1.0) if how.antialias else 1.0
    support = math.ceil(reach * stretch)
    centre = x.floor()
    offsets = torch.arange(1 - support, support + 1, device=x.device).unsqueeze(1)
    positions = centre + offsets
    weights = kernel((positions - x) / stretch, how.cubic_a)
    if how.exclude_outside:
        inside = (positions >= 0) & (positions <= axis.before - 1)
        weights = torch.where(inside, weights, 0.0)
    if how.exclude_outside or how.antialias:
        weights = weights / weights.sum(0)
    return positions.clamp(0, axis.before - 1).long(), weights


def _resize_axis(data: Tensor, axis: Axis, how: Sampling) -> Tensor:
    x = _coordinates(axis, how.coordinates, data.device)
    if how.mode == "nearest":
        index = ROUNDINGS[how.nearest](x, axis.scale < 1).clamp(0, axis.before - 1)
        y = data.index_select(axis.axis, index.long())
    else:
        along = [1] * data.ndim
        along[axis.axis] = -1
        total: Tensor | None = None
        for index, weight in zip(*_taps(axis, how, x), strict=True):
            term = data.index_select(axis.axis, index) * weight.to(data.dtype).reshape(along)
            total = term if total is None else total + term
        assert total is not None
        y = total
    if how.coordinates != "tf_crop_and_resize":
        return y
    along = [1] * data.ndim
    along[axis.axis] = -1
    outside = ((x < 0) | (x > axis.before - 1)).reshape(along)
    return torch.where(outside, how.extrapolation_value, y)


def _resize(data: Tensor, axes: Sequence[Axis], how: Sampling) -> Tensor:
    """Resize ``axes`` of ``data``; the others keep their size."""
    # As in onnxruntime, whatever the mode: an axis of scale 1 is not cropped to its roi either.
    axes = [a for a in axes if a.before != a.after or a.scale != 1]
    if not axes:
        return data
    fast = _interpolated(data, axes, how)
    if fast is not None:
        return fast
    original = data.dtype
    if how.mode != "nearest" and not original.is_floating_point:
        data = data.float()
    for axis in axes:
        data = _resize_axis(data, axis, how)
    return data.to(original)


def _interpolated(data: Tensor, axes: Sequence[Axis], how: Sampling) -> Tensor | None:
    """Return what ``F.interpolate`` makes of the two inner axes of four, where that is the same."""
    if data.ndim != 4 or any(a.axis < 2 for a in axes) or not data.dtype.is_floating_point:
        return None
    by_axis = {a.axis: a for a in axes}
    size = [by_axis[i].after if i in by_axis else data.shape[i] for i in (2, 3)]
    if how.mode == "nearest" and all(_is_repetition(a, how) for a in axes):
        return F.interpolate(data, size=size, mode="nearest")
    if how.mode != "linear" or how.antialias or how.exclude_outside:
        return None
    if how.coordinates == "align_corners":
        return F.interpolate(data, size=size, mode="bilinear", align_corners=True)
    exact = all(a.scale * a.before == a.after for a in axes)
    one = how.coordinates == "pytorch_half_pixel" and any(a.after == 1 for a in axes)
    if exact and not one and how.coordinates.endswith(("half_pixel", "half_pixel_symmetric")):
        return F.interpolate(data, size=size, mode="bilinear", align_corners=False)
    return None


def _is_repetition(axis: Axis, how: Sampling) -> bool:
    """Whether every element is just repeated a whole number of times."""
    if axis.after != axis.scale * axis.before or axis.scale != math.floor(axis.scale):
        return False
    if how.coordinates in ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric"):
        return how.nearest in ("round_prefer_floor", "round_prefer_ceil")
    if how.coordinates == "asymmetric":
        return how.nearest in ("floor", "simple") or (
            how.nearest == "round_prefer_floor" and axis.scale <= 2
        )
    return False


def _single(x: float) -> float:
    """Round to float32, in which onnxruntime multiplies sizes by scales: 10 * 1.3 is 13 there.

    Arithmetic alone, so that sizes may be symbolic. Source: T. J. Dekker, "A floating-point
    technique for extending the available precision", 1971: leaves 53 - 29 bits.
    """
    split = x * (2.0**29 + 1)
    return split - (split - x)


def _fitted(
    sizes: Sequence[int], before: Sequence[int], policy: str
) -> tuple[list[int], list[float]]:
    """Return the sizes after and the scales that wanted ``sizes`` mean under a policy."""
    scales = [after / n for after, n in zip(sizes, before, strict=True)]
    if policy == "stretch":
        return list(sizes), scales
    scale = min(scales) if policy == "not_larger" else max(scales)
    return [math.floor(scale * n + 0.5) for n in before], [scale] * len(scales)


COORDINATES = (
    *("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_crop_and_resize"),
    *("tf_half_pixel_for_nn", "half_pixel_symmetric"),
)
SAMPLING = {
    "coordinate_transformation_mode": one_of(*COORDINATES),
    "mode": one_of("nearest", *KERNELS),
    "nearest_mode": one_of("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"),
}
POLICIES = one_of("stretch", "not_larger", "not_smaller")


@op(
    "Resize",
    since=(18, 19),
    host=(1, 2, 3),
    allowed={**SAMPLING, "keep_aspect_ratio_policy": POLICIES},
)
def resize(
    X: Tensor,
    roi: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
    sizes: Sequence[int] | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Resize ``axes`` (default all) by ``scales`` or to ``sizes``."""
    axes = [axis % X.ndim for axis in (range(X.ndim) if axes is None else axes)]
    before = [X.shape[axis] for axis in axes]
    if sizes:
        after, scales = _fitted(sizes, before, keep_aspect_ratio_policy)
    else:
        assert scales
        after = [math.floor(_single(n * scale)) for n, scale in zip(before, scales, strict=True)]
    rois = [(0.0, 1.0)] * len(axes)
    if roi and coordinate_transformation_mode == "tf_crop_and_resize":
        rois = list(zip(roi[: len(axes)], roi[len(axes) :], strict=True))
    how = Sampling(
        mode=mode,
        coordinates=coordinate_transformation_mode,
        nearest=nearest_mode,
        cubic_a=cubic_coeff_a,
        exclude_outside=bool(exclude_outside),
        extrapolation_value=extrapolation_value,
        antialias=bool(antialias),
    )
    return _resize(X, [Axis(*a) for a in zip(axes, before, after, scales, rois, strict=True)], how)


@op("Resize", since=(11, 13), host=(1, 2, 3), allowed=SAMPLING)
def resize_all_axes(
    X: Tensor,
    roi: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
    sizes: Sequence[int] | None = None,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Resize all axes by ``scales`` or to ``sizes``."""
    return resize(
        X,
        roi,
        scales,
        sizes,
        coordinate_transformation_mode=coordinate_transformation_mode,
        cubic_coeff_a=cubic_coeff_a,
        exclude_outside=exclude_outside,
        extrapolation_value=extrapolation_value,
        mode=mode,
        nearest_mode=nearest_mode,
    )


MODES_10 = {"mode": one_of("nearest", "linear", "bilinear")}


@op("Resize", since=(10,), host=(1,), allowed=MODES_10)
@op("Upsample", since=(9, 10), host=(1,), allowed=MODES_10)
def upsample(X: Tensor, scales: Sequence[float], *, mode: str = "nearest") -> Tensor:
    """Resize all axes by ``scales``, the first elements aligned."""
    return resize(
        X,
        None,
        scales,
        coordinate_transformation_mode="asymmetric",
        mode="linear" if mode == "bilinear" else mode,
        nearest_mode="simple",
    )


@op("Upsample", since=(7,), allowed={**MODES_10, "scales": at_least(1)})
def upsample_attribute(X: Tensor, *, scales: Sequence[float], mode: str = "nearest") -> Tensor:
    """Enlarge all axes by ``scales``, the first elements aligned."""
    return upsample(X, scales, mode=mode)


@op(
    "Upsample",
    since=(1,),
    allowed={**MODES_10, "height_scale": at_least(1), "width_scale": at_least(1)},
)
def upsample_image(
    X: Tensor, *, height_scale: float, width_scale: float, mode: str = "nearest"
) -> Tensor:
    """Enlarge height and width, the first elements aligned."""
    return upsample(X, [1.0, 1.0, height_scale, width_scale], mode=mode)
