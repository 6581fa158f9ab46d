"""Normalisation against onnxruntime, and its gradients."""

import numpy as np
import pytest
import torch

from qwrap import ops

rng = np.random.default_rng(5)


def floats(*shape: int) -> np.ndarray:
    return rng.uniform(-1, 1, shape).astype(np.float32)


IMAGE = floats(2, 6, 5, 4)
LINE = floats(2, 6, 7)
# Dividing by a small deviation magnifies rounding: ten units in the last place.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
# One rounding to half precision in another place.
HALF = {"rtol": 2e-3, "atol": 1e-3}
STATISTICS = [floats(6), floats(6), floats(6), np.abs(floats(6))]
WITH_ZEROS = IMAGE * (np.arange(6) > 1).reshape(6, 1, 1)

NORMS = [
    ("RMSNormalization", 23, [IMAGE, floats(4)], {}),
    ("RMSNormalization", 23, [IMAGE, floats(5, 4)], {"axis": 2, "epsilon": 1e-2}),
    ("RMSNormalization", 23, [IMAGE, floats(4)], {"axis": -3}),
    ("GroupNormalization", 18, [IMAGE, floats(3), floats(3)], {"num_groups": 3}),
    ("GroupNormalization", 21, [IMAGE, floats(6), floats(6)], {"num_groups": 2}),
    ("GroupNormalization", 21, [LINE, floats(6), floats(6)], {"num_groups": 6, "epsilon": 0.1}),
    ("GroupNormalization", 21, [floats(1, 2), floats(2), floats(2)], {"num_groups": 2}),
    ("LpNormalization", 1, [IMAGE], {}),
    ("LpNormalization", 1, [WITH_ZEROS.astype(np.float32)], {"axis": 3}),
    ("LpNormalization", 22, [LINE], {"axis": 1, "p": 1}),
    ("MeanVarianceNormalization", 9, [IMAGE], {}),
    ("MeanVarianceNormalization", 13, [IMAGE], {"axes": [2, 3]}),
    ("LRN", 1, [IMAGE], {"size": 3}),
    ("LRN", 13, [IMAGE], {"size": 5, "alpha": 0.3, "beta": 0.6, "bias": 2.0}),
    ("LRN", 13, [IMAGE], {"size": 1, "alpha": 0.3}),
    ("InstanceNormalization", 1, [IMAGE, floats(6), floats(6)], {"epsilon": 1e-2}),
]


@pytest.mark.parametrize(("op_type", "opset", "inputs", "attributes"), NORMS)
def test_normalisation_equals_onnxruntime(check, op_type, opset, inputs, attributes) -> None:
    check(op_type, opset, inputs, attributes, **CLOSE)


HALVES = [
    ("LayerNormalization", 17, [IMAGE * 90, floats(4), floats(4)], {}),
    ("RMSNormalization", 23, [IMAGE * 900, floats(4)], {}),  # the squares exceed float16
    ("GroupNormalization", 21, [IMAGE * 90, floats(6), floats(6)], {"num_groups": 2}),
    ("LpNormalization", 22, [IMAGE * 900], {"axis": 1}),
    ("MeanVarianceNormalization", 13, [IMAGE * 900], {}),
    ("LRN", 13, [IMAGE * 900], {"size": 3}),
]


@pytest.mark.parametrize(("op_type", "opset", "inputs", "attributes"), HALVES)
def test_half_precision_is_computed_in_float32(op_type, opset, inputs, attributes) -> None:
    operator = ops.find("", op_type, opset)
    halves = [torch.from_numpy(a).half() for a in inputs]
    y = operator.function(*halves, **attributes)
    wanted = operator.function(*(h.float() for h in halves), **attributes)
    y, wanted = (t[0] if isinstance(t, tuple) else t for t in (y, wanted))
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), wanted, **HALF)


