"""Reading: what is refused, with which words, and what stays on disk."""

import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qwrap.errors import ModelError
from qwrap.graph import OnnxGraph, read_model
from qwrap.graph.load import external_tensors

Build = Callable[..., onnx.ModelProto]
RELU = helper.make_node("Relu", ["x"], ["y"], "relu")


def external(folder: Path, build: Build, **entries: str) -> Path:
    """A model whose only weight, float32[256], lies in ``weights.bin``."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[256])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "weights.bin", **entries}.items():
        weight.external_data.add(key=key, value=value)
    nodes = [helper.make_node("Add", ["x", "w"], ["y"], "add")]
    path = folder / "model.onnx"
    path.write_bytes(build(nodes, {"x": [256]}, initializers=[weight]).SerializeToString())
    (folder / "weights.bin").write_bytes(np.arange(256, dtype=np.float32).tobytes())
    return path


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x00" * 64, b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not an ONNX model"):
        read_model(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(ModelError, match="no such file"):
            read_model(path)


def test_every_truncation_is_refused(tmp_path: Path, build: Build) -> None:
    whole = build([RELU], opset=17).SerializeToString()
    path = tmp_path / "model.onnx"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            read_model(path)


def test_the_three_kinds_of_source_give_the_same_graph(tmp_path: Path, build: Build) -> None:
    proto = build([RELU])
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    graphs = [OnnxGraph(read_model(s)) for s in (path, str(path), proto, ir.load(path))]
    assert len({tuple(g.nodes) for g in graphs}) == 1
    assert len({tuple(g.types.items()) for g in graphs}) == 1


def test_the_source_is_not_modified(build: Build) -> None:
    proto = build([RELU, helper.make_node("Relu", ["y"], ["z"])], outputs=("z",))
    before = proto.SerializeToString(deterministic=True)
    OnnxGraph(read_model(proto))
    assert proto.SerializeToString(deterministic=True) == before
    source = ir.from_proto(proto)
    read_model(source).graph.node(0).name = "changed"
    assert ir.to_proto(source).SerializeToString(deterministic=True) == before


# --- external data -------------------------------------------------------------------------------


def test_external_data_is_read_when_used(tmp_path: Path, build: Build) -> None:
    model = read_model(external(tmp_path, build, offset="0", length="1024"))
    (tensor,) = external_tensors(model)
    assert tensor.raw is None  # not even mapped
    np.testing.assert_array_equal(tensor.numpy(), np.arange(256, dtype=np.float32))


def test_reading_a_large_model_takes_no_memory_for_its_weights(tmp_path: Path) -> None:
    size = 64 * 2**20
    weight = ir.tensor(np.ones(size // 4, np.float32), name="w")
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    w = ir.Value(name="w", const_value=weight, type=x.type, shape=ir.Shape([size // 4]))
    node = ir.node("Add", [x, w])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 17})
    ir.save(ir.Model(graph, ir_version=8), tmp_path / "m.onnx", external_data="m.data")
    del weight, w, node, graph
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    OnnxGraph(read_model(tmp_path / "m.onnx"))
    unit = 1 if sys.platform == "darwin" else 1024
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    assert grown < size // 4


@pytest.mark.parametrize(
    "location", ["/etc/hostname", "../weights.bin", "a/../../weights.bin", "", "link.bin", "in/w"]
)
def test_external_data_outside_the_folder_is_refused(
    tmp_path: Path, build: Build, location: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(1024))
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    (tmp_path / "w").write_bytes(bytes(1024))
    (folder / "in").symlink_to(tmp_path)
    with pytest.raises(ModelError, match=r"'w'.*leaves the model's folder"):
        read_model(external(folder, build, location=location))


def test_an_onnx_ir_model_is_held_to_the_same_folder(tmp_path: Path, build: Build) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(1024))
    source = ir.load(external(folder, build, location="../weights.bin"))
    with pytest.raises(ModelError, match="leaves the model's folder"):
        read_model(source)
    good = ir.load(external(folder, build))
    assert [t.numpy().sum() for t in external_tensors(read_model(good))] == [255 * 128]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"location": "none.bin"}, "'none.bin' is missing"),
        ({"location": "nul\0.bin"}, "cannot be followed"),
        ({"offset": "4"}, "too short: 1024 bytes, needed are 1024 from 4 on"),
        ({"offset": "-4"}, "too short"),
        ({"length": "1020"}, "length 1020 .* needs 1024 bytes"),
        ({"length": "many"}, "is not a number"),
    ],
)
def test_unusable_external_data_is_refused(
    tmp_path: Path, build: Build, entries: dict[str, str], words: str
) -> None:
    with pytest.raises(ModelError, match=f"(?s)'w'.*{words}"):
        read_model(external(tmp_path, build, **entries))


def test_a_symlink_loop_is_refused(tmp_path: Path, build: Build) -> None:
    (tmp_path / "loop.bin").symlink_to(tmp_path / "loop.bin")
    with pytest.raises(ModelError, match=r"loop\.bin"):
        read_model(external(tmp_path, build, location="loop.bin"))


def test_a_proto_with_external_data_asks_for_the_path(tmp_path: Path, build: Build) -> None:
    proto = onnx.load(external(tmp_path, build), load_external_data=False)
    with pytest.raises(ModelError, match="pass the model's path"):
        read_model(proto)


# --- graphs --------------------------------------------------------------------------------------


def test_a_newer_opset_than_onnx_knows_is_refused(build: Build) -> None:
    with pytest.raises(ModelError, match="opset 999; the installed onnx"):
        read_model(build([RELU], opset=999))


def test_a_domain_without_opset_is_refused(build: Build) -> None:
    node = helper.make_node("Gelu", ["x"], ["y"], "gelu", domain="com.microsoft")
    with pytest.raises(ModelError, match=r"node 'gelu' is of domain 'com\.microsoft'"):
        read_model(build([node]))
    proto = build([RELU])
    proto.opset_import[0].domain = "com.microsoft"
    with pytest.raises(ModelError, match=r"node 'relu' is of domain 'ai\.onnx'"):
        read_model(proto)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (helper.make_node("Relu", [], ["y"], "n"), "node 'n' .*has 0 inputs"),
        (helper.make_node("Relu", [""], ["y"], "n"), "leaves out its input 'X'"),
        (helper.make_node("Relu", ["x"], ["y", "z"], "n"), "has 2 outputs"),
        (
            helper.make_node("Softmax", ["x"], ["y"], "n", axis="0"),
            "'axis' is of type STRING, expected INT",
        ),
        (helper.make_node("Softmax", ["x"], ["y"], "n", axes=0), "has no attribute 'axes'"),
        (helper.make_node("Concat", ["x"], ["y"], "n"), "lacks its attribute 'axis'"),
        (helper.make_node("Relu", ["a"], ["y"], "n"), r"node 'n' reads \['a'\]"),
        (helper.make_node("Relu", ["x"], ["x"], "n"), r"node 'n' produces \['x'\]"),
        (helper.make_node("Split", ["x"], ["y", "y"], "n"), r"node 'n' produces \['y'\]"),
        (helper.make_node("Relu", ["x"], ["z"], "n"), r"graph outputs \['y'\]"),
    ],
)
def test_a_malformed_node_is_refused(build: Build, node: onnx.NodeProto, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        read_model(build([node]))


def test_all_malformed_nodes_are_named_at_once(build: Build) -> None:
    nodes = [helper.make_node("Concat", ["x"], [n], n) for n in ("y", "z")]
    with pytest.raises(ModelError, match=r"node 'y' .*; node 'z' "):
        read_model(build(nodes))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (TensorProto(name="w", data_type=99, dims=[3]), "element type 99"),
        (TensorProto(name="w", data_type=1, dims=[-3]), r"shape \[-3\]"),
        (TensorProto(name="w", data_type=1, dims=[3], raw_data=bytes(8)), "8 bytes of data for 12"),
    ],
)
def test_a_malformed_tensor_is_refused(build: Build, tensor: TensorProto, words: str) -> None:
    proto = build([helper.make_node("Add", ["x", "w"], ["y"])], initializers=[tensor])
    with pytest.raises(ModelError, match=f"'w': .*{words}"):
        read_model(proto)


def test_initialisers_of_one_name_are_refused(build: Build) -> None:
    w = numpy_helper.from_array(np.ones(3, np.float32), "w")
    proto = build([helper.make_node("Add", ["x", "w"], ["y"])], initializers=[w, w])
    with pytest.raises(ModelError, match=r"\['w'\] appear twice"):
        read_model(proto)


def test_text_that_is_not_utf8_is_refused(build: Build) -> None:
    data = build([RELU]).SerializeToString().replace(b"relu", b"re\xff\xfe")
    with pytest.raises(ModelError, match="not UTF-8"):
        read_model(onnx.ModelProto.FromString(data))
