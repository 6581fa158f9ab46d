"""Reading and writing models, and raising their opset."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quant_utils as incumbent

from qwrap.ort.enums import QuantType
from qwrap.ort.errors import InvalidModelError
from qwrap.ort.files import metadata, model_io, opset, proto_file

SHARED = Path(os.environ.get("QWRAP_SHARED", Path(__file__).resolve().parents[3] / "shared"))
BEYOND = 2_150_000_000  # bytes: more than a message can be


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).normal(0, 1, shape).astype(np.float32)


def parse(
    text: str, weights: dict[str, np.ndarray] | None = None, version: int = 17, ir: int = 8
) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f'<ir_version: {ir}, opset_import: ["": {version}, "com.microsoft": 1, "own": 3]> g {text}'
    )
    for name, value in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    return model


def outputs(model: onnx.ModelProto | Path, **feeds: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    source = model if isinstance(model, Path) else model.SerializeToString()
    opened = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return opened.run(None, feeds)


def shapes(graph: onnx.GraphProto) -> dict[str, list[int | str]]:
    return {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.value_info, *graph.output)
    }


def two_layers() -> onnx.ModelProto:
    text = "(float[N,200] x) => (float[] y) { h = MatMul(x, w) y = Relu(h) }"
    return parse(text, {"w": random(200, 200)})


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.ort(2, 38, 275)
@pytest.mark.parametrize("form", ["path", "str", "message"])
def test_a_model_is_read_with_types_and_metadata(tmp_path: Path, form: str) -> None:
    model = two_layers()
    onnx.save(model, tmp_path / "m.onnx")
    path = tmp_path / "m.onnx"
    source = {"path": path, "str": str(path), "message": model}[form]
    before = model.SerializeToString()
    read = model_io.read_model(source)
    assert model.SerializeToString() == before
    theirs = incumbent.load_model_with_shape_infer(path)
    assert shapes(read.graph) == shapes(theirs.graph) == {"h": ["N", 200], "y": ["N", 200]}
    assert metadata.model_has_infer_metadata(read)
    assert incumbent.model_has_infer_metadata(read)
    assert list(read.graph.initializer) == list(model.graph.initializer)


@pytest.mark.ort(275, 276, "G65")
def test_external_data_is_read_and_nothing_written_beside_it(tmp_path: Path) -> None:
    """onnxruntime's writes '<stem>-inferred.onnx' beside the input and fails where it must not."""
    onnx.save(two_layers(), tmp_path / "m.onnx", save_as_external_data=True, location="w.bin")
    for file in tmp_path.iterdir():
        file.chmod(0o444)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path, *tmp_path.iterdir())}
    assert model_io.model_has_external_data(tmp_path / "m.onnx")
    read = model_io.load_model_with_shape_infer(tmp_path / "m.onnx")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path, *tmp_path.iterdir())} == before
    assert np.array_equal(numpy_helper.to_array(read.graph.initializer[0]), random(200, 200))
    assert not onnx.external_data_helper.uses_external_data(read.graph.initializer[0])


@pytest.mark.ort(275)
def test_what_is_missing_or_outside_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in" / "m.onnx"
    path.parent.mkdir()
    with pytest.raises(FileNotFoundError, match="no such file"):
        model_io.read_model(path)
    path.write_bytes(b"no model")
    with pytest.raises(RuntimeError, match="not an ONNX model"):
        model_io.read_model(path)
    onnx.save(two_layers(), path, save_as_external_data=True, location="w.bin")
    pointed = onnx.load(path, load_external_data=False)
    with pytest.raises(InvalidModelError, match=r"'w' lies in a file.*give the path"):
        model_io.read_model(pointed)
    (path.parent / "w.bin").rename(tmp_path / "w.bin")
    with pytest.raises(FileNotFoundError, match="missing"):
        model_io.read_model(path)
    pointed.graph.initializer[0].external_data[0].value = "../w.bin"
    path.write_bytes(pointed.SerializeToString())
    with pytest.raises(InvalidModelError, match="leaves the model's folder"):
        model_io.read_model(path)


