"""The models and the comparison that other tests of the drop-in rest on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime.quantization.registry as incumbent
import pytest
from one_operator import NEWEST, make, make_batches, make_model, run
from onnx import ModelProto
from operator_cases import CASES, LAYERS
from ort_script import INCUMBENT, Setting, quantize
from same_form import compare


def types_of(model: ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def test_the_cases_cover_both_registries() -> None:
    found = set().union(*(types_of(make_model(case)) for case in CASES.values()))
    registries = (
        incumbent.QDQRegistry,
        incumbent.QLinearOpsRegistry,
        incumbent.IntegerOpsRegistry,
    )
    assert found >= {op_type for registry in registries for op_type in registry}


@pytest.mark.parametrize("opset", range(10, NEWEST + 1))
def test_every_case_runs_in_onnxruntime(opset: int) -> None:
    for case in CASES.values():
        if case.since <= opset:
            outputs = run(
                make_model(case, opset, half=case.half), make_batches(case, 1, case.half)[0]
            )
            assert all(np.isfinite(output).all() for output in outputs)


@pytest.fixture
def conv(tmp_path: Path) -> ModelProto:
    made = make(LAYERS["Conv"])
    onnx.save(made.model, tmp_path / "in.onnx")
    return quantize(INCUMBENT, tmp_path / "in.onnx", made.batches, tmp_path / "out.onnx", Setting())


def changed(model: ModelProto, **values: np.ndarray) -> ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values[tensor.name], tensor.name))
    return copy


def test_a_file_has_its_own_form(conv: ModelProto) -> None:
    assert compare(conv, conv).same


def test_a_scale_one_part_in_ten_thousand_off_is_seen(conv: ModelProto) -> None:
    scale = next(t for t in conv.graph.initializer if t.name == "x_scale")
    other = onnx.numpy_helper.to_array(scale) * np.float32(1.0001)
    found = compare(conv, changed(conv, x_scale=other))
    assert found.values
    assert found.scale == pytest.approx(1e-4, rel=0.01)


def test_another_type_of_code_is_another_form(conv: ModelProto) -> None:
    assert compare(conv, changed(conv, x_zero_point=np.array(0, np.int8))).form


def test_one_code_off_by_one_is_seen(conv: ModelProto) -> None:
    codes = next(t for t in conv.graph.initializer if t.name == "w_quantized")
    other = onnx.numpy_helper.to_array(codes).copy()
    other.ravel()[7] += 1 if other.ravel()[7] < 127 else -1
    assert compare(conv, changed(conv, w_quantized=other)).values


def test_another_node_name_is_another_form(conv: ModelProto) -> None:
    other = changed(conv)
    other.graph.node[0].name += "_"
    assert len(compare(conv, other).form) == 1
