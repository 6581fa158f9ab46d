"""float16 models: scales are float16, and the graphs load and are right."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from one_operator import Case, constants_of, make, run, sqnr
from operator_cases import CASES
from side_by_side import DEFAULT_TYPES, by_incumbent, by_qwrap, differences, observed

pytestmark = pytest.mark.ort(49, 125)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "per_channel": {"activation": "QInt8", "per_channel": True},
    "forced": {"options": {"ForceQuantizeNoInputCheck": True}},
}
KEPT_FLOAT = {"Concat", "Split"}  # QLinearConcat, into which onnxruntime fuses, takes no float16
# Softmax has a scale of float32 there, which does not load.
DIFFERENT = defaultdict(tuple, {"Softmax": ("y_scale",), "attention_of_MatMuls": ("p_scale",)})
DIFFERENT |= dict.fromkeys(KEPT_FLOAT, ("/y",))
UNLIKE = {"Attention", "LSTM"}  # other rules than onnxruntime's tool has
KERNELS = [name for name, case in CASES.items() if case.half and "LSTM" not in name]


@pytest.mark.parametrize("setting", SETTINGS)
def test_graphs_are_those_of_the_incumbent_and_right(setting: str) -> None:
    for name in KERNELS:
        made = make(CASES[name], min(CASES[name].until, 19), half=True)
        try:
            wanted = run(made.model, made.batches[0])
        except Exception:  # onnxruntime on CPU lacks the float16 kernel
            continue
        types = sorted({*DEFAULT_TYPES, *(n.op_type for n in made.model.graph.node)} - UNLIKE)
        ranges = observed(made.model, made.batches, types)
        settings = {"op_types_to_quantize": types, **SETTINGS[setting]}
        model = by_qwrap(made.model, ranges, **settings)
        differs = differences(by_incumbent(made.model, ranges, **settings), model)
        unlike = [text for text in differs if not any(known in text for known in DIFFERENT[name])]
        assert unlike == [], name
        for optimised in (False, True):
            if name != "ArgMax":
                assert sqnr(wanted, run(model, made.batches[0], optimised)) > 20, name


@pytest.mark.ort(53, "G42")
def test_restricted_zero_points_come_with_scales_of_float16() -> None:
    """onnxruntime's tool writes float32 scales, which its session refuses."""
    made = make(CASES["Conv_Relu_Conv"], 17, half=True)
    ranges = observed(made.model, made.batches)
    options = {"ActivationRestrictedAsymmetric": True}
    model = by_qwrap(made.model, ranges, options=options)
    found = constants_of(model)
    assert {found[n].dtype for n in found if n.endswith("_scale")} == {np.dtype(np.float16)}
    zero_points = {
        int(found[n]) for n in found if n.endswith("_zero_point") and found[n].dtype == np.uint8
    }
    assert zero_points <= {0, 128}
    for optimised in (False, True):
        got = run(model, made.batches[0], optimised)
        assert sqnr(run(made.model, made.batches[0]), got) > 20
    with pytest.raises(Exception, match="INVALID_GRAPH"):
        run(by_incumbent(made.model, ranges, options=options), made.batches[0])


@pytest.mark.ort(263, "G42")
@pytest.mark.parametrize("opset", [13, 17, 18])
def test_opsets_without_float16_pairs_take_the_operators_of_onnxruntime(opset: int) -> None:
    """ONNX has them since opset 19: what onnxruntime's tool writes does not load."""
    made = make(CASES["Conv"], opset, half=True)
    ranges = observed(made.model, made.batches)
    model = by_qwrap(made.model, ranges)
    for optimised in (False, True):
        got = run(model, made.batches[0], optimised)
        assert sqnr(run(made.model, made.batches[0]), got) > 25
    with pytest.raises(Exception, match="float16"):
        run(by_incumbent(made.model, ranges), made.batches[0])


@pytest.mark.ort("G42")
def test_ranges_of_float32_give_scales_of_the_tensors_type() -> None:
    made = make(CASES["Conv"], 17, half=True)
    ranges = {
        name: (np.float32(low), np.float32(high))
        for name, (low, high) in observed(made.model, made.batches).items()
    }
    assert constants_of(by_qwrap(made.model, ranges))["x_scale"].dtype == np.float16


@pytest.mark.ort(217, "G42")
def test_a_product_of_scales_too_small_for_float16_is_no_zero() -> None:
    weights = {"w": np.full((4, 3, 1, 1), 2e-3), "b": (4,)}
    case = Case("y = Conv(x, w, b)", {"x": (2, 3, 4, 4)}, {"y": 4}, weights)
    made = make(case, 17, half=True)
    ranges = {
        "x": (np.float16(-1e-3), np.float16(1e-3)),
        "y": (np.float16(-2), np.float16(2)),
    }
    batch = {"x": made.batches[0]["x"] * np.float16(1e-3)}
    model = by_qwrap(made.model, ranges)
    assert constants_of(model)["b_quantized_scale"] > 0
    assert sqnr(run(made.model, batch), run(model, batch)) > 30
