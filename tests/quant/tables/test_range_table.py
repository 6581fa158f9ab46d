"""A table of a model, and files that are none."""

import json

import numpy as np
import onnx
import pytest
import torch

import qwrap
from qwrap.errors import ConfigError, NotCalibratedError, TableError
from qwrap.model.points import UsePoint, ValuePoint
from qwrap.quant.tables import FORMS, RangeTable, TensorRange


def calibrated(source: onnx.ModelProto, batches, **settings: object) -> qwrap.WrappedModel:
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", **settings))
    qwrap.calibrate(model, batches, progress=False)
    return model


def test_a_table_of_a_model_has_the_scales_of_its_stubs(small) -> None:
    model = calibrated(small.convs(), small.batches())
    table = RangeTable.of(model)
    assert set(table) == {"x", "a", "b", "y", "w1", "w2"}
    for name in ("x", "b", "y"):
        stub = model.tap(ValuePoint(name))
        assert table[name].scale == stub.scale
        assert table[name].zero_point == stub.zero_point
        # Ends of the codes, rounded once.
        assert table[name].low == np.float32(-int(stub.zero_point)) * stub.scale.numpy()
        assert not table[name].stored
    weight, stub = table["w1"], model.tap(UsePoint("/a", 1))
    np.testing.assert_array_equal(weight.scale, stub.scale)
    assert (weight.axis, weight.stored, weight.dtype) == (0, True, qwrap.QuantSpec().dtype)
    np.testing.assert_array_equal(weight.high, np.float32(127) * stub.scale.numpy())
    np.testing.assert_array_equal(weight.low, -weight.high)  # narrow: -127 … 127


def test_what_a_kernel_absorbs_has_the_range_behind_it(small) -> None:
    """onnxruntime and TensorRT ask for the range between a convolution and its Relu."""
    table = RangeTable.of(calibrated(small.convs(), small.batches()))
    assert table["a"] == table["b"]


def test_moved_tensors_have_the_range_of_their_source(small) -> None:
    nodes = "a = Conv(x, w) b = MaxPool<kernel_shape=[2,2]>(a) y = Conv(b, v)"
    source = small.build(nodes, {"w": (4, 3, 1, 1), "v": (2, 4, 1, 1)})
    table = RangeTable.of(calibrated(source, small.batches()))
    assert table["a"] == table["b"]


def test_a_model_that_is_not_calibrated_has_no_table(small) -> None:
    model = qwrap.load(small.convs())
    with pytest.raises(ConfigError, match="not prepared"):
        RangeTable.of(model)
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    with pytest.raises(NotCalibratedError, match="'x' has no scale yet"):
        RangeTable.of(model)


def test_a_constant_with_two_scales_has_no_single_entry(small) -> None:
    nodes = "a = MatMul(x, w) b = MatMul(x, w) y = Add(a, b)"
    source = small.build(nodes, {"w": (8, 8)}, "float[N,3,8,8] x", "float[N,3,8,8] y")
    model = calibrated(source, small.batches())
    assert "w" in RangeTable.of(model)
    with torch.no_grad():
        model.tap(UsePoint("/b", 1)).initial_scale.mul_(2)
    with pytest.raises(TableError, match="constant 'w' has another scale in node '/b'"):
        RangeTable.of(model)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_takes_the_table_of_a_model(small, tmp_path, form: str) -> None:
    model = calibrated(small.convs(), small.batches(), activation="int8")
    table = RangeTable.of(model)
    table.write(tmp_path / "t", form)
    read = RangeTable.read(tmp_path / "t")
    weights = {"w1", "w2"} if form.startswith(("aimet", "qnn")) else set()
    assert set(read) == {"x", "a", "b", "y"} | weights
    if weights:
        for name, entry in read.items():
            stub = table[name]
            spec = qwrap.QuantSpec(dtype=stub.dtype, symmetric=bool(stub.symmetric), axis=stub.axis)
            qparams = entry.qparams(spec, (stub.scale.size,))
            np.testing.assert_array_equal(qparams.scale, stub.scale.reshape(-1))
            np.testing.assert_array_equal(qparams.zero_point, stub.zero_point.reshape(-1))