@pytest.mark.ort("G11")
def test_constant_nodes_become_initializers_in_every_graph() -> None:
    """onnxruntime's takes their weights for activations, or fails."""
    model = parse(
        """(float[2] x, bool c) => (float[2] y, float o) {
            k = Constant<value = float[2] {1, 2}>()
            o = Constant<value_float = 3.0>()
            i = Constant<value_ints = [2]>()
            s = Reshape(x, i)
            t = Add(s, k)
            y = If(c) <
                then_branch = th () => (float[2] p) {
                    n = Constant<value_float=2.0>() p = Mul(t, n) },
                else_branch = el () => (float[2] q) { q = Constant<value = float[2] {5, 6}>() }
            >
        }"""
    )
    model.graph.node[0].name = "named"
    gone: set[str] = set()
    read = model_io.read_model(model, gone)
    assert gone == {"named"}
    # A shape is no weight; "o" is an output of the graph.
    types = [n.op_type for n in read.graph.node]
    assert types == ["Constant", "Constant", "Reshape", "Add", "If"]
    assert [t.name for t in read.graph.initializer] == ["k"]
    bodies = [attribute.g for attribute in read.graph.node[4].attribute]
    assert [[n.op_type for n in body.node] for body in bodies] == [["Mul"], ["Constant"]]
    x = random(2)
    for branch in (True, False):
        feeds = {"x": x, "c": np.array(branch)}
        for before, after in zip(outputs(model, **feeds), outputs(read, **feeds), strict=True):
            assert np.array_equal(before, after)


@pytest.mark.ort("G11")
def test_lifted_constants_are_inputs_where_the_format_wants_it() -> None:
    model = parse(
        "(float[2] x) => (float[2] y) { k = Constant<value = float[2] {1,2}>() y = Add(x, k) }",
        ir=3,
    )
    read = model_io.read_model(model)
    assert [value.name for value in read.graph.input] == ["x", "k"]
    assert np.array_equal(outputs(read, x=random(2))[0], random(2) + np.array([1, 2], np.float32))


@pytest.mark.ort(275, 321, 351)
def test_shapes_pass_other_domains_and_symbolic_dimensions() -> None:
    model = parse(
        """(float[N,T,200] x) => (float[] y) {
            h = MatMul(x, w)
            g = com.microsoft.Gelu(h)
            r = Relu(g)
            u = own.Strange(r)
            y = Neg(u)
        }""",
        {"w": random(200, 200)},
    )
    read = model_io.read_model(model)
    known = shapes(read.graph)
    assert known["g"] == known["r"] == ["N", "T", 200]
    assert [n.op_type for n in read.graph.node] == ["MatMul", "Gelu", "Relu", "Strange", "Neg"]
    theirs = incumbent.save_and_reload_model_with_shape_infer(model)
    assert "r" not in {v.name for v in theirs.graph.value_info}


@pytest.mark.ort(275)
def test_shapes_in_bodies_are_declared() -> None:
    model = parse(
        """(float[2,3] x, bool c) => (float[] y) {
            y = If(c) <then_branch = th () => (float[] p) { a = Relu(x) p = Neg(a) },
                       else_branch = el () => (float[] q) { q = Exp(x) }>
        }"""
    )
    read = model_io.read_model(model)
    assert shapes(read.graph.node[0].attribute[0].g) == {"a": [2, 3], "p": [2, 3]}


