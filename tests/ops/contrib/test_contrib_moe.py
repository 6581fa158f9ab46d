"""Mixtures of experts against onnxruntime."""

import numpy as np
import pytest

rng = np.random.default_rng(11)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # sums in another order
EXPERTS, HIDDEN, INNER = 4, 8, 16


def normal(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def experts(factor: int = 1) -> list[np.ndarray]:
    first = [0.3 * normal(EXPERTS, factor * INNER, HIDDEN), normal(EXPERTS, factor * INNER)]
    return [*first, 0.3 * normal(EXPERTS, HIDDEN, INNER), normal(EXPERTS, HIDDEN)]


@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "identity"])
def test_chosen_experts_equal_onnxruntime(check, activation, normalize) -> None:
    attributes = {"activation_type": activation, "normalize_routing_weights": normalize, "k": 2}
    inputs = [normal(5, HIDDEN), normal(5, EXPERTS), *experts()]
    check("MoE", inputs, attributes, **CLOSE)
    inputs[0], inputs[3], inputs[5] = normal(1, 5, HIDDEN), None, None
    check("MoE", inputs, {**attributes, "k": 1}, **CLOSE)


def test_gated_experts_equal_onnxruntime(check, oracle) -> None:
    numbers = {"activation_alpha": 1.7, "activation_beta": 1.0, "swiglu_limit": 2.0, "k": 2}
    attributes = {"activation_type": "swiglu", **numbers, "swiglu_fusion": 1}
    inputs = [normal(5, HIDDEN), normal(5, EXPERTS), *experts(2)]
    check("MoE", inputs, attributes, **CLOSE)
    wanted = oracle("MoE", inputs, attributes)
    weights, bias = inputs[2:4]
    halves = [(weights[:, i::2].copy(), bias[:, i::2].copy()) for i in (0, 1)]
    inputs[2:4] = (np.concatenate(pair, 1) for pair in zip(*halves, strict=True))
    # onnxruntime's CPU kernel takes neither of these layouts of the same weights.
    check("MoE", inputs, {**attributes, "swiglu_fusion": 2}, expected=wanted, **CLOSE)
    inputs[2:4] = halves[0]
    apart = [*inputs, *halves[1]]
    check("MoE", apart, {**attributes, "swiglu_fusion": 0}, expected=wanted, **CLOSE)
