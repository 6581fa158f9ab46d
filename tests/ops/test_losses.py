"""Classification losses against onnxruntime and finite differences."""

import itertools

import numpy as np
import pytest
import torch

rng = np.random.default_rng(7)
CLASSES = 5
WEIGHT = rng.uniform(0.1, 2, CLASSES).astype(np.float32)
SHAPES = [(6,), (3, 4), (2, 3, 2), (2, 1, 3, 2, 2)]
NLL, SCE = "NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"


def problem(shape: tuple[int, ...], dtype: type = np.int64) -> list[np.ndarray]:
    scores = rng.normal(size=(shape[0], CLASSES, *shape[1:])).astype(np.float32)
    return [scores, rng.integers(0, CLASSES, shape).astype(dtype)]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("shape", "weighted"), [*itertools.product(SHAPES, [False, True])])
def test_equals_onnxruntime(check, shape, weighted, reduction) -> None:
    inputs = problem(shape) + ([WEIGHT] if weighted else [])
    for attributes in ({}, {"ignore_index": 2}):
        both = {**attributes, "reduction": reduction}
        check(NLL, 13, inputs, both, rtol=1e-6, atol=1e-6)  # sums in another order
        check(SCE, 13, inputs, both, outputs=2, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("ignored", [-1, 7])
def test_the_ignored_label_need_not_be_a_class(check, ignored: int) -> None:
    scores, labels = problem((3, 4), np.int32)
    labels[1, 2] = labels[0, 0] = ignored
    check(NLL, 12, [scores, labels, WEIGHT], {"ignore_index": ignored}, rtol=1e-6)
    check(SCE, 12, [scores, labels], {"ignore_index": ignored}, outputs=2, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("op_type", [NLL, SCE])
def test_gradients(check_gradients, op_type: str, reduction: str) -> None:
    scores, labels = (torch.from_numpy(x) for x in problem((3, 4)))
    constants = [labels, torch.from_numpy(WEIGHT).double()]
    check_gradients(op_type, 13, [scores], constants, ignore_index=1, reduction=reduction)
