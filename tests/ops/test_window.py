"""Convolution, pooling and normalisation against onnxruntime."""

import numpy as np
import pytest
import torch

from qwrap import ops

rng = np.random.default_rng(2)


def floats(*shape: int) -> np.ndarray:
    return rng.uniform(-1, 1, shape).astype(np.float32)


IMAGE = floats(2, 4, 9, 8)
LINE = floats(2, 4, 11)
VOLUME = floats(1, 2, 5, 6, 4)
KERNEL = floats(6, 4, 3, 3)
UP, LOW = {"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"}

CONVOLUTIONS = [
    ("Conv", 11, [IMAGE, KERNEL], {}),
    ("Conv", 11, [IMAGE, KERNEL, floats(6)], {"pads": [1, 1, 1, 1], "strides": [2, 1]}),
    ("Conv", 1, [IMAGE, KERNEL], {"pads": [0, 1, 2, 0], "kernel_shape": [3, 3]}),
    ("Conv", 22, [IMAGE, KERNEL], {"dilations": [2, 3], "pads": [2, 3, 2, 3]}),
    ("Conv", 11, [IMAGE, floats(8, 2, 3, 3)], {"group": 2, **UP, "strides": [2, 2]}),
    ("Conv", 11, [IMAGE, floats(4, 1, 2, 2), floats(4)], {"group": 4, **LOW}),
    ("Conv", 11, [IMAGE, KERNEL], {"auto_pad": "VALID"}),
    ("Conv", 11, [LINE, floats(3, 4, 4), floats(3)], {**LOW, "strides": [2]}),
    ("Conv", 11, [LINE, floats(3, 4, 3)], {"pads": [1, 1], "dilations": [2]}),
    ("Conv", 11, [VOLUME, floats(3, 2, 3, 3, 2)], {"pads": [1, 1, 1, 1, 1, 0]}),
    ("ConvTranspose", 11, [IMAGE, floats(4, 3, 3, 3)], {}),
    ("ConvTranspose", 1, [IMAGE, floats(4, 3, 3, 3), floats(3)], {"strides": [2, 3]}),
    (
        "ConvTranspose",
        11,
        [IMAGE, floats(4, 3, 3, 3)],
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
    ),
    ("ConvTranspose", 22, [IMAGE, floats(4, 3, 3, 3)], {"pads": [0, 1, 2, 0]}),
    ("ConvTranspose", 11, [IMAGE, floats(4, 3, 4, 3)], {"strides": [2, 2], **UP}),
    ("ConvTranspose", 11, [IMAGE, floats(4, 3, 4, 3)], {"strides": [3, 2], **LOW}),
    (
        "ConvTranspose",
        11,
        [IMAGE, floats(4, 3, 3, 3)],
        {"strides": [2, 2], "output_shape": [18, 16]},
    ),
    # The kernel covers less than a stride: there is less than SAME or output_shape want.
    ("ConvTranspose", 11, [IMAGE, floats(4, 3, 1, 2), floats(3)], {"strides": [2, 3], **UP}),
    ("ConvTranspose", 11, [IMAGE, floats(4, 3, 2, 1)], {"strides": [3, 2], **LOW}),
    (
        "ConvTranspose",
        11,
        [IMAGE, floats(4, 3, 2, 1), floats(3)],
        {"strides": [3, 2], "output_shape": [28, 13], **UP},
    ),
    ("ConvTranspose", 11, [IMAGE, floats(4, 2, 2, 2)], {"group": 2, "dilations": [2, 1]}),
    ("ConvTranspose", 11, [LINE, floats(4, 3, 5)], {"strides": [2], "pads": [2, 1]}),
]

