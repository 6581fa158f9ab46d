"""Operators that slide windows over images, and what resizes or samples images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from oracles.reductions import SUMS
from oracles.variants import Variant, draw, i64, variants

UPPER, LOWER, VALID = ({"auto_pad": p} for p in ("SAME_UPPER", "SAME_LOWER", "VALID"))


def image(n: int, channels: int = 4) -> np.ndarray:
    return draw(n - 2, channels, n + 6, n + 5)


def line(n: int) -> np.ndarray:
    return draw(n - 2, 4, n + 8)


def volume(n: int) -> np.ndarray:
    return draw(1, 2, n + 2, n + 3, n + 1)


@variants("Conv")
def conv(_: int) -> Iterator[Variant]:
    for attributes in (
        {}, {"pads": [1, 1, 1, 1], "strides": [2, 1]}, {"pads": [0, 1, 2, 0]},
        {"dilations": [2, 3], "pads": [2, 3, 2, 3]}, UPPER, {**UPPER, "strides": [2, 2]},
        {**LOWER, "strides": [2, 3]}, VALID, {"kernel_shape": [3, 3]},
    ):  # fmt: skip
        yield Variant(lambda n: [image(n), draw(6, 4, 3, 3), draw(6)], attributes, **SUMS)
    yield Variant(lambda n: [image(n), draw(6, 4, 3, 3)], **SUMS)
    yield Variant(lambda n: [image(n), draw(8, 2, 2, 2)], {"group": 2}, **SUMS)
    yield Variant(lambda n: [image(n), draw(4, 1, 3, 2)], {"group": 4}, **SUMS)
    yield Variant(lambda n: [line(n), draw(3, 4, 4)], {**LOWER, "strides": [2]}, **SUMS)
    yield Variant(lambda n: [line(n), draw(3, 4, 3)], {"pads": [1, 2], "dilations": [2]}, **SUMS)
    yield Variant(lambda n: [volume(n), draw(3, 2, 3, 3, 2)], {"pads": [1, 1, 1, 1, 1, 0]}, **SUMS)


@variants("ConvTranspose")
def conv_transpose(_: int) -> Iterator[Variant]:
    for attributes in (
        {}, {"strides": [2, 3]}, {"pads": [0, 1, 2, 0]}, {"dilations": [2, 1]},
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
        {"strides": [2, 2], **UPPER}, {"strides": [3, 2], **LOWER}, VALID,
        {"strides": [2, 2], "output_shape": [18, 16]},
        {"strides": [2, 2], "output_shape": [17, 15], **UPPER},
    ):  # fmt: skip
        yield Variant(lambda n: [image(n), draw(4, 3, 3, 3), draw(3)], attributes, **SUMS)
    yield Variant(lambda n: [image(n), draw(4, 3, 2, 2)], {"group": 2}, **SUMS)
    yield Variant(lambda n: [line(n), draw(4, 3, 5)], {"strides": [2], "pads": [2, 1]}, **SUMS)
    yield Variant(lambda n: [volume(n), draw(2, 3, 2, 3, 2)], {"strides": [2, 1, 2]}, **SUMS)


def windows(revision: int, ceil_from: int, dilations_from: int) -> Iterator[dict]:
    """Kernel, stride, padding ... of two-dimensional pools."""
    square, wide = {"kernel_shape": [3, 3]}, {"kernel_shape": [2, 3]}
    yield square
    yield {**wide, "strides": [2, 1], "pads": [1, 0, 0, 1]}
    yield {**square, "strides": [2, 2], "pads": [1, 1, 1, 1]}
    for auto in (UPPER, LOWER, VALID):
        yield {**square, "strides": [2, 2], **auto}
        yield {"kernel_shape": [2, 2], "strides": [1, 3], **auto}
    if revision >= ceil_from:
        yield {**square, "strides": [2, 2], "ceil_mode": 1}
        yield {**square, "strides": [3, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1}
        yield {"kernel_shape": [2, 2], "strides": [3, 3], "pads": [0, 0, 1, 1], "ceil_mode": 1}
        yield {**square, "strides": [2, 2], "ceil_mode": 1, **VALID}
    if revision >= dilations_from:
        yield {**square, "dilations": [2, 1], "pads": [1, 1, 1, 1]}
        yield {**wide, "dilations": [2, 2], "strides": [2, 1], "ceil_mode": 1}


LINES = [{"kernel_shape": [4], "strides": [2], "pads": [2, 1]}, {"kernel_shape": [3]}]
VOLUMES = [{"kernel_shape": [2, 3, 2], "pads": [0, 1, 1, 1, 1, 0]}]


@variants("MaxPool")
def max_pool(revision: int) -> Iterator[Variant]:
    outputs = 2 if revision >= 8 else 1
    for attributes in windows(revision, 10, 10):
        yield Variant(lambda n: [image(n)], attributes, outputs)
    for attributes in LINES:
        yield Variant(lambda n: [line(n)], attributes, outputs)
    for attributes in VOLUMES:
        yield Variant(lambda n: [volume(n)], attributes, outputs)
    if revision >= 8:
        yield Variant(lambda n: [image(n)], {"kernel_shape": [2, 2], "storage_order": 1}, 2)
        yield Variant(lambda n: [image(n)], {"kernel_shape": [2, 2]})
    if revision >= 12:
        for t in (np.int8, np.uint8):
            yield Variant(lambda n, t=t: [draw.of(t, n, 2, 6, n)], {"kernel_shape": [2, 2]})


@variants("AveragePool")
def average_pool(revision: int) -> Iterator[Variant]:
    for attributes in windows(revision, 10, 19):
        yield Variant(lambda n: [image(n)], attributes, **SUMS)
        if revision >= 7 and "pads" in attributes:
            yield Variant(lambda n: [image(n)], {**attributes, "count_include_pad": 1}, **SUMS)
    for attributes in LINES:
        yield Variant(lambda n: [line(n)], attributes, **SUMS)
    for attributes in VOLUMES:
        yield Variant(lambda n: [volume(n)], attributes, **SUMS)


@variants("LpPool")
def lp_pool(revision: int) -> Iterator[Variant]:
    for attributes in windows(revision, 18, 18):
        yield Variant(lambda n: [image(n)], attributes, **SUMS)
    p = 3.0 if revision == 1 else 3
    yield Variant(lambda n: [image(n)], {"kernel_shape": [3, 3], "p": p}, **SUMS)


@variants("GlobalAveragePool", "GlobalMaxPool")
def global_pool(_: int) -> Iterator[Variant]:
    for shape in (image, line, volume):
        yield Variant(lambda n, s=shape: [s(n)], **SUMS)


@variants("GlobalLpPool")
def global_lp_pool(revision: int) -> Iterator[Variant]:
    for p in (None, 1, 3):
        value = float(p) if revision == 1 and p else p
        yield Variant(lambda n: [image(n)], {"p": value}, **SUMS)


@variants("MaxUnpool")
def max_unpool(_: int) -> Iterator[Variant]:
    def pooled(n: int) -> list:
        places = draw.distinct(32 * n).astype(np.int64) + 16 * n
        return [draw(1, 2, 4, n), places[: 8 * n].reshape(1, 2, 4, n)]

    attributes = {"kernel_shape": [2, 2], "strides": [2, 2]}
    yield Variant(pooled, attributes)
    yield Variant(lambda n: [*pooled(n), i64(1, 2, 9, 2 * n + 1)], attributes)


@variants("LRN")
def lrn(_: int) -> Iterator[Variant]:
    yield Variant(lambda n: [draw(2, n + 3, 4, n)], {"size": 3}, **SUMS)
    yield Variant(
        lambda n: [draw(2, n + 3, 4, n)],
        {"size": 5, "alpha": 0.1, "beta": 0.6, "bias": 2.0},
        **SUMS,
    )


@variants("Col2Im")
def col2im(_: int) -> Iterator[Variant]:
    yield Variant(lambda n: [draw(1, 4 * n, 20), i64(5, 6), i64(2, 2)], **SUMS)
    yield Variant(
        lambda n: [draw(n, 8, 24), i64(7, 6), i64(2, 2)],
        {"pads": [0, 1, 2, 0], "dilations": [2, 1], "strides": [2, 1]},
        **SUMS,
    )  # fmt: skip


@variants("DeformConv")
def deform_conv(_: int) -> Iterator[Variant]:
    def offsets(n: int, groups: int = 1) -> np.ndarray:
        return draw(1, 8 * groups, n + 3, 5)

    def x(n: int) -> np.ndarray:
        return draw(1, 4, n + 4, 6)

    yield Variant(lambda n: [x(n), draw(6, 4, 2, 2), offsets(n)], **SUMS)
    yield Variant(
        lambda n: [x(n), draw(6, 2, 2, 2), offsets(n, 2), draw(6), draw(1, 8, n + 3, 5)],
        {"group": 2, "offset_group": 2},
        **SUMS,
    )


TRANSFORMS = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


def resizes(revision: int) -> Iterator[dict]:
    """Attributes of Resize since opset 11."""
    transforms = (*TRANSFORMS, *(("half_pixel_symmetric",) if revision >= 19 else ()))
    for transform, rounding in itertools.product(transforms, ROUNDINGS):
        yield {"coordinate_transformation_mode": transform, "nearest_mode": rounding}
    for mode, transform in itertools.product(("linear", "cubic"), transforms):
        yield {"coordinate_transformation_mode": transform, "mode": mode}
    yield {"mode": "cubic", "cubic_coeff_a": -0.5}
    yield {"mode": "cubic", "exclude_outside": 1}
    if revision >= 18:
        yield {"mode": "linear", "antialias": 1}
        yield {"mode": "cubic", "antialias": 1}


# Weights of a cubic are differences of numbers near 1: one part in a million of the values.
RESIZED = {"rtol": 1e-5, "atol": 1e-5}


@variants("Resize")
def resize(revision: int) -> Iterator[Variant]:
    if revision == 10:
        for mode, scale in itertools.product(("nearest", "linear"), (2.0, 1.5, 0.6)):
            scales = np.array([1, 1, scale, scale], np.float32)
            yield Variant(lambda n, s=scales: [image(n), s], {"mode": mode}, **RESIZED)
        return
    roi = np.zeros(0, np.float32)
    for attributes in resizes(revision):
        for scale in (2.0, 1.3, 0.6):
            scales = np.array([1, 1, scale, scale], np.float32)
            yield Variant(lambda n, s=scales: [image(n), roi, s], attributes, **RESIZED)
    empty = np.zeros(0, np.float32) if revision < 13 else None
    for attributes in ({}, {"mode": "linear"}, {"mode": "cubic"}):
        yield Variant(
            lambda n: [draw(1, 2, n + 3, n + 2), None if empty is None else roi, empty,
                       i64(1, 2, 7, 11)], attributes, **RESIZED,
        )  # fmt: skip
    crop = np.array([0, 0, 0.2, 0.1, 1, 1, 0.7, 0.8], np.float32)
    yield Variant(
        lambda n: [draw(1, 2, n + 3, n + 2), crop, empty, i64(1, 2, 5, 9)],
        {
            "coordinate_transformation_mode": "tf_crop_and_resize",
            "mode": "linear",
            "extrapolation_value": 3.0,
        },
        **RESIZED,
    )
    if revision >= 18:
        for policy in ("stretch", "not_larger", "not_smaller"):
            yield Variant(
                lambda n: [draw(1, 2, n + 3, n + 2), None, None, i64(7, 11)],
                {"keep_aspect_ratio_policy": policy, "axes": [2, 3], "mode": "linear"},
                **RESIZED,
            )


@variants("Upsample")
def upsample(revision: int) -> Iterator[Variant]:
    for mode in ("nearest", "linear" if revision > 1 else "bilinear"):
        if revision == 1:
            yield Variant(
                lambda n: [image(n)], {"mode": mode, "width_scale": 2.0, "height_scale": 1.5},
                **RESIZED,
            )  # fmt: skip
        for h, w in () if revision == 1 else ((2.0, 3.0), (1.5, 1.0)):
            if revision == 7:
                attributes = {"mode": mode, "scales": [1.0, 1.0, h, w]}
                yield Variant(lambda n: [image(n)], attributes, **RESIZED)
            else:
                scales = np.array([1, 1, h, w], np.float32)
                yield Variant(lambda n, s=scales: [image(n), s], {"mode": mode}, **RESIZED)


@variants("GridSample")
def grid_sample(revision: int) -> Iterator[Variant]:
    modes = ("bilinear", "nearest", "bicubic") if revision < 20 else ("linear", "nearest", "cubic")
    for mode, padding, corners in itertools.product(
        modes, ("zeros", "border", "reflection"), (0, 1)
    ):
        attributes = {"mode": mode, "padding_mode": padding, "align_corners": corners}
        yield Variant(
            lambda n: [draw(2, 3, n + 3, 5), draw(2, 4, n, 2, low=-1.4, high=1.4)],
            attributes,
            **RESIZED,
        )
    if revision >= 20:
        yield Variant(
            lambda n: [draw(1, 2, n + 1, 4, 5), draw(1, 3, n, 2, 3, low=-1.2, high=1.2)], **RESIZED
        )


@variants("AffineGrid")
def affine_grid(_: int) -> Iterator[Variant]:
    for corners in (0, 1):
        attributes = {"align_corners": corners}
        yield Variant(lambda n: [draw(2, 2, 3), i64(2, 3, n, 4)], attributes, **SUMS)
        yield Variant(lambda n: [draw(2, 3, 4), i64(2, 3, n, 4, 2)], attributes, **SUMS)


def regions(n: int) -> np.ndarray:
    corners = draw(n, 2, low=0, high=6)
    return np.concatenate([corners, corners + draw(n, 2, low=1, high=6)], 1)


@variants("RoiAlign")
def roi_align(revision: int) -> Iterator[Variant]:
    def make(n: int) -> list:
        return [draw(2, 3, n + 6, 9), regions(n), draw.ints(n, low=0, high=2)]

    sampled = {"output_height": 3, "output_width": 2, "sampling_ratio": 2}
    yield Variant(make, {}, **SUMS)
    yield Variant(make, sampled, **SUMS)
    yield Variant(make, {**sampled, "spatial_scale": 0.7, "mode": "max"}, **SUMS)
    yield Variant(make, {**sampled, "sampling_ratio": 0}, **SUMS)
    if revision >= 16:
        for transform in ("half_pixel", "output_half_pixel"):
            yield Variant(make, {**sampled, "coordinate_transformation_mode": transform}, **SUMS)


@variants("MaxRoiPool")
def max_roi_pool(_: int) -> Iterator[Variant]:
    def make(n: int) -> list:
        batch = draw.ints(n, 1, low=0, high=2).astype(np.float32)
        return [draw(2, 3, n + 6, 9), np.concatenate([batch, regions(n).round()], 1)]

    for scale in (1.0, 0.5):
        yield Variant(make, {"pooled_shape": [2, 3], "spatial_scale": scale})
