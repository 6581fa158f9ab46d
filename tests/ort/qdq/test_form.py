"""QDQ form: graphs equal to those of onnxruntime's tool, names and bits, for the same ranges.

Where that tool is wrong the graphs differ; ``DIFFERENT`` says why, and other files test what is
right.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from one_operator import Made, make, run, sqnr
from operator_cases import CASES
from side_by_side import DEFAULT_TYPES, Ranges, by_incumbent, by_qwrap, differences, observed

FLOAT_STATES = {"LSTM", "LSTM_bidirectional", "Attention"}
DIFFERENT = {
    ("Add", "dedicated"): "a node that reads a tensor twice gets one pair, not one without readers",
    ("Clip", "wide"): "Clip was dropped although the codes reach beyond its bounds",
    ("residual", "bare"): "Relu was dropped although its output is not quantized",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {"activation": "QInt8"},
    "per_channel": {"activation": "QInt8", "per_channel": True},
    "uint8 weights": {"weight": "QUInt8"},
    "reduced": {"reduce_range": True},
    "symmetric": {"options": {"ActivationSymmetric": True}},
    "restricted": {"options": {"ActivationRestrictedAsymmetric": True}},
    "forced": {"options": {"ForceQuantizeNoInputCheck": True}},
    "dedicated": {"options": {"DedicatedQDQPair": True}},
    "paired weights": {"options": {"AddQDQPairToWeight": True}},
    "contrib": {"options": {"UseQDQContribOps": True, "QDQKeepRemovableActivations": True}},
    "16 bits": {"activation": "QUInt16"},
    "4 bits": {"weight": "QInt4"},
    "bare": {"options": {"OpTypesToExcludeOutputQuantization": ["Conv", "Relu"]}},
    "float bias": {"options": {"QuantizeBias": False}},
    "wide": {"options": {"MinimumRealRange": 10.0}},
    "symmetric weights": {"weight": "QUInt8", "options": {"WeightSymmetric": True}},
}


@cache
def calibrated(name: str) -> tuple[Made, list[str], Ranges]:
    """A case, its operator types, and ranges of all its tensors."""
    made = make(CASES[name], min(max(CASES[name].since, 17), CASES[name].until))
    types = sorted({*DEFAULT_TYPES, *(node.op_type for node in made.model.graph.node)})
    return made, types, observed(made.model, made.batches, types)


@pytest.mark.ort(
    *range(52, 58), 59, 60, 61, 63, 64, 65, 67, *range(168, 174), 177, 178, *range(182, 220), 267, 5
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("setting", SETTINGS)
def test_graphs_are_equal(setting: str) -> None:
    for name in CASES:
        if name in FLOAT_STATES or (name, setting) in DIFFERENT:
            continue
        made, types, ranges = calibrated(name)
        settings = {"op_types_to_quantize": types, **SETTINGS[setting]}
        expected = by_incumbent(made.model, ranges, **settings)
        assert differences(expected, by_qwrap(made.model, ranges, **settings)) == [], name


@pytest.mark.ort(*range(182, 216), "G70")
@pytest.mark.parametrize("setting", ["plain", "per_channel", "uint8 weights", "16 bits", "4 bits"])
def test_outputs_are_near_float_with_and_without_fusions(setting: str) -> None:
    least = 8 if setting == "4 bits" else 20  # dB; a step of 4 bits is 16 times as large
    for name in CASES:
        made, types, ranges = calibrated(name)
        model = by_qwrap(made.model, ranges, op_types_to_quantize=types, **SETTINGS[setting])
        batch = made.batches[0]
        wanted = run(made.model, batch)
        for optimised in (False, True):
            got = run(model, batch, optimised)
            if name != "ArgMax":  # an index that differs is no small error
                assert sqnr(wanted, got) > least, (name, optimised)
