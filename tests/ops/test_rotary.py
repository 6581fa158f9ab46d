"""Rotary position embedding against onnxruntime."""

import numpy as np
import pytest
import torch

from qwrap import ops
from qwrap.errors import UnsupportedOpError

rng = np.random.default_rng(9)


def floats(*shape: int) -> np.ndarray:
    return rng.uniform(-1, 1, shape).astype(np.float32)


POSITIONS = np.array([[3, 0, 1], [2, 2, 5]])
IMAGE, LINE = floats(2, 4, 3, 8), floats(2, 3, 32)
CACHES = [floats(6, 4), floats(6, 4)]
SHORT = [floats(6, 2), floats(6, 2)]
CASES = [
    ([IMAGE, *CACHES, POSITIONS], {}),
    ([IMAGE, *CACHES, POSITIONS], {"interleaved": 1}),
    ([LINE, *CACHES, POSITIONS], {"num_heads": 4}),
    ([LINE, *SHORT, POSITIONS], {"num_heads": 4, "rotary_embedding_dim": 4}),
    ([IMAGE, *SHORT, POSITIONS], {"rotary_embedding_dim": 4, "interleaved": 1, "num_heads": 4}),
    ([IMAGE, floats(2, 3, 4), floats(2, 3, 4)], {}),
    ([LINE, floats(2, 3, 4), floats(2, 3, 4)], {"num_heads": 4, "interleaved": 1}),
]


@pytest.mark.parametrize(("inputs", "attributes"), CASES)
def test_rotary_embedding_equals_onnxruntime(check, check_compiles, inputs, attributes) -> None:
    # Two products and a sum; onnxruntime may fuse them.
    check("RotaryEmbedding", 23, inputs, attributes, rtol=1e-6, atol=2e-7)
    check_compiles("RotaryEmbedding", 23, [torch.from_numpy(a) for a in inputs], attributes)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_gradients_equal_finite_differences(check_random_gradients, interleaved) -> None:
    shapes = [(1, 2, 3, 6), (1, 3, 2), (1, 3, 2)]
    attributes = {"interleaved": interleaved, "rotary_embedding_dim": 4}
    check_random_gradients("RotaryEmbedding", 23, shapes, [], attributes)


def test_flat_inputs_need_the_number_of_heads() -> None:
    with pytest.raises(UnsupportedOpError, match="num_heads"):
        ops.find("", "RotaryEmbedding", 23).function(
            *(torch.from_numpy(a) for a in [LINE, *CACHES])
        )
