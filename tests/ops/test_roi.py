"""Pooling of regions of interest against onnxruntime."""

import itertools

import numpy as np
import pytest
import torch

from qwrap import ops

rng = np.random.default_rng(11)
IMAGE = rng.uniform(-1, 1, (2, 3, 9, 8)).astype(np.float32)
# Inside, across the border, outside, upside down, and of no extent.
REGIONS = np.array(
    [[1, 2, 5, 7.5], [-3, -2, 4, 20], [12, 1, 15, 3], [5, 6, 2, 4], [3, 3, 3, 3]], np.float32
)
BATCH = np.array([0, 1, 1, 0, 1])
SIZE = {"output_height": 3, "output_width": 2}
# Four products for each sample, up to nine samples.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize(("mode", "ratio"), [*itertools.product(("avg", "max"), (0, 1, 2))])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_roi_align_equals_onnxruntime(check, mode, ratio, scale) -> None:
    attributes = {**SIZE, "mode": mode, "sampling_ratio": ratio, "spatial_scale": scale}
    check("RoiAlign", 10, [IMAGE, REGIONS, BATCH], attributes, **CLOSE)
    regions, batch = (REGIONS, BATCH) if ratio else (REGIONS[[0, 1, 2]], BATCH[:3])
    check("RoiAlign", 16, [IMAGE, regions, batch], attributes, **CLOSE)
    attributes["coordinate_transformation_mode"] = "output_half_pixel"
    check("RoiAlign", 22, [IMAGE, REGIONS, BATCH], attributes, **CLOSE)


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_gradients_of_roi_align_equal_finite_differences(mode) -> None:
    image = torch.from_numpy(IMAGE[:, :1]).double().requires_grad_()
    # Off the grid, where interpolation has a kink.
    regions = (torch.from_numpy(REGIONS[:2]).double() + 0.0371).requires_grad_()
    align = ops.find("", "RoiAlign", 16).function

    def of_both(image: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
        batch = torch.tensor([0, 1])
        return align(image, regions, batch, **SIZE, mode=mode, sampling_ratio=2)

    assert torch.autograd.gradcheck(of_both, (image, regions), fast_mode=True)


def test_no_regions_give_no_output() -> None:
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    for mode in ("avg", "max"):
        y = ops.find("", "RoiAlign", 16).function(torch.from_numpy(IMAGE), *none, **SIZE, mode=mode)
        assert y.shape == (0, 3, 3, 2)


@pytest.mark.parametrize("ratio", [1, 2])
def test_a_fixed_number_of_samples_compiles(check_compiles, ratio) -> None:
    inputs = [torch.from_numpy(a) for a in (IMAGE, REGIONS, BATCH)]
    for mode in ("avg", "max"):
        check_compiles("RoiAlign", 16, inputs, {**SIZE, "mode": mode, "sampling_ratio": ratio})


@pytest.mark.parametrize("shape", [[1, 1], [3, 2], [9, 8]])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_max_roi_pool_equals_onnxruntime(check, check_compiles, shape, scale) -> None:
    regions = np.concatenate((BATCH[:, None], abs(REGIONS)), 1).astype(np.float32)
    attributes = {"pooled_shape": shape, "spatial_scale": scale}
    check("MaxRoiPool", 1, [IMAGE, regions], attributes)
    tensors = [torch.from_numpy(IMAGE), torch.from_numpy(regions)]
    check_compiles("MaxRoiPool", 22, tensors, attributes)


def test_gradients_of_max_roi_pool_equal_finite_differences() -> None:
    regions = torch.tensor([[0, 1, 2, 5, 7], [1, 0, 0, 7, 8]], dtype=torch.float64)
    image = torch.from_numpy(IMAGE).double().requires_grad_()
    pool = ops.find("", "MaxRoiPool", 22).function
    assert torch.autograd.gradcheck(
        lambda x: pool(x, regions, pooled_shape=[3, 2]), (image,), fast_mode=True
    )
