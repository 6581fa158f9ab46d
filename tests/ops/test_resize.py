"""Resize and Upsample against onnxruntime."""

import itertools

import numpy as np
import pytest

rng = np.random.default_rng(3)
IMAGE = rng.uniform(-1, 1, (1, 2, 5, 7)).astype(np.float32)
SCALES = [
    [1, 1, 2, 2],
    [1, 1, 3, 2],
    [1, 1, 0.6, 0.5],
    [1, 1, 1.7, 2.3],
    [1, 1, 0.2, 1],
]
COORDINATES = [
    "half_pixel",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "half_pixel_symmetric",
]
ROUNDINGS = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]
# Two or four products in another order, in each of two directions.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def sizes(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize(("coordinates", "rounding"), [*itertools.product(COORDINATES, ROUNDINGS)])
def test_nearest_equals_onnxruntime(check, coordinates, rounding, scales) -> None:
    attributes = {"coordinate_transformation_mode": coordinates, "nearest_mode": rounding}
    opset = 19 if coordinates == "half_pixel_symmetric" else 13
    check("Resize", opset, [IMAGE, None, floats(*scales)], attributes)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_interpolation_equals_onnxruntime(check, coordinates, scales, mode) -> None:
    attributes = {"coordinate_transformation_mode": coordinates, "mode": mode}
    opset = 19 if coordinates == "half_pixel_symmetric" else 11
    roi = None if opset == 19 else floats()
    check("Resize", opset, [IMAGE, roi, floats(*scales)], attributes, **CLOSE)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("size", [[1, 2, 8, 3], [1, 2, 10, 14], [1, 2, 1, 1]])
def test_sizes_instead_of_scales_equal_onnxruntime(check, size, mode) -> None:
    check("Resize", 13, [IMAGE, None, None, sizes(*size)], {"mode": mode}, **CLOSE)


@pytest.mark.parametrize("policy", ["stretch", "not_larger", "not_smaller"])
def test_axes_and_aspect_ratio_equal_onnxruntime(check, policy) -> None:
    attributes = {"axes": [2, 3], "keep_aspect_ratio_policy": policy, "mode": "linear"}
    # onnxruntime 1.31 ignores the policy where an axis is negative.
    check("Resize", 18, [IMAGE, None, None, sizes(9, 9)], attributes, **CLOSE)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_crop_and_resize_equals_onnxruntime(check, mode) -> None:
    roi = floats(0, 0, 0.2, -0.3, 1, 1, 0.7, 1.2)
    attributes = {
        "coordinate_transformation_mode": "tf_crop_and_resize",
        "extrapolation_value": 7.0,
        "mode": mode,
    }
    check("Resize", 13, [IMAGE, roi, None, sizes(1, 2, 4, 8)], attributes, **CLOSE)


def test_tf_half_pixel_for_nn_equals_onnxruntime(check) -> None:
    attributes = {"coordinate_transformation_mode": "tf_half_pixel_for_nn"}
    check("Resize", 11, [IMAGE, floats(), floats(1, 1, 0.6, 2)], attributes)


@pytest.mark.parametrize("scales", SCALES)
def test_cubic_without_the_outside_equals_onnxruntime(check, scales) -> None:
    attributes = {"mode": "cubic", "exclude_outside": 1, "cubic_coeff_a": -0.5}
    check("Resize", 13, [IMAGE, None, floats(*scales)], attributes, **CLOSE)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("scales", [*SCALES, [1, 1, 0.4, 0.3]])
def test_antialiasing_equals_onnxruntime(check, scales, mode) -> None:
    attributes = {"mode": mode, "antialias": 1}
    check("Resize", 18, [IMAGE, None, floats(*scales)], attributes, **CLOSE)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scales", SCALES)
def test_resize_of_opset_10_equals_onnxruntime(check, scales, mode) -> None:
    check("Resize", 10, [IMAGE, floats(*scales)], {"mode": mode}, **CLOSE)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scales", [[1.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.5, 2.2]])
def test_upsample_equals_onnxruntime(check, scales, mode) -> None:
    check("Upsample", 9, [IMAGE, floats(*scales)], {"mode": mode}, **CLOSE)
    check("Upsample", 7, [IMAGE], {"scales": scales, "mode": mode}, **CLOSE)


def test_other_ranks_and_integers_equal_onnxruntime(check) -> None:
    line = IMAGE[0]
    check("Resize", 13, [line, None, floats(1, 1, 2.5)], {})
    check("Resize", 13, [line[0], None, floats(2, 1.5)], {"mode": "linear"}, **CLOSE)
    codes = rng.integers(0, 255, (1, 1, 4, 4)).astype(np.uint8)
    check("Resize", 13, [codes, None, floats(1, 1, 2, 2)], {})


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_a_size_after_is_rounded_to_float32_before_it_is_cut(check, mode) -> None:
    # 5 * 2.6 is 12.9999995 for the nearest float32 to 2.6, and 13 rounded to float32.
    check("Resize", 13, [IMAGE, None, floats(1, 1, 2.6, 1)], {"mode": mode}, **CLOSE)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_an_axis_of_scale_one_is_not_cropped(check, mode) -> None:
    roi = floats(0, 0, 0.2, 0.1, 1, 1, 0.9, 1.2)
    attributes = {
        "mode": mode,
        "coordinate_transformation_mode": "tf_crop_and_resize",
        "extrapolation_value": 7.0,
    }
    check("Resize", 13, [IMAGE, roi, floats(1, 1, 1, 1.5)], attributes, **CLOSE)
