"""TensorRT's tables, against onnxruntime's writer and its flatbuffers classes."""

import json
import struct

import numpy as np
import pytest
from onnxruntime.quantization.calibrate import TensorData
from onnxruntime.quantization.CalTableFlatBuffers.TrtTable import TrtTable
from onnxruntime.quantization.quant_utils import write_calibration_table

from qwrap.dtypes import INT8, UINT8
from qwrap.errors import TableError
from qwrap.quant.tables import RangeTable, TensorRange
from qwrap.quant.tables.forms import decode_table

ENDS = {"x": (-0.5, 2.008338), "0/conv:0": (0.0, 3.5), "größe 1": (-1.0, 1.0), "zero": (0.0, 0.0)}
FILES = {
    "tensorrt-flatbuffers": "calibration.flatbuffers",
    "tensorrt-json": "calibration.json",
    "tensorrt-text": "calibration.cache",
}


def ours() -> RangeTable:
    return RangeTable({name: TensorRange(*ends) for name, ends in ENDS.items()})


@pytest.fixture
def theirs(tmp_path):
    """What onnxruntime writes; its maxima are those of ``ENDS``, where high is above -low."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    data = {
        name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
        for name, (low, high) in ENDS.items()
    }
    write_calibration_table(data, folder)
    return folder


@pytest.mark.parametrize("form", ["tensorrt-flatbuffers", "tensorrt-text"])
def test_a_file_is_that_of_onnxruntime_byte_for_byte(tmp_path, theirs, form: str) -> None:
    ours().write(tmp_path / "mine", form)
    assert (tmp_path / "mine").read_bytes() == (theirs / FILES[form]).read_bytes()


def test_the_json_table_says_what_onnxruntimes_does(tmp_path, theirs) -> None:
    ours().write(tmp_path / "mine", "tensorrt-json")
    expected = json.loads((theirs / "calibration.json").read_text())
    assert json.loads((tmp_path / "mine").read_text()) == expected


@pytest.mark.parametrize("form", FILES)
def test_files_of_onnxruntime_are_told_apart_and_read(theirs, form: str) -> None:
    table = RangeTable.read(theirs / FILES[form])
    assert table == RangeTable.read(theirs / FILES[form], form)
    assert table.keys() == ENDS.keys()
    for name, (low, high) in ENDS.items():
        low = low if form == "tensorrt-json" else -high
        assert (table[name].low, table[name].high) == (np.float32(low), np.float32(high))


def flat(path) -> dict[str, float]:
    """What onnxruntime's own classes find in the file."""
    table = TrtTable.GetRootAs(path.read_bytes(), 0)
    pairs = [table.Dict(i) for i in range(table.DictLength())]
    return {pair.Key().decode(): float(pair.Value()) for pair in pairs}


def test_the_larger_end_is_the_maximum_on_either_side(tmp_path) -> None:
    RangeTable({"x": TensorRange(-3.0, 1.0)}).write(tmp_path / "t", "tensorrt-flatbuffers")
    assert flat(tmp_path / "t") == {"x": 3.0}


def test_the_native_cache_holds_the_bits_of_the_scale(tmp_path) -> None:
    table = RangeTable({"in put": TensorRange(-1, 1), "y:0": TensorRange(0, 0)})
    table.write(tmp_path / "t", "tensorrt")
    header, *lines = (tmp_path / "t").read_text().splitlines()
    assert header == "TRT-8401-EntropyCalibration2"
    assert lines == ["in put: 3c010204", "y:0: 0"]  # 1/127, as TensorRT writes it for [0, 1] images
    (scale,) = struct.unpack(">f", bytes.fromhex("3c010204"))
    back = RangeTable.read(tmp_path / "t")
    assert back["in put"].scale == np.float32(scale) == np.float32(1 / 127)
    assert back["in put"].high == np.float32(127) * back["in put"].scale  # ReadDynamicRange
    assert back["in put"].low == -back["in put"].high
    assert (back["y:0"].high, back["y:0"].scale) == (0, None)


def test_a_cache_that_tensorrt_wrote_is_read(tmp_path) -> None:
    lines = ["TRT-8401-EntropyCalibration2", "input: 3caa54fc", "(Unnamed Layer* 64) [S]_o: 0", ""]
    (tmp_path / "t").write_text("\n".join(lines))
    table = RangeTable.read(tmp_path / "t")
    assert table["input"].scale == np.float32(float.fromhex("0x1.54a9f8p-6"))
    assert list(table) == ["input", "(Unnamed Layer* 64) [S]_o"]


@pytest.mark.parametrize("form", ["tensorrt", "tensorrt-flatbuffers"])
def test_an_int8_scale_reaches_tensorrt_as_it_is(tmp_path, form: str) -> None:
    scale = np.float32(1.0078812)  # one of 0.8 % that multiplying and dividing by 127 changes
    assert np.float32(127) * scale / np.float32(127) != scale
    entry = TensorRange(-128 * scale, 127 * scale, scale=scale, dtype=INT8)
    RangeTable({"x": entry}).write(tmp_path / "t", form)
    back = RangeTable.read(tmp_path / "t")["x"]
    assert back.high == np.float32(127) * scale
    assert form != "tensorrt" or back.scale == scale