KERNEL_2 = {"kernel_shape": [2, 2]}
KERNEL_3 = {"kernel_shape": [3, 3]}
CEIL = {"ceil_mode": 1}
POOLS = [
    (1, IMAGE, KERNEL_3),
    (8, IMAGE, {**KERNEL_3, "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    (10, IMAGE, {**KERNEL_3, "strides": [2, 2], **CEIL}),
    (11, IMAGE, {**KERNEL_2, "strides": [2, 2], **CEIL}),
    (11, IMAGE, {**KERNEL_3, "strides": [3, 3], "pads": [1, 1, 1, 1], **CEIL}),
    (11, IMAGE, {**KERNEL_2, "strides": [3, 3], "pads": [0, 0, 1, 1], **CEIL}),
    (11, IMAGE, {**KERNEL_3, "pads": [2, 0, 1, 2]}),
    (11, IMAGE, {**KERNEL_2, "strides": [2, 2], **UP}),
    (11, IMAGE, {**KERNEL_2, "strides": [1, 2], **LOW}),
    (11, IMAGE, {**KERNEL_3, "strides": [2, 2], "auto_pad": "VALID"}),
    (11, LINE, {"kernel_shape": [3], "strides": [2], **CEIL}),
    (11, LINE, {"kernel_shape": [4], "strides": [2], "pads": [2, 1]}),
    (22, VOLUME, {"kernel_shape": [2, 3, 2], "pads": [0, 1, 1, 1, 1, 0]}),
]


@pytest.mark.parametrize(("op_type", "opset", "inputs", "attributes"), CONVOLUTIONS)
def test_convolution_equals_onnxruntime(check, op_type, opset, inputs, attributes) -> None:
    # Up to 54 products below 1, summed in another order: a few units of 6e-8 times the sum.
    check(op_type, opset, inputs, attributes, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("opset", "x", "attributes"), POOLS)
def test_max_pool_equals_onnxruntime(check, opset, x, attributes) -> None:
    check("MaxPool", opset, [x], attributes)


@pytest.mark.parametrize("dilations", [[2, 2], [1, 3]])
def test_dilated_max_pool_equals_onnxruntime(check, dilations) -> None:
    attributes = {**KERNEL_3, "dilations": dilations, "pads": [1, 0, 1, 2]}
    check("MaxPool", 12, [IMAGE], attributes)
    check("MaxPool", 12, [IMAGE], {**attributes, **CEIL, "strides": [2, 2]})


@pytest.mark.parametrize("side", [UP, LOW])
def test_dilation_does_not_widen_the_padding_of_pools(check, side) -> None:
    attributes = {**KERNEL_3, "dilations": [2, 1], **side}
    check("MaxPool", 12, [IMAGE], attributes)
    check("AveragePool", 19, [IMAGE], attributes, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("padding", [{}, {"pads": [1, 1, 1, 1]}, {"pads": [0, 1, 2, 0]}, UP])
def test_max_pool_indices_equal_onnxruntime(check, padding, order) -> None:
    attributes = {**KERNEL_3, "strides": [2, 2], **padding, "storage_order": order}
    check("MaxPool", 12, [IMAGE], attributes, outputs=2)


def test_max_pool_indices_of_other_ranks_equal_onnxruntime(check) -> None:
    check("MaxPool", 12, [LINE], {"kernel_shape": [3]}, outputs=2)
    check("MaxPool", 12, [VOLUME], {"kernel_shape": [2, 2, 2]}, outputs=2)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_max_pool_takes_8_bit_integers(check, dtype) -> None:
    x = rng.integers(0, 100, (1, 2, 5, 5)).astype(dtype)
    check("MaxPool", 12, [x], {**KERNEL_2, "pads": [1, 0, 0, 1]})


@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize(("opset", "x", "attributes"), POOLS)
def test_average_pool_equals_onnxruntime(check, opset, x, attributes, include) -> None:
    attributes = {**attributes, "count_include_pad": include} if opset > 1 else attributes
    opset = 7 if opset == 8 else opset
    check("AveragePool", opset, [x], attributes, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("include", [0, 1])
def test_dilated_average_pool_equals_onnxruntime(check, include) -> None:
    attributes = {**KERNEL_2, "dilations": [2, 3], "count_include_pad": include}
    check("AveragePool", 19, [IMAGE], attributes, rtol=1e-6, atol=1e-6)
    attributes |= {"pads": [1, 1, 1, 1]}
    check("AveragePool", 22, [IMAGE], attributes, rtol=1e-6, atol=1e-6)


STATISTICS = [floats(4), floats(4), floats(4), np.abs(floats(4))]
NORMALISED = [
    ("GlobalAveragePool", 1, [IMAGE], {}),
    ("GlobalAveragePool", 22, [LINE], {}),
    ("GlobalMaxPool", 1, [VOLUME], {}),
    ("BatchNormalization", 15, [IMAGE, *STATISTICS], {}),
    ("BatchNormalization", 14, [LINE, *STATISTICS], {"epsilon": 1e-3, "momentum": 0.5}),
    ("BatchNormalization", 9, [floats(3, 4), *STATISTICS], {}),
    ("BatchNormalization", 7, [IMAGE, *STATISTICS], {}),
    ("InstanceNormalization", 6, [IMAGE, floats(4), floats(4)], {}),
    ("InstanceNormalization", 22, [floats(2, 4, 1), floats(4), floats(4)], {}),
    ("LayerNormalization", 17, [IMAGE, floats(8), floats(8)], {}),
    ("LayerNormalization", 17, [IMAGE, floats(8)], {"epsilon": 1e-2}),
    ("LayerNormalization", 17, [IMAGE, floats(9, 8), floats(9, 8)], {"axis": 2}),
    ("LayerNormalization", 17, [IMAGE, floats(9, 8), floats(8)], {"axis": -2}),
    ("Dropout", 7, [IMAGE], {"ratio": 0.3}),
    ("Dropout", 10, [IMAGE], {}),
    ("Dropout", 13, [IMAGE, np.array(0.3, np.float32)], {}),
]


@pytest.mark.parametrize(("op_type", "opset", "inputs", "attributes"), NORMALISED)
def test_normalisation_equals_onnxruntime(check, op_type, opset, inputs, attributes) -> None:
    # Dividing by a small deviation magnifies rounding: ten units in the last place.
    check(op_type, opset, inputs, attributes, rtol=1e-5, atol=1e-6)


def test_layer_normalization_returns_statistics(check) -> None:
    inputs = [IMAGE, floats(9, 8), floats(9, 8)]
    check("LayerNormalization", 17, inputs, {"axis": 2}, outputs=3, rtol=1e-5, atol=1e-6)


def test_batch_normalization_in_training_mode_returns_running_statistics(check) -> None:
    inputs = [IMAGE, *STATISTICS]
    attributes = {"training_mode": 1, "momentum": 0.8}
    check("BatchNormalization", 15, inputs, attributes, outputs=3, rtol=1e-5, atol=1e-6)


def test_dropout_returns_a_mask_of_true(check) -> None:
    check("Dropout", 13, [IMAGE], {}, outputs=2)


def test_dropout_in_training_mode_keeps_the_mean() -> None:
    dropout = ops.find("", "Dropout", 13)
    assert dropout is not None
    torch.manual_seed(0)
    y, mask = dropout.function(torch.ones(100_000), 0.25, True, output_count=2)
    # The mean of 1e5 values of variance 1/3 strays by 0.0018 (one standard deviation).
    assert abs(y.mean() - 1) < 0.008
    assert torch.equal(y > 0, mask)
