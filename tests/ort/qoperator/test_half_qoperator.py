"""G42: float16 models load and are right, behind casts to float32, which kernels compute in."""

from __future__ import annotations

from pathlib import Path

import pytest
from one_operator import Made, make, open_session
from onnx import TensorProto
from operator_cases import CASES
from quantizer_pairs import observe, op_types, quality, quantize_incumbent, quantize_own

pytestmark = pytest.mark.ort(49, "G42")


def models(opset: int) -> dict[str, Made]:
    return {
        name: make(case, opset, half=True)
        for name, case in CASES.items()
        if case.half and case.since <= opset <= case.until and name != "ArgMax"
    }


@pytest.mark.parametrize("opset", [10, 17, 21])
@pytest.mark.parametrize("channels", [False, True])
def test_static_models_are_right(opset: int, channels: bool) -> None:
    for name, made in models(opset).items():
        ranges = observe(made.model, made.batches)
        own = quantize_own(made.model, ranges, per_channel=channels).model.model
        assert quality(made.model, own, made.batches) > 30, name


@pytest.mark.parametrize("opset", [10, 17, 21])
@pytest.mark.parametrize("channels", [False, True])
def test_dynamic_models_are_right(opset: int, channels: bool) -> None:
    for name, made in models(opset).items():
        own = quantize_own(made.model, None, per_channel=channels).model.model
        assert quality(made.model, own, made.batches) > 25, name


def test_scales_are_float32_and_casts_are_at_the_borders() -> None:
    made = make(CASES["Conv"], half=True)
    own = quantize_own(made.model, observe(made.model, made.batches)).model.model
    assert op_types(own) == ["Cast", "QuantizeLinear", "QLinearConv", "DequantizeLinear", "Cast"]
    scales = [t for t in own.graph.initializer if t.name.endswith("_scale")]
    assert {tensor.data_type for tensor in scales} == {TensorProto.FLOAT}
    assert own.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT16


@pytest.mark.parametrize("static", [True, False])
def test_onnxruntimes_tool_writes_graphs_that_do_not_load(tmp_path: Path, static: bool) -> None:
    made = make(CASES["MatMul"], half=True)
    ranges = observe(made.model, made.batches) if static else None
    try:
        theirs = quantize_incumbent(made.model, ranges, tmp_path)
    except (AssertionError, ValueError):
        return
    with pytest.raises(Exception, match=r"Type Error|invalid|INVALID"):
        open_session(theirs)
