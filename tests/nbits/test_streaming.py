"""Models with external data: read one weight at a time, written as they are made."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import large_model
import numpy as np
import onnx
import pytest
from nbits_files import drawn, run
from onnx import helper

import qwrap
from qwrap.graph.save import INSIDE

WIDTH, LAYERS = 1024, 40  # 4 MiB each


@pytest.mark.ort(275)
def test_peak_memory_is_that_of_some_layers(tmp_path: Path) -> None:
    """onnxruntime's tool loads the whole model, and copies weights on the way."""
    source, target = tmp_path / "large.onnx", tmp_path / "large.int4.onnx"
    size = large_model.make(source, LAYERS, WIDTH)
    found = large_model.quantize(source, target, block_size=128)
    # One layer, its codes and what the quantizer needs; some of it is the first use of libraries.
    assert found["bytes"] < size / 4
    data = tmp_path / "large.int4.onnx.data"
    assert size / 8 < data.stat().st_size < size / 7
    assert not run(str(target), {"h0": drawn(2, WIDTH)})[0].any()


def saved(folder: Path) -> Path:
    """A model whose weights, small and large ones, one of them in a node, lie in a file."""
    weights = {"w": drawn(64, 96), "v": drawn(96, 64, seed=1), "b": drawn(64, seed=2)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("Constant", [], ["v"], value=onnx.numpy_helper.from_array(weights["v"])),
        helper.make_node("MatMul", ["h", "v"], ["g"], name="second"),
        helper.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(drawn(64, 64))),
        helper.make_node("Add", ["g", "b"], ["a"], name="add"),
        helper.make_node("MatMul", ["c", "a"], ["y"], name="third"),
    ]
    info = helper.make_tensor_value_info
    inits = [onnx.numpy_helper.from_array(weights[name], name) for name in ("w", "b")]
    graph = helper.make_graph(nodes, "g", [info("x", 1, [64, 64])], [info("y", 1, [64, 64])], inits)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "model.onnx"
    onnx.save(
        model,
        path,
        save_as_external_data=True,
        location="weights",
        size_threshold=0,
        convert_attribute=True,
    )
    return path


@pytest.mark.ort(12, 275)
@pytest.mark.parametrize("form", ["operator", "qdq"])
def test_all_that_was_in_files_is_in_the_new_one(tmp_path: Path, form: str) -> None:
    source = saved(tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    qwrap.quantize_weights(source, folder / "q.onnx", block_size=32, form=form)
    whole = qwrap.quantize_weights(source, block_size=32, form=form)
    (tmp_path / "weights").unlink()
    x = {"x": drawn(64, 64, seed=3)}
    assert {p.name for p in folder.iterdir()} == {"q.onnx", "q.onnx.data"}
    np.testing.assert_array_equal(
        run(str(folder / "q.onnx"), x)[0], run(onnx.load(folder / "q.onnx"), x)[0]
    )
    assert whole is not None
    np.testing.assert_array_equal(run(str(folder / "q.onnx"), x)[0], run(whole, x)[0])
    inside = onnx.load(folder / "q.onnx", load_external_data=False).graph.initializer
    for tensor in inside:
        assert (tensor.data_location == onnx.TensorProto.EXTERNAL) == (
            sum(e.value == "q.onnx.data" for e in tensor.external_data) == 1
        )
        assert len(tensor.raw_data) <= INSIDE


@pytest.mark.ort(12)
@pytest.mark.parametrize("external", [True, False])
def test_where_weights_go_can_be_said(tmp_path: Path, external: bool) -> None:
    source = saved(tmp_path)
    model = onnx.load(source)
    qwrap.quantize_weights(model, tmp_path / "q.onnx", block_size=32, external_data=external)
    assert (tmp_path / "q.onnx.data").exists() == external
    x = {"x": drawn(64, 64, seed=3)}
    whole = qwrap.quantize_weights(model, block_size=32)
    assert whole is not None
    np.testing.assert_array_equal(run(str(tmp_path / "q.onnx"), x)[0], run(whole, x)[0])


def test_what_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    source = saved(tmp_path)

    def breaks(*_: object) -> None:
        raise RuntimeError("no")

    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="no"):
        qwrap.quantize_weights(source, tmp_path / "q.onnx", block_size=32, method=breaks)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.ort("G65")
def test_runs_side_by_side_on_one_model_do_not_meet(tmp_path: Path) -> None:
    source = saved(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    out = tmp_path / "out"
    out.mkdir()

    def quantize(index: int) -> None:
        qwrap.quantize_weights(source, out / f"q{index % 2}.onnx", block_size=32)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(quantize, range(8)))
    assert sorted(p.name for p in tmp_path.iterdir() if p != out) == before
    assert {p.name for p in out.iterdir()} == {
        *("q0.onnx", "q0.onnx.data", "q1.onnx", "q1.onnx.data")
    }
    x = {"x": drawn(64, 64, seed=3)}
    results = [run(str(out / f"q{i}.onnx"), x)[0] for i in range(2)]
    np.testing.assert_array_equal(*results)
