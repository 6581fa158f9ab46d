"""Tables for TensorRT."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import flatbuffers
import numpy as np
import pytest
from onnxruntime.quantization import calibrate as incumbent
from onnxruntime.quantization.CalTableFlatBuffers import KeyValue as IncumbentKeyValue
from onnxruntime.quantization.CalTableFlatBuffers import TrtTable as IncumbentTrtTable
from onnxruntime.quantization.quant_utils import write_calibration_table as incumbent_table

from qwrap.errors import ExportError
from qwrap.ort.calibrate import CalibrationMethod, TensorData, TensorsData
from qwrap.ort.calibration_table import write_calibration_table
from qwrap.ort.CalTableFlatBuffers import KeyValue, TrtTable

F32 = np.float32
ENDS = {"a": (-200, 10), "b/c:0": (-3, -1), "ü": (0, 2.5)}
POSITIVE = {"b": (-1, 3), "a": (0.5, 2)}  # where the incumbent is right


def ranges(ends: dict[str, tuple[float, float]] = ENDS) -> TensorsData:
    data = {
        name: (np.array([low], F32), np.array([high], F32)) for name, (low, high) in ends.items()
    }
    return TensorsData(CalibrationMethod.MinMax, data)


def incumbents(data: TensorsData) -> dict[str, incumbent.TensorData]:
    ends = {
        name: dict(zip(("lowest", "highest"), d.range_value, strict=True))
        for name, d in data.items()
    }
    return {name: incumbent.TensorData(**pair) for name, pair in ends.items()}


def entries(path: Path) -> dict[str, float]:
    table = IncumbentTrtTable.TrtTable.GetRootAsTrtTable(path.read_bytes(), 0)
    read = (table.Dict(i) for i in range(table.DictLength()))
    return {entry.Key().decode(): float(entry.Value()) for entry in read}


@pytest.mark.ort(106, 108, 109, 348, 354, "G7")
def test_tables_hold_the_larger_magnitude(tmp_path: Path) -> None:
    """onnxruntime writes max(highest, lowest): 10 for [-200, 10], -1 for [-3, -1]."""
    write_calibration_table(ranges(), tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".flatbuffers", ".cache"}
    wanted = {"a": 200.0, "b/c:0": 3.0, "ü": 2.5}
    assert entries(tmp_path / "calibration.flatbuffers") == wanted
    lines = (tmp_path / "calibration.cache").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{name} {value}" for name, value in wanted.items()]
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    incumbent_table(incumbents(ranges()), str(theirs))
    assert entries(theirs / "calibration.flatbuffers") == {"a": 10, "b/c:0": -1, "ü": 2.5}


@pytest.mark.ort(106, 107, 108, 109)
def test_files_are_those_of_onnxruntime_byte_for_byte(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("ours", "theirs")]
    for folder, write in zip(folders, (write_calibration_table, incumbent_table), strict=True):
        folder.mkdir()
        data = ranges(POSITIVE)
        write(incumbents(data) if write is incumbent_table else data.data, folder)
    for suffix in ("json", "flatbuffers", "cache"):
        ours, theirs = ((folder / f"calibration.{suffix}").read_bytes() for folder in folders)
        assert ours == theirs, suffix


@pytest.mark.ort(107)
def test_the_json_file_holds_all_that_is_known(tmp_path: Path) -> None:
    write_calibration_table(ranges(), tmp_path)
    read = json.loads((tmp_path / "calibration.json").read_text())
    back = TensorsData.from_dict(read)
    assert {
        name: tuple(float(end[0]) for end in data.range_value) for name, data in back.items()
    } == ENDS
    assert read["data"]["a"]["lowest"] == {
        "data": [-200.0],
        "dtype": "float32",
        "CLS": "numpy.array",
    }


@pytest.mark.ort(108)
def test_ranges_per_channel_and_scalars_have_one_magnitude(tmp_path: Path) -> None:
    data = {
        "c": TensorData(lowest=np.array([-1, -7], F32), highest=np.array([2, 3], F32)),
        "s": TensorData(lowest=F32(-1), highest=np.float16(0.5)),
    }
    write_calibration_table(data, tmp_path)
    assert entries(tmp_path / "calibration.flatbuffers") == {"c": 7, "s": 1}


@pytest.mark.ort(112)
def test_readers_and_builders_are_those_of_flatc() -> None:
    for ours, theirs in ((KeyValue, IncumbentKeyValue), (TrtTable, IncumbentTrtTable)):
        public = {name for name in vars(theirs) if name[0].isupper()}
        assert public <= set(vars(ours))
    buffers = []
    for key_value, table in ((KeyValue, TrtTable), (IncumbentKeyValue, IncumbentTrtTable)):
        builder = flatbuffers.Builder(16)
        key, value = builder.CreateString("k"), builder.CreateString("1.5")
        key_value.KeyValueStart(builder)
        key_value.KeyValueAddKey(builder, key)
        key_value.KeyValueAddValue(builder, value)
        entry = key_value.KeyValueEnd(builder)
        table.TrtTableStartDictVector(builder, 1)
        builder.PrependUOffsetTRelative(entry)
        vector = builder.EndVector()
        table.TrtTableStart(builder)
        table.TrtTableAddDict(builder, vector)
        builder.Finish(table.TrtTableEnd(builder))
        buffers.append(bytes(builder.Output()))
    assert buffers[0] == buffers[1]
    read = TrtTable.TrtTable.GetRootAsTrtTable(buffers[1], 0)
    entry = read.Dict(0)
    assert entry is not None
    assert (read.DictLength(), read.DictIsNone()) == (1, False)
    assert (entry.Key(), entry.Value()) == (b"k", b"1.5")


@pytest.mark.ort(112)
def test_an_empty_table_and_entry_say_so() -> None:
    builder = flatbuffers.Builder(16)
    TrtTable.Start(builder)
    builder.Finish(TrtTable.End(builder))
    table = TrtTable.TrtTable.GetRootAs(bytes(builder.Output()))
    assert (table.DictLength(), table.DictIsNone(), table.Dict(0)) == (0, True, None)
    builder = flatbuffers.Builder(16)
    KeyValue.Start(builder)
    builder.Finish(KeyValue.End(builder))
    entry = KeyValue.KeyValue.GetRootAsKeyValue(bytes(builder.Output()))
    assert (entry.Key(), entry.Value()) == (None, None)


@pytest.mark.ort(103)
def test_the_table_is_logged_if_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO):
        write_calibration_table(ranges(), tmp_path)
        assert not caplog.text
        monkeypatch.setenv("QUANTIZATION_DEBUG", "1")
        write_calibration_table(ranges(), tmp_path)
    assert "a 200.0" in caplog.text


@pytest.mark.ort(106)
def test_what_no_table_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensor 'x' has no range"):
        write_calibration_table({"x": TensorData(avg=F32(1))}, tmp_path)
    with pytest.raises(ValueError, match="one line for a tensor"):
        write_calibration_table({"x\n2": TensorData(lowest=F32(1), highest=F32(2))}, tmp_path)
    with pytest.raises(ExportError, match="does not exist"):
        write_calibration_table(ranges(), tmp_path / "none")
    assert not [*tmp_path.iterdir()]