def test_another_scale_does_not_count(tmp_path) -> None:
    entry = TensorRange(0, 255, scale=1, dtype=UINT8)
    RangeTable({"x": entry}).write(tmp_path / "t", "tensorrt-text")
    assert (tmp_path / "t").read_text() == "x 255.0\n"


@pytest.mark.parametrize("form", ["tensorrt", *FILES])
def test_ranges_of_channels_are_refused(tmp_path, form: str) -> None:
    table = RangeTable({"x": TensorRange([0, 0], [1, 2])})
    with pytest.raises(TableError, match=r"t: tensor 'x': has 2 ranges; .* holds one"):
        table.write(tmp_path / "t", form)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["tensorrt", "tensorrt-text"])
def test_names_with_line_breaks_are_refused(tmp_path, form: str) -> None:
    with pytest.raises(TableError, match=r"cannot hold the name 'a\\nb'"):
        RangeTable({"a\nb": TensorRange(0, 1)}).write(tmp_path / "t", form)


def test_older_json_tables_hold_pairs_or_maxima(tmp_path) -> None:
    (tmp_path / "t").write_text('{"pair": [-1, 2], "maximum": 3}')
    table = RangeTable.read(tmp_path / "t")
    assert [(e.low, e.high) for e in table.values()] == [(-1, 2), (-3, 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TRT-1-X\nx: 3c010g14\n", r"line 2: '3c010g14': expected the bits of a float32"),
        ("TRT-1-X\nx: 7fc00000\n", r"line 2: scale is not finite"),
        ("TRT-1-X\nx: bc010204\n", r"line 2: scale -0.00787\d*: expected more than 0"),
        ("TRT-1-X\nx 3c010204\n", r"line 2: 'x 3c010204': expected a name, a colon"),
        ("TRT-1-X\nx: 0\nx: 0\n", r"line 3: tensor 'x' is there twice"),
        ("x 1.0\nx 2.0\n", r"line 2: tensor 'x' is there twice"),
        ("x -1.0\n", r"line 1: absolute maximum -1"),
        ("x nan\n", r"line 1: low is not finite"),
        ("x inf\n", r"line 1: low is not finite"),
        ("x 1_0\n", r"line 1: '1_0': expected a number"),
        ("x 1e39\n", r"line 1: low is not finite"),
        ("x\n", r"line 1: 'x': expected a name, a space and a number"),
        ('{"x": [1, 2, 3]}', r"tensor 'x': is of shape \[3\]; expected \[low, high\]"),
        ('{"x": [2, 1]}', r"tensor 'x': low 2 is above high 1"),
        ('{"x": [1e999, 1]}', r"tensor 'x': low is not finite"),
    ],
)
def test_a_broken_line_is_named(tmp_path, text: str, message: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(TableError, match=rf"t: .*{message}"):
        RangeTable.read(tmp_path / "t")


def is_refused(data: bytes) -> bool:
    try:
        decode_table(data, "tensorrt-flatbuffers")
    except TableError:
        return True
    return False


def test_every_cut_or_changed_flatbuffer_is_read_or_refused(tmp_path) -> None:
    path = tmp_path / "t"
    ours().write(path, "tensorrt-flatbuffers")
    sound = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [sound[:size] for size in range(len(sound))]
    for _ in range(1000):
        changed = bytearray(sound)
        for place in rng.integers(len(sound), size=rng.integers(1, 5)):
            changed[place] = rng.integers(256)
        damaged.append(bytes(changed))
    refused = sum(map(is_refused, damaged))
    assert refused >= len(sound) - 8  # what is cut off, save padding at the end


def test_texts_that_lie_over_each_other_are_refused(tmp_path) -> None:
    """A small file must not become a large table."""
    size = 2000
    RangeTable({"a" * size: TensorRange(0, 1), "b": TensorRange(0, 1)}).write(
        tmp_path / "t", "tensorrt-flatbuffers"
    )
    data = bytearray((tmp_path / "t").read_bytes())
    root = int.from_bytes(data[:4], "little")
    vector = root + 4 + int.from_bytes(data[root + 4 : root + 8], "little")
    first, second = vector + 4, vector + 8
    for a, b in ((first, second), (second, first)):  # both entries point to the long name's table
        target = b + int.from_bytes(data[b : b + 4], "little")
        if b"aaa" in data[target : target + size]:
            data[a : a + 4] = (target - a).to_bytes(4, "little")
            break
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(TableError, match="texts lie over each other"):
        RangeTable.read(tmp_path / "t")


def test_names_that_look_like_json_need_the_form(tmp_path) -> None:
    table = RangeTable({"{x": TensorRange(-1, 1)})
    table.write(tmp_path / "t", "tensorrt-text")
    assert RangeTable.read(tmp_path / "t", "tensorrt-text") == table
    with pytest.raises(TableError, match="is not JSON"):
        RangeTable.read(tmp_path / "t")
