"""onnxruntime's calibration cache, against onnxruntime's own reader and quantizer."""

import json

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantType,
    create_calibrator,
    load_tensors_data,
    quantize_static,
    save_tensors_data,
)
from onnxruntime.quantization.calibrate import TensorData, TensorsData

import qwrap
from qwrap.errors import TableError
from qwrap.quant.tables import RangeTable, TensorRange

FORM = "onnxruntime"


class Reader(CalibrationDataReader):
    def __init__(self, batches) -> None:
        self.batches = iter(batches)

    def get_next(self):
        return next(({"x": b} for b in self.batches), None)


def same(mine: TensorsData, theirs: TensorsData) -> None:
    assert mine.calibration_method == theirs.calibration_method
    assert list(mine.keys()) == sorted(theirs.keys())
    for name, data in theirs.items():
        for field, value in data.to_dict().items():
            other = getattr(mine[name], field, "TensorData")
            assert np.asarray(other).dtype == np.asarray(value).dtype, (name, field)
            np.testing.assert_array_equal(other, value)


@pytest.mark.parametrize("method", CalibrationMethod, ids=lambda m: m.name)
def test_what_onnxruntime_calibrates_comes_back_to_it_bit_for_bit(
    small, tmp_path, method: CalibrationMethod
) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(small.convs(inputs="float[2,3,8,8] x"), path)
    calibrator = create_calibrator(
        path, augmented_model_path=str(tmp_path / "a.onnx"), calibrate_method=method
    )
    calibrator.collect_data(Reader(small.batches()))
    data = calibrator.compute_data()
    save_tensors_data(data, tmp_path / "theirs.json")
    table = RangeTable.read(tmp_path / "theirs.json")
    assert table.method == method.name
    table.write(tmp_path / "mine.json", FORM)
    same(load_tensors_data(tmp_path / "mine.json"), load_tensors_data(tmp_path / "theirs.json"))


def test_half_precision_ranges_stay_half_precision(tmp_path) -> None:
    data = TensorsData(
        CalibrationMethod.MinMax,
        {"x": TensorData(lowest=np.float16([-0.1, -2]), highest=np.float16([0.3, 65504]))},
    )
    save_tensors_data(data, tmp_path / "theirs.json", smooth_quant=True)
    table = RangeTable.read(tmp_path / "theirs.json")
    assert table["x"].low.dtype == np.float16
    assert table.smooth_quant
    table.write(tmp_path / "mine.json", FORM)
    same(load_tensors_data(tmp_path / "mine.json"), data)
    assert json.loads((tmp_path / "mine.json").read_text())["smooth_quant"] is True


def file_from_cache(small, folder, table: RangeTable) -> onnx.ModelProto:
    """What onnxruntime's quantizer makes with the ranges of a table, and no data."""
    source, cache, target = (folder / name for name in ("m.onnx", "c.json", "q.onnx"))
    onnx.save(small.convs(), source)
    table.write(cache, FORM)
    quantize_static(
        source,
        target,
        None,
        calibration_cache_path=cache,
        activation_type=QuantType.QUInt8,
        extra_options={"ForceQuantizeNoInputCheck": True},
    )
    return onnx.load(target)


def test_quantize_static_takes_its_scales_from_a_table_of_ours(small, tmp_path) -> None:
    model = qwrap.load(small.convs()).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", method="minmax"))
    qwrap.calibrate(model, small.batches(), progress=False)
    table = RangeTable.of(model)
    made = file_from_cache(small, tmp_path, table)
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in made.graph.initializer}
    for name in ("x", "b", "y"):
        # The ends are products rounded to float32, so that their difference may be off by as much.
        np.testing.assert_allclose(arrays[f"{name}_scale"], table[name].scale, rtol=2.0**-23)
        assert int(arrays[f"{name}_zero_point"]) == int(table[name].zero_point)


def test_weights_are_left_out_as_in_onnxruntimes_own_cache(tmp_path) -> None:
    table = RangeTable({"w": TensorRange(-1, 1, stored=True), "x": TensorRange(0, 1)})
    table.write(tmp_path / "c.json", FORM)
    assert list(load_tensors_data(tmp_path / "c.json").keys()) == ["x"]


def test_plain_numbers_are_float32_as_onnxruntime_reads_them(tmp_path) -> None:
    path = tmp_path / "c.json"
    method = {"CLS": "CalibrationMethod", "value": "CalibrationMethod.Percentile"}
    entry = {"CLS": "TensorData", "lowest": -0.1, "highest": 0.1}
    path.write_text(
        json.dumps({"CLS": "TensorsData", "data": {"x": entry}, "calibration_method": method})
    )
    table, theirs = RangeTable.read(path), load_tensors_data(path)
    assert table["x"].low == theirs["x"].lowest
    assert table["x"].low.dtype == theirs["x"].lowest.dtype == np.float32


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"lowest": 0.0}, "tensor 'x': has no 'highest'"),
        ({"lowest": float("nan"), "highest": 1.0}, "tensor 'x': low is not finite"),
        ({"lowest": 2.0, "highest": 1.0}, "low 2 is above high 1"),
        ({"lowest": [0.0, 1.0], "highest": 1.0}, "expected the same"),
        ({"lowest": "0", "highest": 1.0}, "'lowest': expected numbers; got '0'"),
        ({"lowest": 0.0, "highest": 1.0, "mode": 3}, "has 'mode'; onnxruntime's"),
        (
            {"lowest": {"CLS": "numpy.array", "dtype": "object", "data": [0]}, "highest": 1.0},
            "'lowest': is 'numpy.array' of object",
        ),
        (3, "tensor 'x': expected an object; got 3"),
    ],
)
def test_a_broken_entry_is_named(tmp_path, entry, message: str) -> None:
    path = tmp_path / "c.json"
    method = {"CLS": "CalibrationMethod", "value": "CalibrationMethod.MinMax"}
    path.write_text(
        json.dumps({"CLS": "TensorsData", "data": {"x": entry}, "calibration_method": method})
    )
    with pytest.raises(TableError, match=rf"c\.json: .*{message}"):
        RangeTable.read(path)
