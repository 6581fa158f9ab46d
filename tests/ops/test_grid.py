"""Sampling at the points of a grid against onnxruntime."""

import itertools

import numpy as np
import pytest
import torch

from qwrap import ops
from qwrap.errors import UnsupportedOpError

rng = np.random.default_rng(13)


def floats(*shape: int) -> np.ndarray:
    return rng.uniform(-1, 1, shape).astype(np.float32)


LINE, IMAGE, VOLUME = floats(2, 3, 7), floats(2, 3, 5, 4), floats(2, 3, 5, 4, 3)
POINTS = {1: floats(2, 6, 1) * 2, 2: floats(2, 6, 3, 2) * 2, 3: floats(2, 4, 3, 2, 3) * 2}
PADDINGS = ["zeros", "border", "reflection"]
# Sixteen products, and the rounding of the coordinates they are weighed by.
CLOSE = {"rtol": 1e-5, "atol": 5e-6}


@pytest.mark.parametrize(("padding", "align"), [*itertools.product(PADDINGS, (0, 1))])
def test_grid_sample_equals_onnxruntime(check, check_compiles, padding, align) -> None:
    how = {"padding_mode": padding, "align_corners": align}
    for mode in ("bilinear", "bicubic", "nearest"):
        check("GridSample", 16, [IMAGE, POINTS[2]], {**how, "mode": mode}, **CLOSE)
    for mode, x in itertools.product(("linear", "nearest"), (IMAGE, VOLUME)):
        inputs, attributes = [x, POINTS[x.ndim - 2]], {**how, "mode": mode}
        check("GridSample", 20, inputs, attributes, **CLOSE)
        check_compiles("GridSample", 20, [torch.from_numpy(a) for a in inputs], attributes)
    check("GridSample", 22, [IMAGE, POINTS[2]], {**how, "mode": "cubic"}, **CLOSE)


@pytest.mark.parametrize(("padding", "align"), [*itertools.product(PADDINGS, (0, 1))])
@pytest.mark.parametrize("mode", ["linear", "nearest", "cubic"])
def test_a_line_is_sampled_like_equal_rows(mode, padding, align) -> None:
    how = {"mode": mode, "padding_mode": padding, "align_corners": align}
    sample = ops.find("", "GridSample", 20).function
    line, points = torch.from_numpy(LINE), torch.from_numpy(POINTS[1])
    image = line.unsqueeze(2).repeat(1, 1, 5, 1)
    grid = torch.cat((points, torch.zeros_like(points)), -1).unsqueeze(1)
    wanted = sample(image, grid, **how).squeeze(2)
    # Weights of equal rows add up to one but for rounding.
    torch.testing.assert_close(sample(line, points, **how), wanted, rtol=1e-5, atol=1e-6)


def test_what_onnx_has_no_kernel_for_is_refused() -> None:
    sample = ops.find("", "GridSample", 20).function
    volume, points = torch.from_numpy(VOLUME), torch.from_numpy(POINTS[3])
    with pytest.raises(UnsupportedOpError, match="over 3 spatial axes"):
        sample(volume, points, mode="cubic")


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_gradients_of_grid_sample_equal_finite_differences(check_random_gradients, mode) -> None:
    check_random_gradients("GridSample", 20, [(1, 2, 4, 5), (1, 3, 2, 2)], [], {"mode": mode})


@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize("size", [[2, 1, 4, 5], [2, 1, 1, 3], [2, 3, 4, 5, 6]])
def test_affine_grid_equals_onnxruntime(check, check_compiles, check_random_gradients, size, align):
    rank = len(size) - 2
    theta, attributes = floats(2, rank, rank + 1), {"align_corners": align}
    # Three products, in another order.
    check("AffineGrid", 20, [theta, np.array(size)], attributes, rtol=1e-5, atol=5e-7)
    check_compiles("AffineGrid", 20, [torch.from_numpy(theta), size], attributes)
    check_random_gradients("AffineGrid", 20, [theta.shape], [size], attributes)
