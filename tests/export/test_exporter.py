import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import external_data_helper

import qwrap
from qwrap.errors import ExportError, NotCalibratedError


def calibrated(source, batches, config=None):
    model = qwrap.load(source).eval()
    qwrap.prepare(model, config or qwrap.QConfig(scope="kernels"))
    qwrap.calibrate(model, batches, progress=False)
    return model


def test_what_the_file_says_of_itself_is_kept(small, quantized) -> None:
    source = small.convs()
    source.producer_name, source.doc_string, source.domain = "maker", "what it is", "org.example"
    source.model_version = 7
    source.metadata_props.add(key="labels", value="cat,dog")
    source.graph.doc_string = "the graph"
    source.opset_import.add(domain="com.example", version=3)
    file = quantized(source).file()
    for field in ("producer_name", "doc_string", "domain", "model_version", "ir_version"):
        assert getattr(file, field) == getattr(source, field)
    assert file.metadata_props == source.metadata_props
    assert (file.graph.name, file.graph.doc_string) == ("small", "the graph")
    assert file.opset_import == source.opset_import


def test_two_exports_are_equal_byte_for_byte(small, tmp_path: Path) -> None:
    for name in ("a", "b"):
        qwrap.export(calibrated(small.convs(), small.batches()), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_nothing_quantized_exports_the_float_model(small, quantized) -> None:
    source = small.build("a = Sin(x) y = Add(a, c)", {"c": (3, 1, 1)})
    result = quantized(source)
    assert "0 activations, 0 weights" in result.model.plan.summary()
    graph = result.file().graph
    for field in ("node", "initializer", "input", "output"):
        assert getattr(graph, field) == getattr(source.graph, field)
    batch = small.batches()[0]
    expected = onnxruntime.InferenceSession(source.SerializeToString()).run(None, {"x": batch})
    assert np.array_equal(small.run(result.path, batch)[0], expected[0])
    with qwrap.exact(result.model):
        found = result.model(torch.from_numpy(batch))
    torch.testing.assert_close(found, torch.from_numpy(expected[0]), rtol=1e-6, atol=1e-6)


def test_a_model_that_is_not_calibrated_is_refused_by_tensor(small, tmp_path: Path) -> None:
    model = qwrap.load(small.convs())
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    with pytest.raises(NotCalibratedError, match=r"tensor '\w+' has no scale yet; run"):
        qwrap.export(model, tmp_path / "q.onnx")
    assert not list(tmp_path.iterdir())


def refuse_sessions(monkeypatch) -> None:
    session = onnxruntime.InferenceSession

    def refuse(model, *args, **settings):
        if isinstance(model, Path):  # files, but not the float model nor single nodes
            raise RuntimeError("no kernel for it")
        return session(model, *args, **settings)

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)


def test_a_file_that_no_session_opens_leaves_the_old_one(small, tmp_path, monkeypatch) -> None:
    model, target = calibrated(small.convs(), small.batches()), tmp_path / "q.onnx"
    target.write_bytes(b"old")
    refuse_sessions(monkeypatch)
    with pytest.raises(ExportError, match="onnxruntime refuses the quantized model: no kernel"):
        qwrap.export(model, target)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["q.onnx"]


def test_a_place_that_cannot_be_written_is_refused(small, tmp_path: Path) -> None:
    model = calibrated(small.convs(), small.batches())
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"folder .* does not exist"):
        qwrap.export(model, tmp_path / "nowhere" / "q.onnx")
    with pytest.raises(ExportError, match="does not exist"):
        qwrap.export(model, tmp_path / "file" / "q.onnx")
    with pytest.raises(ExportError, match="is a folder"):
        qwrap.export(model, tmp_path)
    if Path("/proc/self").is_dir():  # a folder where even root can make nothing
        with pytest.raises(ExportError, match="cannot be written"):
            qwrap.export(model, "/proc/self/q.onnx")


def save_external(source, path: Path, data: str) -> None:
    external_data_helper.convert_model_to_external_data(source, location=data, size_threshold=0)
    onnx.save(source, path)


def test_external_weights_stay_external(small, tmp_path: Path) -> None:
    save_external(small.convs(), tmp_path / "m.onnx", "weights.bin")
    model = calibrated(tmp_path / "m.onnx", small.batches())
    qwrap.export(model, tmp_path / "q.onnx")
    assert (tmp_path / "q.onnx.data").exists()
    inside = calibrated(small.convs(), small.batches())
    qwrap.export(inside, tmp_path / "inside.onnx")
    batch = small.batches()[0]
    assert np.array_equal(
        small.run(tmp_path / "q.onnx", batch)[0], small.run(tmp_path / "inside.onnx", batch)[0]
    )
    qwrap.export(model, tmp_path / "one.onnx", external_data=False)
    assert not (tmp_path / "one.onnx.data").exists()


def test_weights_that_are_still_read_are_not_replaced(small, tmp_path: Path) -> None:
    save_external(small.convs(), tmp_path / "m.onnx", "q.onnx.data")
    before = (tmp_path / "q.onnx.data").read_bytes()
    model = calibrated(tmp_path / "m.onnx", small.batches())
    with pytest.raises(ExportError, match=r"still reads its weights from 'q.onnx.data'"):
        qwrap.export(model, tmp_path / "q.onnx")
    assert (tmp_path / "q.onnx.data").read_bytes() == before


def test_a_model_proto_and_a_path_export_the_same(small, tmp_path: Path) -> None:
    onnx.save(small.convs(), tmp_path / "m.onnx")
    for name, source in (("a", small.convs()), ("b", os.fspath(tmp_path / "m.onnx"))):
        qwrap.export(calibrated(source, small.batches()), os.fspath(tmp_path / name))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_file_that_was_loaded_is_not_replaced(small, tmp_path: Path) -> None:
    path = tmp_path / "float.onnx"
    onnx.save(small.convs(), path)
    before = path.read_bytes()
    model = qwrap.load(path)
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    qwrap.calibrate(model, small.batches(2), progress=False)
    with pytest.raises(ExportError, match="is the float model itself"):
        qwrap.export(model, tmp_path / ".." / tmp_path.name / "float.onnx")
    assert path.read_bytes() == before
