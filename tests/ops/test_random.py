"""Random operators: with a seed numpy's numbers, without one torch's; their distributions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from qwrap import ops

X = np.random.default_rng(10).normal(size=(3, 4)).astype(np.float32)


def function(op_type: str, opset: int = 22) -> Callable[..., Any]:
    operator = ops.find("", op_type, opset)
    assert operator is not None
    return operator.function


def reference(op_type: str, inputs: list[np.ndarray], **attributes: Any) -> np.ndarray:
    names = [f"x{i}" for i in range(len(inputs))]
    node = helper.make_node(op_type, names, ["y"], **attributes)
    (result,) = ReferenceEvaluator(node).run(None, dict(zip(names, inputs, strict=True)))
    return result


SEEDED = [
    ("RandomUniform", [], {"shape": [3, 5], "low": -1.0, "high": 3.0}),
    ("RandomUniform", [], {"shape": [7], "dtype": TensorProto.DOUBLE}),
    ("RandomUniformLike", [X], {"low": -1.0, "high": 3.0}),
    ("RandomUniformLike", [X.astype(np.float64)], {}),
    ("RandomNormal", [], {"shape": [3, 5], "mean": 1.0, "scale": 2.0}),
    ("RandomNormalLike", [X], {"mean": 1.0, "scale": 2.0}),
    ("RandomNormalLike", [X], {"dtype": TensorProto.DOUBLE}),
]


@pytest.mark.parametrize(("op_type", "inputs", "attributes"), SEEDED)
def test_a_seed_gives_the_numbers_of_the_reference(op_type, inputs, attributes) -> None:
    wanted = reference(op_type, inputs, seed=3.0, **attributes)
    for opset in (17, 22):
        tensors = [torch.from_numpy(x) for x in inputs]
        got = function(op_type, opset)(*tensors, seed=3.0, **attributes)
        assert got.numpy().dtype == wanted.dtype
        np.testing.assert_allclose(got, wanted, rtol=1e-6)  # scaled in one step or in two


@pytest.mark.parametrize("op_type", ["RandomUniform", "RandomNormal"])
def test_without_a_seed_torch_steers_the_numbers(op_type: str) -> None:
    torch.manual_seed(5)
    first = function(op_type)(shape=[4])
    assert not torch.equal(first, function(op_type)(shape=[4]))
    torch.manual_seed(5)
    assert torch.equal(first, function(op_type)(shape=[4]))


@pytest.mark.parametrize("seed", [None, 1.0])
def test_moments_are_those_of_the_distributions(seed: float | None) -> None:
    torch.manual_seed(0)
    count = 100_000
    uniform = function("RandomUniform")(shape=[count], low=2.0, high=4.0, seed=seed)
    normal = function("RandomNormal")(shape=[count], mean=1.0, scale=3.0, seed=seed)
    assert 2 <= uniform.min() < uniform.max() <= 4
    # Five standard errors of the mean: 3 / sqrt(count) for the normal one.
    assert abs(uniform.mean() - 3) < 5 * 0.58 / count**0.5
    assert abs(normal.mean() - 1) < 5 * 3 / count**0.5
    assert abs(normal.std() - 3) < 5 * 3 / (2 * count) ** 0.5


@pytest.mark.parametrize("seed", [None, 1.0])
def test_bernoulli_draws_one_with_the_given_probability(seed: float | None) -> None:
    torch.manual_seed(0)
    probability = torch.tensor([0.0, 0.25, 1.0]).expand(50_000, 3)
    drawn = function("Bernoulli")(probability, dtype=TensorProto.INT32, seed=seed)
    assert drawn.dtype == torch.int32
    share = drawn.double().mean(0)
    assert share[0] == 0
    assert share[2] == 1
    assert abs(share[1] - 0.25) < 5 * (0.25 * 0.75 / 50_000) ** 0.5  # five standard errors
    assert function("Bernoulli", 15)(probability.half()).dtype == torch.float16


@pytest.mark.parametrize("seed", [None, 1.0])
def test_multinomial_draws_classes_by_their_softmax(seed: float | None) -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, -1.0], [-1e9, 0.0, -1e9]])
    drawn = function("Multinomial", 7)(logits, sample_size=50_000, seed=seed)
    assert drawn.dtype == torch.int32
    share = torch.stack([(drawn == c).double().mean(1) for c in range(3)], 1)
    # Five standard errors of the most uncertain share.
    np.testing.assert_allclose(share, logits.double().softmax(1), atol=5 * 0.5 / 50_000**0.5)
    assert (drawn[1] == 1).all()


RATIO = 0.75


def dropped(x: Tensor, **attributes: Any) -> Any:
    return function("Dropout")(x, RATIO, True, **attributes)


def test_dropout_with_a_seed_drops_what_the_reference_drops() -> None:
    inputs = [X, np.array(RATIO, np.float32), np.array(True)]
    wanted = reference("Dropout", inputs, seed=4)
    for opset in (12, 13, 22):
        for count in (1, 2):
            got = function("Dropout", opset)(
                torch.from_numpy(X), RATIO, True, seed=4, output_count=count
            )
            np.testing.assert_allclose(got[0], wanted, rtol=1e-6)  # scale in float64 there


def test_dropout_keeps_its_share_and_the_gradient_knows_the_mask() -> None:
    torch.manual_seed(0)
    x = torch.ones(40_000, requires_grad=True)
    y, mask = dropped(x, output_count=2)
    y.sum().backward()
    assert abs(mask.double().mean() - 0.25) < 5 * (0.25 * 0.75 / 40_000) ** 0.5
    assert torch.equal(y.detach(), 4.0 * mask)
    assert torch.equal(x.grad, 4.0 * mask)
    (alone,) = dropped(x)
    assert set(alone.unique().tolist()) == {0.0, 4.0}


@pytest.mark.parametrize("op_type", ["RandomUniformLike", "RandomNormalLike"])
def test_seeded_numbers_compile_into_one_graph(op_type: str) -> None:
    compute = function(op_type)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: compute(x, seed=2.0), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for size in (3, 4, 7):
        x = torch.zeros(2, size)
        assert torch.equal(compiled(x), compute(x, seed=2.0))
