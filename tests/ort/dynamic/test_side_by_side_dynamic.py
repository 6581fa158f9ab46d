"""Dynamic quantization: the same graphs as onnxruntime's tool, names and codes included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from one_operator import make
from operator_cases import CASES
from quantizer_pairs import form, quality, quantize_incumbent, quantize_own

pytestmark = pytest.mark.ort(24, 25, 254, 255, 256, 257, 258, 259, 260, 262, 360)

SETTINGS: dict[str, dict[str, Any]] = {
    "s8": {},
    "u8": {"weight": "QUInt8"},
    "channels": {"per_channel": True},
    "u8_channels_7_bits": {"weight": "QUInt8", "per_channel": True, "reduce_range": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_graphs_are_those_of_onnxruntimes_tool(tmp_path: Path, setting: str) -> None:
    for name, case in CASES.items():
        made = make(case)
        own = quantize_own(made.model, None, **SETTINGS[setting]).model.model
        theirs = quantize_incumbent(made.model, None, tmp_path, **SETTINGS[setting])
        assert form(own) == form(theirs), name
        if name != "ArgMax":  # an index has no noise
            assert quality(made.model, own, made.batches) > 25, name


@pytest.mark.parametrize("opset", [10, 11, 13, 18, 21, 24])
@pytest.mark.ort(261)
def test_every_opset_gives_graphs_that_run(opset: int) -> None:
    for name, case in CASES.items():
        if case.since <= opset <= case.until and name != "ArgMax":
            made = make(case, opset)
            own = quantize_own(made.model, None).model.model
            assert quality(made.model, own, made.batches) > 25, name
            fused = any(node.op_type == "DynamicQuantizeLinear" for node in own.graph.node)
            assert not (fused and opset == 10)
