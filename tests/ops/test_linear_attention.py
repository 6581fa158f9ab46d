"""Recurrent attention and causal convolution against the reference implementation."""

import numpy as np
import pytest
import torch

from qwrap import ops
from qwrap.errors import UnsupportedOpError

rng = np.random.default_rng(8)
# A dozen float32 roundings, one after the other.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def floats(*shape: int) -> np.ndarray:
    return rng.uniform(-1, 1, shape).astype(np.float32)


# Four query heads and two of keys (of size 3) and values (of size 5).
INPUTS = [floats(2, 6, 12), floats(2, 6, 6), floats(2, 6, 10)]
HEADS = {"q_num_heads": 4, "kv_num_heads": 2}
PAST = floats(2, 2, 3, 5)
DECAY, DECAYS, BETA = -abs(floats(2, 6, 2)), -abs(floats(2, 6, 6)), abs(floats(2, 6, 2))

CASES = {
    "linear": ([*INPUTS, PAST], {"update_rule": "linear"}),
    "no past": (INPUTS, {"update_rule": "linear", "scale": 0.3}),
    "gated": ([*INPUTS, PAST, DECAY], {"update_rule": "gated"}),
    "gated per feature": ([*INPUTS, None, DECAYS], {"update_rule": "gated"}),
    "delta": ([*INPUTS, PAST, None, BETA], {"update_rule": "delta", "chunk_size": 2}),
    "gated delta": ([*INPUTS, PAST, DECAYS, BETA], {}),
    "one beta": ([*INPUTS, None, DECAY, BETA[:, :, :1]], {}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_linear_attention_equals_the_reference(check, case) -> None:
    inputs, attributes = case
    check("LinearAttention", 27, inputs, {**HEADS, **attributes}, outputs=2, **CLOSE)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_linear_attention_compiles(check_compiles, case) -> None:
    inputs, attributes = case
    tensors = [None if a is None else torch.from_numpy(a) for a in inputs]
    attributes = {k: v for k, v in attributes.items() if k != "chunk_size"}
    check_compiles("LinearAttention", 27, tensors, {**HEADS, **attributes})


def test_gradients_of_linear_attention_equal_finite_differences(check_random_gradients) -> None:
    shapes = [(1, 3, 8), (1, 3, 4), (1, 3, 6), (1, 2, 2, 3), (1, 3, 4), (1, 3, 2)]
    check_random_gradients("LinearAttention", 27, shapes, [], HEADS)


@pytest.mark.parametrize("rule", ["linear", "gated", "delta"])
def test_an_input_the_update_rule_has_no_use_for_is_refused(rule) -> None:
    inputs = [torch.from_numpy(a) for a in (*INPUTS, PAST, DECAY, BETA)]
    with pytest.raises(UnsupportedOpError, match=f"'{rule}' takes decay if gated"):
        ops.find("", "LinearAttention", 27).function(*inputs, **HEADS, update_rule=rule)


CONVOLUTIONS = [
    ([floats(2, 3, 7), floats(3, 1, 4)], {}),
    ([floats(2, 3, 7), floats(3, 1, 4), floats(3)], {"activation": "silu"}),
    ([floats(2, 3, 2), floats(3, 1, 4), floats(3), floats(2, 3, 3)], {"activation": "swish"}),
    ([floats(2, 3, 5), floats(3, 1, 1), None, floats(2, 3, 0)], {}),
]


@pytest.mark.parametrize(("inputs", "attributes"), CONVOLUTIONS)
def test_causal_convolution_equals_the_reference(check, check_compiles, inputs, attributes) -> None:
    check("CausalConvWithState", 27, inputs, attributes, outputs=2, **CLOSE)
    tensors = [None if a is None else torch.from_numpy(a) for a in inputs]
    check_compiles("CausalConvWithState", 27, tensors, attributes)


def test_gradients_of_causal_convolution_equal_finite_differences(check_random_gradients) -> None:
    shapes = [(2, 3, 4), (3, 1, 3), (3,), (2, 3, 2)]
    check_random_gradients("CausalConvWithState", 27, shapes, [], {"activation": "silu"})
