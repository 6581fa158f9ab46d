"""Ranges in a file."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import calibrate as incumbent

from qwrap.ort.calibrate import (
    CalibrationCacheEncoder,
    CalibrationMethod,
    TensorData,
    TensorsData,
    cached_ranges,
    load_tensors_data,
    save_tensors_data,
)

F32 = np.float32
CASES: dict[CalibrationMethod, dict[str, Any]] = {
    CalibrationMethod.MinMax: {"lowest": np.array([-1.1], F32), "highest": np.array([2.3], F32)},
    CalibrationMethod.Entropy: {
        "lowest": F32(-1.7),
        "highest": np.float16(2.1),
        "hist": np.array([1, 2]),
        "bins": np.array([-1, 0, 0.1], F32),
    },
    CalibrationMethod.Percentile: {"lowest": F32(-0.1), "highest": F32(1 / 3)},
    CalibrationMethod.Distribution: {
        "avg": F32(0.1),
        "std": np.array(0.7, F32),
        "hist": np.array([1]),
        "hist_edges": np.array([0.5, 1.1], F32),
        "lowest": F32(0.5),
        "highest": F32(1.1),
    },
}


def model_with(weight: float, opset: int = 17, *, as_node: bool = False) -> onnx.ModelProto:
    """Return y = x * w, the weight an initialiser or a Constant node."""
    tensor = numpy_helper.from_array(np.full((2,), weight, np.float32), "w")
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"])]
    if as_node:
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, 2]) for n in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [] if as_node else [tensor])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def ranges(method: CalibrationMethod = CalibrationMethod.MinMax) -> TensorsData:
    return TensorsData(method, {"x": TensorData(**CASES[method])})


def same(ours: Any, theirs: Any) -> bool:
    a, b = ours["x"].to_dict(), theirs["x"].to_dict()
    return a.keys() == b.keys() and all(
        np.array_equal(a[k], b[k]) and getattr(a[k], "dtype", 0) == getattr(b[k], "dtype", 0)
        for k in a
    )


@pytest.mark.ort(110, 111)
@pytest.mark.parametrize("method", CalibrationMethod)
def test_a_cache_keeps_every_bit(method: CalibrationMethod, tmp_path: Path) -> None:
    save_tensors_data(ranges(method), tmp_path / "new" / "cache.json")
    found = load_tensors_data(tmp_path / "new" / "cache.json")
    assert found.calibration_method is method
    assert same(found, ranges(method))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cache.json"]


@pytest.mark.ort(110)
@pytest.mark.parametrize("method", CalibrationMethod)
def test_onnxruntime_reads_our_cache_and_we_read_its(
    method: CalibrationMethod, tmp_path: Path
) -> None:
    path = tmp_path / "cache.json"
    save_tensors_data(ranges(method), path, model=model_with(1))
    theirs = incumbent.load_tensors_data(path)
    assert same(theirs, ranges(method))
    assert theirs.calibration_method.name == method.name
    incumbent.save_tensors_data(theirs, path, smooth_quant=True)
    assert same(load_tensors_data(path), ranges(method))
    assert json.loads(path.read_text())["smooth_quant"] is True


@pytest.mark.ort(110)
def test_a_path_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Calibration cache not found"):
        load_tensors_data(tmp_path / "none.json")
    with pytest.raises(ValueError, match="Calibration cache path is not a file"):
        load_tensors_data(tmp_path)


@pytest.mark.ort(110)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is no JSON"),
        ("[]", "lacks 'data'"),
        ('{"data": {}}', "lacks 'data' or 'calibration_method'"),
        ('{"data": {"x": {"lowest": "?"}}, "calibration_method": "m"}', "is damaged"),
    ],
)
def test_a_damaged_cache_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        load_tensors_data(tmp_path / "c.json")


@pytest.mark.ort(110)
def test_a_write_that_fails_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    save_tensors_data(ranges(), path)
    broken = TensorsData(CalibrationMethod.MinMax, {"x": TensorData(hist=object())})
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_tensors_data(broken, path)
    assert same(load_tensors_data(path), ranges())
    assert len([*tmp_path.iterdir()]) == 1


@pytest.mark.ort(111)
def test_the_encoder_writes_what_onnxruntime_writes() -> None:
    value = {"a": np.arange(2), "b": np.int64(3), "c": np.float32(0.5), "d": ranges()}
    theirs = {**value, "d": incumbent.TensorsData(incumbent.CalibrationMethod.MinMax, {})}
    theirs["d"].data["x"] = incumbent.TensorData(**CASES[CalibrationMethod.MinMax])
    ours = json.loads(json.dumps(value, cls=CalibrationCacheEncoder))
    assert ours == json.loads(json.dumps(theirs, cls=incumbent.CalibrationCacheEncoder))


@pytest.mark.ort("G26")
def test_a_cache_of_another_model_is_refused(tmp_path: Path) -> None:
    """onnxruntime takes any cache whose tensors have the right names."""
    path = tmp_path / "cache.json"
    save_tensors_data(ranges(), path, model=model_with(1))
    assert same(incumbent.load_tensors_data(path), ranges())
    assert same(load_tensors_data(path, model=model_with(1)), ranges())
    with pytest.raises(ValueError, match=r"another model .its inputs are the same"):
        load_tensors_data(path, model=model_with(1.5))
    other = model_with(1)
    other.graph.input[0].name = other.graph.node[0].input[0] = "z"
    with pytest.raises(ValueError, match=r"another model .its inputs differ"):
        load_tensors_data(path, model=other)


@pytest.mark.ort("G26")
def test_a_cache_without_a_model_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    save_tensors_data(ranges(), path)
    assert same(load_tensors_data(path, model=model_with(1)), ranges())


@pytest.mark.ort("G26")
def test_the_same_model_in_another_form_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    save_tensors_data(ranges(), path, model=model_with(1))
    onnx.save(
        model_with(1),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        size_threshold=0,
        location="m.bin",
    )
    inferred = onnx.shape_inference.infer_shapes(model_with(1))
    for model in (model_with(1, 21), model_with(1, as_node=True), tmp_path / "m.onnx", inferred):
        assert same(load_tensors_data(path, model=model), ranges())


@pytest.mark.ort(14)
def test_ranges_are_found_again_where_they_were_kept(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    assert cached_ranges(path, CalibrationMethod.MinMax) is None
    save_tensors_data(ranges(), path)
    assert same(cached_ranges(path, CalibrationMethod.MinMax), ranges())


@pytest.mark.ort(15)
def test_a_cache_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="calibration_cache_path is not a file"):
        cached_ranges(tmp_path, CalibrationMethod.MinMax)
    save_tensors_data(ranges(), tmp_path / "cache.json")
    with pytest.raises(ValueError, match=r"Method\.MinMax, but .*Method\.Entropy"):
        cached_ranges(tmp_path / "cache.json", CalibrationMethod.Entropy)


@pytest.mark.ort(16)
def test_ranges_of_another_smooth_quant_setting_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cache.json"
    save_tensors_data(ranges(), path, smooth_quant=True)
    with caplog.at_level(logging.WARNING):
        assert cached_ranges(path, CalibrationMethod.MinMax) is None
    assert "was produced with smooth_quant=True" in caplog.text
