"""Deformable convolution and overlapping blocks against onnxruntime."""

import numpy as np
import pytest
import torch

from qwrap import ops
from qwrap.errors import UnsupportedOpError

rng = np.random.default_rng(14)


def floats(*shape: int) -> np.ndarray:
    return rng.uniform(-1, 1, shape).astype(np.float32)


IMAGE = floats(2, 4, 7, 8)
CONVOLUTIONS = [
    ([IMAGE, floats(6, 4, 3, 2), floats(2, 12, 5, 7)], {}),
    (
        [IMAGE, floats(6, 2, 3, 3), 3 * floats(2, 36, 3, 7), floats(6), floats(2, 18, 3, 7)],
        {"group": 2, "offset_group": 2, "strides": [2, 1], "pads": [1, 0, 0, 1]},
    ),
    (
        [IMAGE, floats(4, 1, 2, 2), floats(2, 8, 5, 6), None, floats(2, 4, 5, 6)],
        {"group": 4, "dilations": [2, 2]},
    ),
]


@pytest.mark.parametrize(("inputs", "attributes"), CONVOLUTIONS)
def test_deformable_convolution_equals_onnxruntime(
    check, check_compiles, inputs, attributes
) -> None:
    # Up to 36 products, in another order.
    check("DeformConv", 19, inputs, attributes, rtol=1e-5, atol=5e-6)
    tensors = [None if a is None else torch.from_numpy(a) for a in inputs]
    check_compiles("DeformConv", 22, tensors, attributes)


@pytest.mark.parametrize("rank", [1, 3])
def test_without_offsets_it_is_the_convolution(rank) -> None:
    x, w = floats(2, 4, *[5] * rank), floats(6, 2, *[2] * rank)
    zeros = np.zeros((2, rank * 2**rank, *[3] * rank), np.float32)
    attributes = {"group": 2, "dilations": [2] * rank}
    x, w, zeros = (torch.from_numpy(a) for a in (x, w, zeros))
    y = ops.find("", "DeformConv", 22).function(x, w, zeros, **attributes)
    wanted = ops.find("", "Conv", 22).function(x, w, **attributes)
    # Up to 16 products, in another order.
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=2e-6)


def test_gradients_of_deformable_convolution_equal_finite_differences(
    check_random_gradients,
) -> None:
    shapes = [(1, 2, 4, 5), (3, 2, 2, 2), (1, 8, 3, 4), (3,), (1, 4, 3, 4)]
    check_random_gradients("DeformConv", 22, shapes)


def test_groups_of_offsets_must_divide_the_channels() -> None:
    inputs = [torch.from_numpy(a) for a in CONVOLUTIONS[0][0]]
    with pytest.raises(UnsupportedOpError, match="4 channels in 3 groups"):
        ops.find("", "DeformConv", 22).function(*inputs, offset_group=3)


BLOCKS = [
    (floats(2, 12, 20), [5, 6], [2, 2], {}),
    (floats(2, 18, 12), [5, 6], [2, 3], {"pads": [1, 0, 2, 1], "strides": [2, 2]}),
    (floats(1, 12, 12), [5, 6], [2, 2], {"dilations": [2, 2]}),
    (floats(2, 6, 4), [7], [3], {"pads": [1, 1], "strides": [2]}),
    (floats(1, 16, 24), [3, 4, 5], [2, 2, 2], {}),
]


@pytest.mark.parametrize(("x", "image", "block", "attributes"), BLOCKS)
def test_col2im_equals_onnxruntime(check, check_compiles, x, image, block, attributes) -> None:
    shapes = [np.array(image), np.array(block)]
    check("Col2Im", 18, [x, *shapes], attributes, rtol=1e-5, atol=1e-6)
    check_compiles("Col2Im", 18, [torch.from_numpy(x), image, block], attributes)


def test_gradients_of_col2im_equal_finite_differences(check_random_gradients) -> None:
    attributes = {"pads": [1, 0, 0, 1], "dilations": [1, 2]}
    check_random_gradients("Col2Im", 18, [(1, 8, 25)], [[5, 6], [2, 2]], attributes)
