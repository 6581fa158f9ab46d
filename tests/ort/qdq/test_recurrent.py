"""Recurrent networks and attention as one node: weights as weights, where their type is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from one_operator import Case, Made, constants_of, make, run, sqnr
from onnx import ModelProto
from operator_cases import CASES
from side_by_side import DEFAULT_TYPES, by_qwrap, observed

pytestmark = pytest.mark.ort("G70", 5, 215)
STEPS = {"x": (5, 2, 6), "h0": (1, 2, 4)}


def recurrent(kind: str, gates: int, directions: int = 1) -> Case:
    states = {"x": (5, 2, 6), "h0": (directions, 2, 4)}
    direction = ', direction="bidirectional"' if directions == 2 else ""
    return Case(
        f"y, last = {kind}<hidden_size=4{direction}>(x, w, r, b, , h0)",
        states,
        {"y": 4, "last": 3},
        {
            "w": (directions, gates * 4, 6),
            "r": (directions, gates * 4, 4),
            "b": (directions, gates * 8),
        },
        half=False,
    )


def quantized(case: Case, kind: str, **settings: Any) -> tuple[Made, ModelProto]:
    made = make(case, 17)
    types = [*DEFAULT_TYPES, kind]
    ranges = observed(made.model, made.batches, types)
    return made, by_qwrap(made.model, ranges, op_types_to_quantize=types, **settings)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_weights_are_codes_and_states_are_floats(
    kind: str, gates: int, per_channel: bool, directions: int
) -> None:
    """onnxruntime's tool has them and the bias as 8-bit activations."""
    made, model = quantized(recurrent(kind, gates, directions), kind, per_channel=per_channel)
    found = constants_of(model)
    for name in ("w", "r"):
        assert found[f"{name}_quantized"].dtype == np.int8
        assert found[f"{name}_scale"].shape == ((gates * 4,) if per_channel else ())
    node = next(n for n in model.graph.node if n.op_type == kind)
    assert list(node.input)[3:] == ["b", "", "h0"]
    assert node.output[1] == "last"
    assert "w" not in found
    for optimised in (False, True):
        for batch in made.batches:
            assert sqnr(run(made.model, batch), run(model, batch, optimised)) > 28


def test_the_axis_of_their_channels_is_the_users() -> None:
    _, model = quantized(
        recurrent("LSTM", 4, 2),
        "LSTM",
        per_channel=True,
        options={"QDQOpTypePerChannelSupportToAxis": {"LSTM": 0}},
    )
    assert constants_of(model)["w_scale"].shape == (2,)


@pytest.mark.ort(4)
@pytest.mark.parametrize("name", ["LSTM", "Attention"])
def test_by_default_they_stay_float(name: str) -> None:
    made = make(CASES[name], 17)
    model = by_qwrap(made.model, observed(made.model, made.batches))
    assert not any("antizeLinear" in n.op_type for n in model.graph.node)


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_projections_of_attention_are_a_weight(per_channel: bool) -> None:
    made, model = quantized(CASES["Attention"], "Attention", per_channel=per_channel)
    found = constants_of(model)
    assert found["w_quantized"].dtype == np.int8
    assert found["w_scale"].size == (found["w_quantized"].shape[1] if per_channel else 1)
    assert found["b"].dtype == np.float32
    for optimised in (False, True):
        got = run(model, made.batches[0], optimised)
        assert sqnr(run(made.model, made.batches[0]), got) > 28


def test_queries_keys_and_values_have_pairs_and_the_bias_none() -> None:
    case = Case(
        "y = com.microsoft.MultiHeadAttention<num_heads=2>(q, k, v, b)",
        dict.fromkeys("qkv", (2, 5, 8)),
        {"y": 3},
        {"b": (24,)},
        domains=("com.microsoft",),
    )
    made, model = quantized(case, "MultiHeadAttention")
    node = next(n for n in model.graph.node if n.op_type == "MultiHeadAttention")
    assert list(node.input) == [*(f"{name}_DequantizeLinear_Output" for name in "qkv"), "b"]
    for optimised in (False, True):
        got = run(model, made.batches[0], optimised)
        assert sqnr(run(made.model, made.batches[0]), got) > 28
