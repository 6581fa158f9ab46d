"""QOperator form: the same graphs as onnxruntime's tool, names and codes included.

Where that tool is wrong the graphs differ: those cases are in ``WRONG``, with what is wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from one_operator import make
from operator_cases import CASES
from quantizer_pairs import form, observe, quality, quantize_incumbent, quantize_own

pytestmark = pytest.mark.ort(*range(223, 250), 52, 53, 54, 67, 346, 360, 362)

WRONG = {
    "residual": "drops a Relu whose input another node reads too, so that negatives pass",
    "three_readers": "drops a Relu whose input another node reads too, so that negatives pass",
    "shared_bias": "gives a bias of two nodes the scale of the first",
    "Where_after_Add": "G39: reads floats that the graph does not have",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "u8s8": {},
    "u8u8": {"weight": "QUInt8"},
    "s8s8": {"activation": "QInt8"},
    "channels": {"per_channel": True},
    "s8s8_channels_7_bits": {"activation": "QInt8", "per_channel": True, "reduce_range": True},
    "symmetric": {"options": {"ActivationSymmetric": True}},
    "restricted": {"options": {"ActivationRestrictedAsymmetric": True}},
    "least_range": {"options": {"MinimumRealRange": 0.5}},
    "symmetric_u8_weights": {"weight": "QUInt8", "options": {"WeightSymmetric": True}},
    "asymmetric_s8_weights": {"options": {"WeightSymmetric": False}, "per_channel": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_graphs_are_those_of_onnxruntimes_tool(tmp_path: Path, setting: str) -> None:
    for name, case in CASES.items():
        made = make(case)
        ranges = observe(made.model, made.batches)
        own = quantize_own(made.model, ranges, **SETTINGS[setting]).model.model
        if name not in WRONG:
            theirs = quantize_incumbent(made.model, ranges, tmp_path, **SETTINGS[setting])
            assert form(own) == form(theirs), name
        if name != "ArgMax":  # an index has no noise
            assert quality(made.model, own, made.batches) > 28, name


@pytest.mark.parametrize("name", ["residual", "three_readers", "shared_bias"])
def test_what_several_nodes_read_is_right_for_all(tmp_path: Path, name: str) -> None:
    made = make(CASES[name])
    ranges = observe(made.model, made.batches)
    own = quantize_own(made.model, ranges).model.model
    theirs = quantize_incumbent(made.model, ranges, tmp_path)
    gain = quality(made.model, own, made.batches) - quality(made.model, theirs, made.batches)
    assert gain > 5, WRONG[name]


@pytest.mark.parametrize("opset", [10, 11, 12, 13, 18, 19, 21, 23, 24])
@pytest.mark.ort(263, 270)
def test_every_opset_gives_graphs_that_run(opset: int) -> None:
    for name, case in CASES.items():
        if case.since <= opset <= case.until and name != "ArgMax":
            made = make(case, opset)
            own = quantize_own(made.model, observe(made.model, made.batches)).model.model
            assert quality(made.model, own, made.batches) > 28, name
