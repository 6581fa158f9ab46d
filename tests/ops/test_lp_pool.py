"""Pooling by a norm and unpooling against onnxruntime."""

import numpy as np
import pytest
import torch

from qwrap import ops

rng = np.random.default_rng(10)


def floats(*shape: int) -> np.ndarray:
    return rng.uniform(-1, 1, shape).astype(np.float32)


IMAGE, LINE, VOLUME = floats(2, 3, 9, 8), floats(2, 3, 11), floats(1, 2, 5, 6, 4)
# Up to a dozen powers, their sum in another order, and a root.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
KERNEL_2, KERNEL_3 = {"kernel_shape": [2, 2]}, {"kernel_shape": [3, 3]}
POOLS = [
    (2, IMAGE, {**KERNEL_3, "p": 1}),
    (11, IMAGE, {**KERNEL_3, "strides": [2, 2], "pads": [1, 0, 1, 2]}),
    (11, IMAGE, {**KERNEL_2, "p": 3, "auto_pad": "SAME_LOWER"}),
    (11, LINE, {"kernel_shape": [4], "strides": [3], "auto_pad": "SAME_UPPER"}),
    (18, IMAGE, {**KERNEL_2, "dilations": [2, 3], "strides": [1, 2]}),
    (18, IMAGE, {**KERNEL_3, "ceil_mode": 1, "strides": [2, 3], "pads": [1, 1, 1, 1]}),
    (22, VOLUME, {"kernel_shape": [2, 3, 2], "pads": [0, 1, 1, 1, 1, 0]}),
]


@pytest.mark.parametrize(("opset", "x", "attributes"), POOLS)
def test_lp_pool_equals_onnxruntime(check, check_compiles, opset, x, attributes) -> None:
    check("LpPool", opset, [x], attributes, **CLOSE)
    check_compiles("LpPool", opset, [torch.from_numpy(x)], attributes)


def test_the_first_lp_pools_take_a_fraction_as_p() -> None:
    x = torch.from_numpy(IMAGE)
    wanted = (x.abs() ** 1.5).sum((2, 3), keepdim=True) ** (1 / 1.5)
    everything = {"kernel_shape": [9, 8], "p": 1.5}
    pooled = ops.find("", "LpPool", 1).function(x, **everything)
    # 72 powers, summed in another order.
    torch.testing.assert_close(pooled, wanted, rtol=1e-5, atol=0)
    pooled = ops.find("", "GlobalLpPool", 1).function(x, p=1.5)
    torch.testing.assert_close(pooled, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_global_lp_pool_equals_onnxruntime(check, p) -> None:
    check("GlobalLpPool", 2, [IMAGE], {"p": p}, **CLOSE)
    check("GlobalLpPool", 2, [VOLUME], {"p": p}, **CLOSE)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_gradients_equal_finite_differences(check_random_gradients, p) -> None:
    attributes = {"kernel_shape": [2, 3], "strides": [2, 1], "pads": [1, 0, 0, 1], "p": p}
    check_random_gradients("LpPool", 22, [(1, 2, 5, 4)], [], attributes)
    check_random_gradients("GlobalLpPool", 22, [(1, 2, 5, 4)], [], {"p": p})


def test_the_gradient_of_zeros_is_zero() -> None:
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    ops.find("", "LpPool", 22).function(x, **KERNEL_2).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


POOLED = {"kernel_shape": [2, 2], "strides": [2, 2]}


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (2, 3, 9, 7)])
def test_max_unpool_takes_the_indices_of_max_pool(check, shape) -> None:
    x = torch.from_numpy(floats(*shape))
    y, index = ops.find("", "MaxPool", 12).function(x, **POOLED, output_count=2)
    check("MaxUnpool", 11, [y.numpy(), index.numpy(), np.array(shape)], POOLED)
    unpooled = ops.find("", "MaxUnpool", 11).function(y, index, list(shape), **POOLED)
    assert torch.equal(unpooled[unpooled != 0].sort()[0], y.flatten().sort()[0])
    assert torch.equal(unpooled[unpooled != 0], x[unpooled != 0])


def test_max_unpool_finds_its_shape(check) -> None:
    values, indices = floats(1, 2, 2, 3), rng.permutation(40)[:12].reshape(1, 2, 2, 3)
    check("MaxUnpool", 22, [values, indices], {**POOLED, "kernel_shape": [2, 3]})
    attributes = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 1, 1, 1]}
    check("MaxUnpool", 9, [values, indices], attributes)


def test_the_gradient_of_max_unpool_is_picked() -> None:
    x, index = torch.randn(1, 1, 2, 2, requires_grad=True), torch.tensor([[[[0, 3], [9, 15]]]])
    y = ops.find("", "MaxUnpool", 11).function(x, index, None, **POOLED)
    (y * torch.arange(16.0).reshape(1, 1, 4, 4)).sum().backward()
    assert torch.equal(x.grad, index.float())