@pytest.mark.ort(275)
def test_wrong_declarations_do_not_stop_anything() -> None:
    model = two_layers()
    model.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [7, 7, 7]))
    assert [n.op_type for n in model_io.read_model(model).graph.node] == ["MatMul", "Relu"]


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.ort(3, 12)
def test_a_file_is_replaced_as_a_whole_with_its_data(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = two_layers()
    model_io.write_model(model, path, use_external_data_format=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    again = model_io.read_model(path)  # over its own file: its data is in memory
    model_io.write_model(again, str(path), use_external_data_format=True)
    x = random(3, 200)
    assert np.array_equal(outputs(path, x=x)[0], outputs(model, x=x)[0])


@pytest.mark.skipif("QWRAP_LARGE" not in os.environ, reason="half a minute; set QWRAP_LARGE=1")
@pytest.mark.ort(275, "G66")
def test_models_beyond_two_gigabytes_are_read_raised_and_written(tmp_path: Path) -> None:
    model = parse(
        "(float[1,4] x) => (float[] y) { h = MatMul(x, w) s = Squeeze<axes=[0]>(h) y = Relu(s) }",
        version=11,
    )
    tensor = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT)
    tensor.dims[:] = [4, BEYOND // 16]
    path = tmp_path / "big.onnx"
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(BEYOND)  # a hole: it takes no room on the disk
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    path.write_bytes(model.SerializeToString())
    read = model_io.read_model(path)
    assert read.graph.initializer[0].HasField("raw_data")
    raised = opset.raise_opset(read, 21)
    del read
    assert metadata.get_opset_version(raised) == 21
    assert shapes(raised.graph) == {
        "h": [1, BEYOND // 16],
        "s": [BEYOND // 16],
        "y": [BEYOND // 16],
    }
    model_io.write_model(raised, tmp_path / "raised.onnx")
    assert (tmp_path / "raised.onnx.data").stat().st_size == BEYOND


@pytest.mark.ort(12, 275)
def test_what_is_too_large_for_a_message_goes_to_a_file_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proto_file, "LIMIT", 100_000)  # of 160 000 bytes
    path = tmp_path / "m.onnx"
    model_io.write_model(two_layers(), path)
    assert (tmp_path / "m.onnx.data").stat().st_size == 160_000
    assert np.array_equal(
        outputs(path, x=random(3, 200))[0], outputs(two_layers(), x=random(3, 200))[0]
    )


# --- opsets --------------------------------------------------------------------------------------


def squeezed(version: int) -> onnx.ModelProto:
    """Squeeze has another form from opset 13 on."""
    return parse(
        "(float[1,2,3] x) => (float[] y) { s = Squeeze<axes=[0]>(x) y = Softmax<axis=1>(s) }",
        version=version,
    )


@pytest.mark.ort(263, 264, 265, 266, 268)
@pytest.mark.parametrize(
    ("before", "weight", "activation", "block", "overrides", "after"),
    [
        (9, "QInt8", "QUInt8", 0, None, 11),
        (10, "QInt8", "QUInt8", 0, None, 10),
        (11, "QInt8", "QUInt8", 0, None, 11),
        (11, "QFLOAT8E4M3FN", "QFLOAT8E4M3FN", 0, None, 19),
        (11, "QInt16", "QUInt8", 0, None, 21),
        (11, "QInt8", "QUInt16", 0, None, 21),
        (11, "QInt8", "QUInt8", 32, None, 21),
        (11, "QInt4", "QUInt8", 0, None, 11),
        (11, "QInt8", "QUInt8", 0, {"x": [{"quant_type": "QInt16"}]}, 21),
        (11, "QInt8", "QUInt8", 0, {"x": [{"convert": {"quant_type": "QUInt16"}}]}, 21),
        (11, "QInt8", "QUInt8", 0, {"x": 3}, 11),
    ],
)
def test_the_opset_rises_as_far_as_the_types_need(
    before: int,
    weight: str,
    activation: str,
    block: int,
    overrides: dict | None,
    after: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def named(kind: type, value: object) -> object:
        if isinstance(value, dict):
            return {k: kind[v] if k == "quant_type" else named(kind, v) for k, v in value.items()}
        return [named(kind, v) for v in value] if isinstance(value, list) else value

    model = squeezed(before)
    results = [
        module.update_opset_version(
            model, kind[weight], kind[activation], named(kind, overrides), block
        )
        for module, kind in ((opset, QuantType), (incumbent, incumbent.QuantType))
    ]
    ours, theirs = results
    assert metadata.get_opset_version(ours) == incumbent.get_opset_version(theirs) == after
    assert {e.domain: e.version for e in ours.opset_import}["own"] == 3
    assert bool([r for r in caplog.records if r.name == "qwrap.ort.files.opset"]) == (
        before == 10 or after != before
    )
    assert {n: s for n, s in shapes(ours.graph).items() if n in ("s", "y")} == (
        {"s": [2, 3], "y": [2, 3]} if after != before else {"y": []}  # nothing declared
    )
    x = random(1, 2, 3)
    assert np.array_equal(outputs(ours, x=x)[0], outputs(model, x=x)[0])


@pytest.mark.ort(268, "G66")
def test_operators_of_other_domains_pass_the_raise() -> None:
    """onnx.version_converter, which onnxruntime's uses, refuses them or drops their domain."""
    model = parse(
        """(float[1,2,8] x) => (float[2,8] y) {
            s = Squeeze<axes=[0]>(x) y = com.microsoft.FastGelu(s) }""",
        version=11,
    )
    raised = opset.update_opset_version(model, QuantType.QInt16)
    assert [n.domain for n in raised.graph.node] == ["", "com.microsoft"]
    assert metadata.get_opset_version(raised) == 21
    x = random(1, 2, 8)
    assert np.array_equal(outputs(raised, x=x)[0], outputs(model, x=x)[0])


@pytest.mark.ort(267, "G66")
def test_a_node_without_an_equal_leaves_16_bits_to_the_other_domain(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = parse("(float[1,1,4,4] x, float[4] k) => (float[] y) { y = Resize(x, k) }", version=10)
    assert opset.update_opset_version(model, QuantType.QInt16) is model
    assert "com.microsoft" in caplog.text
    with pytest.raises(InvalidModelError, match="cannot be raised"):
        opset.update_opset_version(model, QuantType.QInt8, block_size=32)


@pytest.mark.ort(263, 318)
def test_upsample_becomes_a_resize_that_opset_11_accepts() -> None:
    text = '(float[1,1,2,2] x) => (float[1,1,4,4] y) { y = Upsample<mode="nearest">(x, k) }'
    model = parse(text, {"k": np.array([1, 1, 2, 2], np.float32)}, version=9)
    raised = opset.raise_opset(model, 11)
    assert [n.op_type for n in raised.graph.node] == ["Resize"]
    onnx.checker.check_model(raised, full_check=True)
    x = random(1, 1, 2, 2)
    assert np.array_equal(outputs(raised, x=x)[0], outputs(model, x=x)[0])


@pytest.mark.ort(263, 268)
@pytest.mark.parametrize(("name", "shape"), [("mnist_cntk", (1, 1, 28, 28)),
                                             ("super_resolution", (1, 1, 224, 224))])  # fmt: skip
@pytest.mark.parametrize("target", [11, 12, 21])
def test_real_models_compute_the_same_after_the_raise(
    name: str, shape: tuple[int, ...], target: int
) -> None:
    path = SHARED / "models" / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there (QWRAP_SHARED says where to look)")
    model = model_io.read_model(path)
    raised = opset.raise_opset(model, target)
    assert metadata.get_opset_version(raised) == target > metadata.get_opset_version(model)
    feeds = {model.graph.input[0].name: random(*shape)}
    for before, after in zip(outputs(model, **feeds), outputs(raised, **feeds), strict=True):
        assert np.array_equal(before, after)


@pytest.mark.ort(269)
def test_exactly_one_import_of_onnx_is_needed() -> None:
    model = two_layers()
    del model.opset_import[0]
    for module in (metadata, incumbent):
        with pytest.raises(ValueError, match=r"Failed to find proper ai\.onnx domain"):
            module.get_opset_version(model)


@pytest.mark.ort(17, 38, 323)
def test_tags_are_onnxruntimes() -> None:
    ours, theirs = two_layers(), two_layers()
    for module, model in ((metadata, ours), (incumbent, theirs)):
        for _ in range(2):
            module.add_infer_metadata(model)
            module.add_pre_process_metadata(model)
    assert sorted((p.key, p.value) for p in ours.metadata_props) == sorted(
        (p.key, p.value) for p in theirs.metadata_props
    )
    assert metadata.model_has_pre_process_metadata(theirs)
    assert incumbent.model_has_pre_process_metadata(ours)
    logging.getLogger("qwrap.ort").debug("nothing is logged by default")
