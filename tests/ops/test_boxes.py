"""Selection of bounding boxes against onnxruntime."""

import itertools

import numpy as np
import pytest
import torch

from qwrap import ops

rng = np.random.default_rng(12)
BOXES = rng.uniform(0, 1, (2, 40, 4)).astype(np.float32)
SCORES = rng.uniform(0, 1, (2, 3, 40)).round(1).astype(np.float32)  # rounded, so many are equal


def array(value: float, dtype: type = np.float32) -> np.ndarray:
    return np.array([value], dtype)


LIMITS = [array(n, np.int64) for n in (0, 3, 100)]
OVERLAPS = [array(t) for t in (0.0, 0.3)]
MINIMA = [None, array(0.4), array(2.0)]


@pytest.mark.parametrize(
    ("limit", "overlap", "least"), [*itertools.product(LIMITS, OVERLAPS, MINIMA)]
)
@pytest.mark.parametrize("center", [0, 1])
def test_non_max_suppression_equals_onnxruntime(check, limit, overlap, least, center) -> None:
    inputs = [BOXES, SCORES, limit, overlap] + ([] if least is None else [least])
    check("NonMaxSuppression", 10 + center, inputs, {"center_point_box": center})


def test_no_limit_selects_nothing(check) -> None:
    check("NonMaxSuppression", 11, [BOXES, SCORES], {})


def test_a_limit_of_rank_zero_is_taken() -> None:
    select = ops.find("", "NonMaxSuppression", 11).function
    inputs = torch.from_numpy(BOXES), torch.from_numpy(SCORES)
    assert torch.equal(select(*inputs, 3, 0.5, 0.1), select(*inputs, [3], [0.5], [0.1]))
