"""Attention against onnxruntime, and where that has no kernel the reference implementation."""

import numpy as np
import pytest
import torch

from qwrap import ops
from qwrap.errors import UnsupportedOpError

rng = np.random.default_rng(7)
# Sums of at most eight products below 3, in another order, and one exponential.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def floats(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def truths(*shape: int) -> np.ndarray:
    return rng.random(shape) > 0.3


Q, K, V = floats(2, 4, 3, 8), floats(2, 4, 5, 8), floats(2, 4, 5, 6)
K2, V2 = floats(2, 2, 5, 8), floats(2, 2, 5, 6)
FLAT = [floats(2, 3, 32), floats(2, 5, 16), floats(2, 5, 12)]
PAST = [floats(2, 4, 7, 8), floats(2, 4, 7, 6)]
HEADS = {"q_num_heads": 4, "kv_num_heads": 2}
CAUSAL = {"is_causal": 1}
NOTHING_LEFT = np.array([[True] * 5, [False] * 5, [True, False, True, False, False]])
LENGTHS = np.array([2, 5])

CASES = {
    "plain": (23, [Q, K, V], {}),
    "scale": (23, [Q, K, V], {"scale": 0.3}),
    "grouped": (23, [Q, K2, V2], {}),
    "flat": (23, FLAT, HEADS),
    "causal": (23, [Q, K, V], CAUSAL),
    "grouped causal": (24, [Q, K2, V2], CAUSAL),
    "added mask": (23, [Q, K, V, floats(3, 5)], {}),
    "mask per head": (23, [Q, K, V, floats(4, 3, 5)], {}),
    "mask per sample": (23, [Q, K, V, truths(2, 1, 3, 5)], {}),
    "truth mask": (24, [Q, K, V, truths(3, 5)], CAUSAL),
    "added mask, causal": (24, [Q, K, V, floats(3, 5)], CAUSAL),
    "a row without keys": (24, [Q, K, V, NOTHING_LEFT], {}),
    "past": (23, [Q, K, V, None, *PAST], {}),
    "past, causal": (24, [Q, K, V, None, *PAST], CAUSAL),
    "past, mask": (24, [Q, K, V, floats(3, 12), *PAST], {}),
    "lengths": (24, [Q, K, V, None, None, None, LENGTHS], {}),
    "lengths, causal": (24, [Q, K, V, None, None, None, LENGTHS], CAUSAL),
    "lengths, mask": (24, [Q, K, V, truths(3, 5), None, None, LENGTHS], CAUSAL),
    "capped": (23, [Q, K, V, truths(3, 5)], {"softcap": 0.7}),
    "flat, capped": (24, FLAT, {**HEADS, **CAUSAL, "softcap": 2.0}),
    "a row without keys, capped": (24, [Q, K, V, NOTHING_LEFT], {"softcap": 0.7}),
    "double softmax": (23, [Q, K, V, floats(3, 5)], {"softmax_precision": 11}),
    "window": (25, [Q, K, V], {"left_window_size": 1, "right_window_size": 0}),
    "window to the left": (25, [Q, K, V, None, *PAST], {"left_window_size": 2, **CAUSAL}),
    "window to the right": (25, [Q, K, V, truths(3, 5)], {"right_window_size": 1}),
    "window, causal": (25, [Q, K, V], {"right_window_size": 2, "left_window_size": 2, **CAUSAL}),
    "window, lengths": (
        25,
        [Q, K, V, floats(3, 5), None, None, LENGTHS],
        {"left_window_size": 1},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_equals_onnxruntime(check, case) -> None:
    opset, inputs, attributes = case
    outputs = 3 if len(inputs) == 6 else 1  # onnxruntime wants both or neither
    check("Attention", opset, inputs, attributes, outputs, **CLOSE)


@pytest.mark.parametrize("mask", [floats(3, 4), truths(3, 4)])
def test_a_short_mask_hides_the_keys_beyond_it(mask) -> None:
    hidden = False if mask.dtype == np.bool_ else -np.inf
    whole = np.concatenate((mask, np.full((3, 1), hidden, mask.dtype)), 1)
    attention = ops.find("", "Attention", 23).function
    (y,) = attention(*(torch.from_numpy(a) for a in (Q, K, V, mask)))
    (wanted,) = attention(*(torch.from_numpy(a) for a in (Q, K, V, whole)))
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_every_stage_of_the_scores_can_be_returned(check, mode) -> None:
    attributes = {"qk_matmul_output_mode": mode, "softcap": 0.7}
    mask = np.where(NOTHING_LEFT[1:2], 0, floats(3, 5))  # onnxruntime has another minus infinity
    check("Attention", 24, [Q, K, V, mask, *PAST][:4], attributes, outputs=4, **CLOSE)


def test_present_keys_and_values_are_past_and_new_ones(check) -> None:
    check("Attention", 23, [Q, K, V, None, *PAST], {}, outputs=3, **CLOSE)
    check("Attention", 24, [Q, K, V, None, *PAST], CAUSAL, outputs=4, **CLOSE)
    check("Attention", 24, FLAT, HEADS, outputs=3, **CLOSE)


@pytest.mark.parametrize("attributes", [{}, {"softcap": 1.5}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype, attributes) -> None:
    inputs = [torch.from_numpy(a).to(dtype) for a in (Q, K, V, floats(3, 5))]
    attention = ops.find("", "Attention", 23).function
    (y,) = attention(*inputs, **attributes)
    (wanted,) = attention(*(x.double() for x in inputs), **attributes)
    assert y.dtype == dtype
    # Half a unit in the last place, and the float32 arithmetic before it.
    torch.testing.assert_close(y.double(), wanted, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


GRADIENTS = {
    "plain": ([(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 2)], [], {}),
    "grouped, capped": ([(1, 4, 3, 4), (1, 2, 5, 4), (1, 2, 5, 2)], [], {"softcap": 0.7}),
    "added mask": ([(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 2), (3, 5)], [], CAUSAL),
    "past": (
        [(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 2), None, (1, 2, 3, 4), (1, 2, 3, 2)],
        [],
        {"output_count": 4, **CAUSAL},
    ),
    "a row without keys": (
        [(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 2)],
        [torch.from_numpy(NOTHING_LEFT)],
        {},
    ),
    "a row without keys, capped": (
        [(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 2)],
        [torch.from_numpy(NOTHING_LEFT)],
        {"softcap": 0.7},
    ),
}


@pytest.mark.parametrize("case", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_equal_finite_differences(check_random_gradients, case) -> None:
    shapes, constants, attributes = case
    check_random_gradients("Attention", 25, shapes, constants, attributes)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_compiles(check_compiles, case) -> None:
    opset, inputs, attributes = case
    tensors = [None if a is None else torch.from_numpy(a) for a in inputs]
    check_compiles("Attention", opset, tensors, attributes)


@pytest.mark.parametrize("heads", [2, 4])
def test_one_graph_serves_all_lengths(heads) -> None:
    attention, graphs = ops.find("", "Attention", 24).function, []

    def backend(module: torch.fx.GraphModule, _: object) -> object:
        graphs.append(module)
        return module.forward

    def causal(*inputs: torch.Tensor) -> torch.Tensor:
        return attention(*inputs, is_causal=1)[0]

    torch._dynamo.reset()
    compiled = torch.compile(causal, fullgraph=True, dynamic=True, backend=backend)
    for length in (3, 5, 8):
        query, key = torch.randn(2, 4, length, 8), torch.randn(2, heads, length + 2, 8)
        inputs = query, key, key, torch.rand(length, length + 2)
        torch.testing.assert_close(compiled(*inputs), causal(*inputs), rtol=0, atol=0)
    assert len(graphs) == 1


def test_flat_inputs_need_the_numbers_of_heads() -> None:
    attention = ops.find("", "Attention", 23).function
    with pytest.raises(UnsupportedOpError, match="q_num_heads and kv_num_heads"):
        attention(*(torch.from_numpy(a) for a in FLAT))