def test_scales_are_given_only_to_what_has_none() -> None:
    known = TensorRange(0, 1, scale=1, dtype=qwrap.QuantSpec(dtype="uint8").dtype)
    table = RangeTable({"x": known, "y": TensorRange(0, 255)}, floating={"z": 16})
    filled = table.with_scales(qwrap.QuantSpec(dtype="uint8", symmetric=False))
    assert filled["x"] == known
    assert float(filled["y"].scale) == 1
    assert filled.floating == {"z": 16}


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; known forms are onnxruntime, tensorrt,"),
        (b" \n", "is empty; known forms are"),
        (b"hello world\n", r"is of no known form \(as text: line 1: 'world': expected a number\)"),
        (b"\x89PNG\r\n\x1a\n", "is of no known form .as text: is not UTF-8"),
        (b"{", "is not JSON"),
        (b"{}", "is JSON of no known form; known forms are"),
        (b"[1, 2]", "is JSON of no known form"),
        (b'{"x": "y"}', "is JSON of no known form"),
        (b'{"x": 1, "x": 2}', "'x' is there twice in one object"),
        (b'{"x": \xff}', "is not UTF-8 text"),
        (b'{"x": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "is nested too deeply"),
        (b'{"x": ' + b"[" * 100 + b"]" * 100 + b"}", "tensor 'x': "),
        (b'{"version": "3.0.0", "encodings": []}', "is of version '3.0.0', but built like aimet-2"),
        (b'{"version": 1, "activation_encodings": []}', "is of version 1, but built like aimet-1"),
        (b'{"version": "1.0.0", "activation_encodings": {}}', "built like aimet-0.6.1"),
        (b'{"CLS": "TensorsData", "data": {}}', "has no 'calibration_method'"),
        (b"\x0c\0\0\0", "is broken or cut off: it points to bytes 12"),
        (b"\0\0\0\0", "is broken: the offset at byte 0 is 0"),
    ],
)
def test_a_file_that_is_no_table_is_refused_in_one_line(tmp_path, content, message: str) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(TableError, match=message) as raised:
        RangeTable.read(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("content", [b"\0" * 64, b'{"a": [[]]}', b"[]", b"x\n", b"\xff\xfe{\0"])
def test_a_file_of_another_form_is_refused(tmp_path, form: str, content: bytes) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(TableError, match="t: "):
        RangeTable.read(tmp_path / "t", form)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(TableError, match="absent: cannot be read: No such file"):
        RangeTable.read(tmp_path / "absent")
    with pytest.raises(TableError, match="cannot be read: Is a directory"):
        RangeTable.read(tmp_path)


def test_a_file_too_large_for_a_table_is_not_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("qwrap.quant.tables.range_table.LIMIT", 10)
    (tmp_path / "t").write_bytes(b"x 1.0\n" * 2)
    with pytest.raises(TableError, match="t: is larger than"):
        RangeTable.read(tmp_path / "t")


def test_an_unknown_form_lists_the_known_ones(tmp_path) -> None:
    with pytest.raises(TableError, match="form 'trt': choose one of onnxruntime, tensorrt,"):
        RangeTable({}).write(tmp_path / "t", "trt")
    with pytest.raises(TableError, match="form 'trt': choose one of onnxruntime, tensorrt,"):
        RangeTable.read(tmp_path / "t", "trt")


def test_what_cannot_be_written_leaves_the_old_file(tmp_path) -> None:
    (tmp_path / "t").write_text("old")
    with pytest.raises(TableError, match="t: tensor 'x': has 2 ranges"):
        RangeTable({"x": TensorRange([0, 0], [1, 1])}).write(tmp_path / "t", "tensorrt")
    with pytest.raises(TableError, match="is not text that a file can hold"):
        RangeTable({"\ud800": TensorRange(0, 1)}).write(tmp_path / "t", "tensorrt-text")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]
    with pytest.raises(TableError, match="t: cannot be written"):
        RangeTable({}).write(tmp_path / "no folder" / "t", "tensorrt")


def test_a_byte_order_mark_before_json_is_no_harm(tmp_path) -> None:
    (tmp_path / "t").write_bytes(b"\xef\xbb\xbf" + json.dumps({"x": [0, 1]}).encode())
    assert RangeTable.read(tmp_path / "t")["x"] == TensorRange(0, 1)


def test_a_table_of_two_thousand_tensors_is_read_at_once(tmp_path) -> None:
    """Quadratic reading would take minutes."""
    table = RangeTable({f"tensor {i}": TensorRange(-i, i) for i in range(2000)})
    for form in ("onnxruntime", "tensorrt", "tensorrt-flatbuffers"):
        table.write(tmp_path / "t", form)
        assert len(RangeTable.read(tmp_path / "t")) == 2000


# --- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["aimet-1.0.0", "aimet-2.0.0"])
def test_scales_of_blocks_return_to_the_model_they_are_from(small, tmp_path, form: str) -> None:
    nodes = "a = MatMul(x, w) y = Gemm<transB=1>(a, v)"
    source = small.build(nodes, {"w": (8, 6), "v": (5, 6)}, "float[N,8] x", "float[N,5] y", 21)
    spec = qwrap.QuantSpec(dtype="int4", block_size=2)
    batches = small.batches(shape=(4, 8))
    model = calibrated(source, batches, weight=spec)
    table = RangeTable.of(model)
    assert table["w"].scale.shape == (4, 6)  # blocks along the rows that a MatMul sums over
    assert table["v"].scale.shape == (5, 3)
    table.write(tmp_path / "t", form)
    read = RangeTable.read(tmp_path / "t")
    for name, point in (("w", UsePoint("/a", 1)), ("v", UsePoint("/y", 1))):
        stub = model.tap(point)
        qparams = read[name].qparams(stub.spec, stub.scale.shape)
        assert torch.equal(qparams.scale, stub.scale)
        assert torch.equal(qparams.zero_point, stub.zero_point)