def test_statistics_have_the_stash_type(check) -> None:
    inputs = [a.astype(np.float64) for a in (IMAGE, floats(4), floats(4))]
    check("LayerNormalization", 17, inputs, {}, outputs=3, **CLOSE)
    operator = ops.find("", "LayerNormalization", 17)
    halves = [torch.from_numpy(a).half() for a in inputs]
    y, mean, inverse = operator.function(*halves, stash_type=11, output_count=3)
    wanted = halves[0].double()
    assert y.dtype == torch.float16
    # Sums of four doubles, in another order.
    torch.testing.assert_close(mean, wanted.mean(-1, keepdim=True), rtol=1e-14, atol=1e-15)
    deviation = (wanted.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(inverse, 1 / deviation, rtol=1e-14, atol=0)


def test_an_even_response_window_reaches_further_up() -> None:
    x = np.array([1.0, 2.0, 3.0, 5.0], np.float64).reshape(1, 4, 1)
    y = ops.find("", "LRN", 13).function(torch.from_numpy(x), size=2, alpha=2.0, beta=1.0)
    wanted = [1 / (1 + 1 + 4), 2 / (1 + 4 + 9), 3 / (1 + 9 + 25), 5 / (1 + 25)]
    np.testing.assert_allclose(y.flatten(), wanted, rtol=1e-15)


@pytest.mark.parametrize("opset", [7, 9])
def test_five_outputs_mean_training(check, opset) -> None:
    inputs = [IMAGE, *STATISTICS]
    check("BatchNormalization", opset, inputs, {"momentum": 0.8}, outputs=5, **CLOSE)


@pytest.mark.parametrize("opset", [1, 6])
def test_is_test_means_given_statistics(opset) -> None:
    inputs = [torch.from_numpy(a) for a in (IMAGE, *STATISTICS)]
    (y,) = ops.find("", "BatchNormalization", opset).function(*inputs, is_test=1, output_count=5)
    (wanted,) = ops.find("", "BatchNormalization", 9).function(*inputs)
    assert torch.equal(y, wanted)


def test_without_spatial_each_element_has_its_statistics(check) -> None:
    inputs = [IMAGE, *(np.abs(floats(6, 5, 4)) for _ in range(4))]
    check("BatchNormalization", 7, inputs, {"spatial": 0}, **CLOSE)


def test_the_statistics_may_have_another_type() -> None:
    x = IMAGE.astype(np.float16)
    scale, bias = (s.astype(np.float16) for s in STATISTICS[:2])
    operator = ops.find("", "BatchNormalization", 15)
    (y,) = operator.function(*(torch.from_numpy(a) for a in (x, scale, bias, *STATISTICS[2:])))
    mean, var = (s.reshape(6, 1, 1) for s in STATISTICS[2:])
    wanted = (x - mean) / np.sqrt(var + 1e-5) * scale.reshape(6, 1, 1) + bias.reshape(6, 1, 1)
    assert y.dtype == torch.float16
    np.testing.assert_allclose(y.float(), wanted, **HALF)


GRADIENTS = [
    ("RMSNormalization", 23, [(3, 4), (4,)], {}),
    ("GroupNormalization", 18, [(2, 4, 3), (2,), (2,)], {"num_groups": 2}),
    ("GroupNormalization", 21, [(2, 4, 3), (4,), (4,)], {"num_groups": 2}),
    ("LpNormalization", 22, [(3, 4)], {"p": 1}),
    ("LpNormalization", 22, [(3, 4)], {}),
    ("MeanVarianceNormalization", 13, [(2, 3, 2, 2)], {}),
    ("LRN", 13, [(2, 5, 2, 2)], {"size": 4, "alpha": 0.5}),
    ("LayerNormalization", 17, [(3, 4), (4,), (4,)], {"output_count": 3, "stash_type": 11}),
    ("InstanceNormalization", 22, [(2, 3, 4), (3,), (3,)], {}),
]


@pytest.mark.parametrize(("op_type", "opset", "shapes", "attributes"), GRADIENTS)
def test_gradients_equal_differences(
    check_random_gradients, op_type, opset, shapes, attributes
) -> None:
    check_random_gradients(op_type, opset, shapes, [], attributes)


@pytest.mark.parametrize(
    ("opset", "attributes"), [(9, {"output_count": 5}), (15, {"training_mode": 1})]
)
def test_gradients_flow_through_the_statistics_of_the_batch(
    check_random_gradients, opset, attributes
) -> None:
    given = [torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    check_random_gradients("BatchNormalization", opset, [(4, 3, 2), (3,), (3,)], given, attributes)


@pytest.mark.parametrize("op_type", ["LpNormalization", "MeanVarianceNormalization"])
def test_the_gradient_of_zeros_is_finite(op_type) -> None:
    x = torch.zeros(2, 3, 4, 5, requires_grad=True)
    y = ops.find("", op_type, 22).function(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("op_type", "opset", "inputs", "attributes"), NORMS)
def test_every_norm_compiles(check_compiles, op_type, opset, inputs, attributes) -> None:
    check_compiles(op_type, opset, [torch.from_numpy(a) for a in inputs], attributes)
