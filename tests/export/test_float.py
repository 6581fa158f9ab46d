"""A model that was not prepared is written as it was read: only what was trained differs."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests

import qwrap
from qwrap.errors import ExportError, ModelError, QwrapError

SHARED = Path(os.environ.get("QWRAP_SHARED", Path(__file__).resolve().parents[3] / "shared"))
MODELS = sorted((SHARED / "models").glob("*.onnx"))


def text(proto: onnx.ModelProto) -> bytes:
    return proto.SerializeToString(deterministic=True)


def tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Tensors that may be parameters, those in subgraphs included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from tensors(attribute.g)
            elif node.op_type == "Constant" and attribute.HasField("t"):
                yield attribute.t


def without_values(proto: onnx.ModelProto) -> bytes:
    rest = onnx.ModelProto()
    rest.CopyFrom(proto)
    for tensor in tensors(rest.graph):
        said = {"dims": tensor.dims, "data_type": tensor.data_type, "doc_string": tensor.doc_string}
        tensor.CopyFrom(TensorProto(name=tensor.name, **said))
    return text(rest)


def add_one(model: qwrap.WrappedModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


# --- whole models --------------------------------------------------------------------------------


@pytest.mark.skipif(not MODELS, reason="needs the folder of shared models beside the checkout")
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_real_model_is_written_byte_for_byte_and_trained_only_its_weights_differ(
    path: Path, tmp_path: Path
) -> None:
    model = qwrap.load(path)
    qwrap.export(model, tmp_path / "same.onnx")
    assert (tmp_path / "same.onnx").read_bytes() == path.read_bytes()
    add_one(model)
    qwrap.export(model, tmp_path / "trained.onnx")
    assert without_values(onnx.load(tmp_path / "trained.onnx")) == without_values(onnx.load(path))
    again = qwrap.load(tmp_path / "trained.onnx").state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=0, equal_nan=True)


def test_models_of_the_backend_suite_are_written_as_they_were(tmp_path: Path) -> None:
    kinds = ("simple", "pytorch-operator", "pytorch-converted")
    cases = [case for kind in kinds for case in load_model_tests(kind=kind)]
    written = 0
    for case in cases:
        source = case.model or onnx.load(Path(case.model_dir) / "model.onnx")
        try:
            model = qwrap.load(source)
        except QwrapError:
            continue  # what cannot be loaded cannot be written
        qwrap.export(model, tmp_path / "m.onnx")
        assert text(onnx.load(tmp_path / "m.onnx")) == text(source), case.name
        written += 1
    assert written > len(cases) // 2


def everything() -> onnx.ModelProto:
    """A model that uses every field that onnx has for what does not compute."""
    weights = {"w": np.ones((2, 3), np.float32), "unused": np.ones(5, np.float32)}
    body = [helper.make_node("Constant", [], ["c"], value_floats=[1.0, 2.0, 3.0], name="c")]
    body += [helper.make_node("Add", ["x", "c"], ["then"], name="then")]
    other = [helper.make_node("Relu", ["x"], ["else"], name="else")]
    branches = {
        "then_branch": helper.make_graph(body, "t", [], [onnx.ValueInfoProto(name="then")]),
        "else_branch": helper.make_graph(other, "e", [], [onnx.ValueInfoProto(name="else")]),
    }
    nodes = [
        helper.make_node("If", ["k"], ["b"], "if", doc_string="a choice", **branches),
        helper.make_node("Add", ["b", "w"], ["y"], "add"),
    ]
    nodes[1].metadata_props.add(key="namespace", value="net/add")
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3], "an input"),
        helper.make_tensor_value_info("k", TensorProto.BOOL, []),
    ]
    inputs[0].type.denotation = "IMAGE"
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])]
    initializers = [numpy_helper.from_array(a, name) for name, a in weights.items()]
    initializers[0].doc_string = "a weight"
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers, "the graph")
    graph.value_info.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, ["n", 3], "info"))
    annotation = graph.quantization_annotation.add(tensor_name="b")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    graph.metadata_props.add(key="of", value="graph")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 3)]
    unused = helper.make_function(
        "com.example", "F", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], opsets[:1]
    )
    model = helper.make_model(graph, opset_imports=opsets, functions=[unused], ir_version=10)
    model.producer_name, model.producer_version, model.domain = "maker", "1.2", "org.example"
    model.model_version, model.doc_string = 7, "what it is"
    model.metadata_props.add(key="labels", value="cat,dog")
    training = model.training_info.add()
    training.algorithm.name = "step"
    training.update_binding.add(key="w", value="w")
    return model


def test_nothing_that_a_file_can_say_is_lost(tmp_path: Path) -> None:
    source = everything()
    model = qwrap.load(source)
    qwrap.export(model, tmp_path / "same.onnx")
    assert text(onnx.load(tmp_path / "same.onnx")) == text(source)
    add_one(pickle.loads(pickle.dumps(model)))
    other = pickle.loads(pickle.dumps(model))
    add_one(other)
    qwrap.export(other, tmp_path / "trained.onnx")
    found = onnx.load(tmp_path / "trained.onnx")
    assert numpy_helper.to_array(found.graph.initializer[0]).tolist() == [[2.0] * 3] * 2
    (before, after) = (m.graph.node[0].attribute[-1].g.node[0] for m in (source, found))
    assert numpy_helper.to_array(after.attribute[0].t).tolist() == [2, 3, 4]
    after.CopyFrom(before)
    assert without_values(found) == without_values(source)


def test_what_the_caller_does_to_a_proto_after_loading_it_is_not_written(tmp_path: Path) -> None:
    source = everything()
    before = text(source)
    model = qwrap.load(source)
    source.graph.node[1].name = "changed"
    qwrap.export(model, tmp_path / "m.onnx")
    assert text(onnx.load(tmp_path / "m.onnx")) == before


def test_an_onnx_ir_model_is_written_as_onnx_ir_writes_it(tmp_path: Path) -> None:
    import onnx_ir as ir

    source = ir.from_proto(everything())
    qwrap.export(qwrap.load(source), tmp_path / "m.onnx")
    assert text(onnx.load(tmp_path / "m.onnx")) == text(ir.to_proto(source))


def test_parameters_of_another_float_type_are_written_in_that_of_the_graph(
    tmp_path: Path,
) -> None:
    source = everything()
    model = qwrap.load(source).half()
    qwrap.export(model, tmp_path / "m.onnx")  # ones are the same in both
    assert text(onnx.load(tmp_path / "m.onnx")) == text(source)


# --- external data -------------------------------------------------------------------------------


def external(folder: Path, *shapes: tuple[int, ...], gap: int = 64) -> Path:
    """A sum of weights in two data types in ``weights.bin``, ``gap`` bytes before each."""
    data, weights, nodes = b"", [], []
    for i, shape in enumerate(shapes):
        array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + i
        data += bytes(gap)
        weight = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=shape)
        weight.data_location = TensorProto.EXTERNAL
        where = {"location": "weights.bin", "offset": len(data), "length": array.nbytes}
        for key, value in where.items():
            weight.external_data.add(key=key, value=str(value))
        weights.append(weight)
        data += array.tobytes()
        last = "x" if i == 0 else f"t{i - 1}"
        out = "y" if i == len(shapes) - 1 else f"t{i}"
        nodes.append(helper.make_node("Add", [last, f"w{i}"], [out], f"add{i}"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    (folder / "weights.bin").write_bytes(data)
    return path


def located(path: Path) -> list[list[tuple[str, str]]]:
    proto = onnx.load(path, load_external_data=False)
    return [[(e.key, e.value) for e in t.external_data] for t in proto.graph.initializer]


def test_external_data_keeps_its_layout(tmp_path: Path) -> None:
    path = external(tmp_path, (4,), (3, 4))
    model = qwrap.load(path)
    qwrap.export(model, tmp_path / "out.onnx")
    assert located(tmp_path / "out.onnx") == [
        [(k, "out.onnx.data" if k == "location" else v) for k, v in entries]
        for entries in located(path)
    ]
    assert (tmp_path / "out.onnx.data").read_bytes() == (tmp_path / "weights.bin").read_bytes()
    add_one(model)
    qwrap.export(model, tmp_path / "trained.onnx")
    for before, after in zip(
        onnx.load(path).graph.initializer,
        onnx.load(tmp_path / "trained.onnx").graph.initializer,
        strict=True,
    ):
        assert np.array_equal(numpy_helper.to_array(before) + 1, numpy_helper.to_array(after))


@pytest.mark.parametrize("sizes", [((4,),), ((512, 4), (4,))])
def test_weights_move_into_the_file_and_out_of_it(tmp_path: Path, sizes) -> None:
    path = external(tmp_path, *sizes)
    expected = [numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
    qwrap.export(qwrap.load(path), tmp_path / "one.onnx", external_data=False)
    assert not any(located(tmp_path / "one.onnx"))
    assert not (tmp_path / "one.onnx.data").exists()
    qwrap.export(qwrap.load(tmp_path / "one.onnx"), tmp_path / "two.onnx", external_data=True)
    assert [bool(e) for e in located(tmp_path / "two.onnx")] == [a.nbytes > 1024 for a in expected]
    for name in ("one", "two"):
        found = onnx.load(tmp_path / f"{name}.onnx").graph.initializer
        for array, tensor in zip(expected, found, strict=True):
            assert np.array_equal(array, numpy_helper.to_array(tensor))


def test_two_initialisers_that_share_bytes_are_trained_apart(tmp_path: Path) -> None:
    path = external(tmp_path, (4,), (4,))
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[1].external_data[1].value = "64"
    path.write_bytes(proto.SerializeToString())
    model = qwrap.load(path)
    with torch.no_grad():
        model.stored("w1").zero_()
    assert model.stored("w0").tolist() == [0, 1, 2, 3]
    qwrap.export(model, tmp_path / "out.onnx")
    found = onnx.load(tmp_path / "out.onnx").graph.initializer
    assert [numpy_helper.to_array(t).tolist() for t in found] == [[0, 1, 2, 3], [0, 0, 0, 0]]


def test_a_model_may_take_the_place_of_the_files_it_came_from(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = external(tmp_path / "in", (4,), (3, 4))
    qwrap.export(qwrap.load(path), tmp_path / "m.onnx")  # its data is m.onnx.data from here on
    model, x = qwrap.load(tmp_path / "m.onnx"), torch.ones(4)
    with torch.no_grad():
        model.stored("w0").mul_(2)
    expected = model(x)
    qwrap.export(model, tmp_path / "m.onnx")
    assert torch.equal(qwrap.load(tmp_path / "m.onnx")(x), expected)
    with torch.no_grad():  # the module still reads what it was loaded from
        model.stored("w0").div_(2)
    assert torch.equal(copy.deepcopy(model)(x), qwrap.load(path)(x))
    qwrap.export(model, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx.data").read_bytes() == (
        (tmp_path / "in" / "weights.bin").read_bytes()
    )
    with pytest.raises(ModelError, match=r"'w0'.*was replaced since the model was loaded"):
        pickle.dumps(model)


def test_nothing_is_left_of_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    path = external(tmp_path, (4,))
    model = qwrap.load(path)
    with pytest.raises(ExportError, match="does not exist"):
        qwrap.export(model, tmp_path / "none" / "m.onnx")
    with path.with_name("weights.bin").open("r+b") as file:
        file.truncate(70)
    with pytest.raises(ExportError, match="cut off while it was read"):
        qwrap.export(model, tmp_path / "out.onnx")
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "weights.bin"]


# --- memory --------------------------------------------------------------------------------------

MEMORY = """
import sys, torch, qwrap
from pathlib import Path
def resident(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind + ":")) // 1024
folder = Path(sys.argv[1])
qwrap.load(folder / "1.onnx")  # what is imported on first use is no cost of the model
start = resident("VmRSS")
large = qwrap.load(folder / "64.onnx")
print(resident("VmRSS") - start, resident("VmHWM") - start)
model = qwrap.load(folder / "8.onnx")
with torch.no_grad():
    model.stored("w0")[0, 0] = 3
qwrap.export(model, folder / "out.onnx")
print(resident("VmHWM") - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_weights_are_in_memory_only_when_used(tmp_path: Path) -> None:
    for count in (1, 8, 64):  # weights of 32 MiB
        proto = onnx.load(external(tmp_path, *[(2,)] * count), load_external_data=False)
        for i, tensor in enumerate(proto.graph.initializer):
            tensor.dims[:] = [8 * 2**20 // 4, 4]
            for entry, value in zip(
                tensor.external_data, (f"{count}.bin", i * 2**25, 2**25), strict=True
            ):
                entry.value = str(value)
        (tmp_path / f"{count}.onnx").write_bytes(proto.SerializeToString())
        with (tmp_path / f"{count}.bin").open("wb") as file:
            file.truncate(count * 2**25)  # a hole: it takes no room on the disk
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, check=True
    )
    loaded, at_most, written = map(int, run.stdout.split())  # MiB
    assert max(loaded, at_most) < 50  # of 2048
    # Of 256: the block of 16 that is on its way, and the changed weight and its neighbour at the
    # border of a page, which are looked at
    assert written < 128
