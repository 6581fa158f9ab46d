import copy
import json
import os
import re
import tracemalloc

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import qwrap
from qwrap.errors import StatisticsError
from qwrap.quant.statistics.fingerprint import Fingerprint


def prepared(source) -> qwrap.WrappedModel:
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    return model


def fingerprint(source) -> Fingerprint:
    return Fingerprint.of(prepared(source))


def test_it_is_the_same_however_the_model_was_stored(small, tmp_path) -> None:
    source = small.convs()
    onnx.save(source, tmp_path / "inside.onnx")
    onnx.save(
        copy.deepcopy(source), tmp_path / "outside.onnx", save_as_external_data=True,
        size_threshold=0, location="outside.data",
    )  # fmt: skip
    expected = fingerprint(source)
    for path in ("inside.onnx", "outside.onnx"):
        assert expected.difference(fingerprint(tmp_path / path)) is None
        assert expected == fingerprint(tmp_path / path)


def test_it_survives_json_and_is_small(small) -> None:
    found = fingerprint(small.convs())
    text = json.dumps(found.to_dict())
    assert Fingerprint.from_dict(json.loads(text)) == found
    assert Fingerprint.from_dict(found.to_dict()) == found
    assert len(text) < 1000


def test_calibrating_and_copying_change_nothing(small) -> None:
    model = prepared(small.convs())
    before = Fingerprint.of(model)
    qwrap.calibrate(model, small.batches(), progress=False)
    assert Fingerprint.of(model) == before
    assert Fingerprint.of(copy.deepcopy(model)) == before


def changed(source, change) -> onnx.ModelProto:
    result = copy.deepcopy(source)
    change(result.graph)
    return result


def set_weight(name: str, index: int = -1):
    def change(graph) -> None:
        tensor = next(t for t in graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor).copy()
        array.reshape(-1)[index] *= np.float32(1 + 2**-20)
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return change


def set_pads(graph) -> None:
    graph.node[2].attribute[0].ints[:] = [1, 1, 0, 1]


def add_node(graph) -> None:
    graph.node[2].output[0] = "before"
    graph.node.append(onnx.helper.make_node("Relu", ["before"], ["y"], "/last"))


def rename_node(graph) -> None:
    graph.node[1].name = "other"


def set_operator(graph) -> None:
    graph.node[1].op_type = "Sigmoid"


def rewire(graph) -> None:
    graph.node[2].input[2] = graph.initializer[1].name
    graph.initializer[1].CopyFrom(numpy_helper.from_array(np.zeros(4, np.float32), "b1"))
    graph.node[0].input.pop()


def set_shape(graph) -> None:
    graph.input[0].type.tensor_type.shape.dim[2].dim_value = 16


def rename_input(graph) -> None:
    graph.input[0].name = graph.node[0].input[0] = "images"


CHANGES = {
    "one weight": (set_weight("w2"), r"^weights w2 \(1 of 4\) differ$"),
    "attribute": (set_pads, r"^the first difference is at node '/y' \(Conv, pads\)$"),
    "node": (add_node, r"^3 nodes here, 4 there; the first difference is at node '/y' \(Conv, o"),
    "node name": (rename_node, r"^the first difference is at node '/b' here, 'other' there$"),
    "operator": (set_operator, r"node '/b' \(Relu-1 here, Sigmoid-1 there\)"),
    "wiring": (rewire, r"node '/a' \(Conv, inputs\)"),
    "shape": (set_shape, r"^input 'x' float\[N,3,8,8\] here, input 'x' float\[N,3,16,8\] there$"),
    "input name": (rename_input, r"^input 'x' float\[N,3,8,8\] here, input 'images' float"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_model_is_told_with_what_differs(small, name: str) -> None:
    change, message = CHANGES[name]
    source = small.convs()
    difference = fingerprint(source).difference(fingerprint(changed(source, change)))
    assert difference is not None
    assert re.search(message, difference), difference


def test_many_weights_are_counted(small) -> None:
    source, other = small.convs(), small.convs()
    for name in ("w1", "b1", "w2", "b2"):
        set_weight(name)(other.graph)
    difference = fingerprint(source).difference(fingerprint(other))
    assert difference == "weights w1, b1, w2, … (4 of 4) differ"


def test_a_trained_model_is_another_one(small) -> None:
    model = prepared(small.convs())
    before = Fingerprint.of(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model(torch.from_numpy(small.batches()[0])).square().mean().backward()
    optimizer.step()
    assert "differ" in (before.difference(Fingerprint.of(model)) or "")


def test_a_changed_byte_in_a_mapped_file_is_seen(small, tmp_path) -> None:
    source = small.convs()
    for name in ("a", "b"):
        onnx.save(copy.deepcopy(source), tmp_path / f"{name}.onnx", save_as_external_data=True,
                  size_threshold=0, location=f"{name}.data")  # fmt: skip
    data = bytearray((tmp_path / "b.data").read_bytes())
    data[-1] ^= 1
    (tmp_path / "b.data").write_bytes(data)
    a, b = prepared(tmp_path / "a.onnx"), prepared(tmp_path / "b.onnx")
    assert "(1 of 4) differ" in (Fingerprint.of(a).difference(Fingerprint.of(b)) or "")
    with torch.no_grad():  # what was written to memory counts, not what the file says
        b.stored("w1").mul_(2)
        b.stored("b2").copy_(a.stored("b2"))
    difference = Fingerprint.of(a).difference(Fingerprint.of(b))
    wrong = [k for k in a.layout.slots if not torch.equal(a.stored(k), b.stored(k))]
    assert "w1" in wrong
    assert difference == f"weights {', '.join(wrong)} ({len(wrong)} of 4) differ"


def test_the_opset_is_no_difference_where_operators_mean_the_same(small) -> None:
    assert fingerprint(small.convs(opset=13)).difference(fingerprint(small.convs(opset=17))) is None
    nodes, weights = "a = Conv(x, w) y = Softmax<axis=1>(a)", {"w": (4, 3, 1, 1)}
    old, new = (fingerprint(small.build(nodes, weights, opset=n)) for n in (11, 13))
    assert old.difference(new) is not None  # Softmax-13 normalizes along one axis only


def test_an_opset_raised_for_a_type_is_no_difference(small) -> None:
    """Also where an operator has another revision there: BatchNormalization-14, Constant-21."""
    nodes = (
        "t = Constant<value = float[1] {2}>() r = Relu(x) "
        "n = BatchNormalization(r, s, b, m, v) a = Mul(n, t) y = Conv(a, w)"
    )
    weights = {"w": (4, 3, 1, 1), "s": (3,), "b": (3,), "m": (3,), "v": np.ones(3, np.float32)}
    model = qwrap.load(small.build(nodes, weights, opset=13)).eval()
    prints = []
    for config in (qwrap.QConfig(), qwrap.QConfig(weight="int4"), qwrap.QConfig()):
        qwrap.prepare(model, config)
        prints.append((model.graph.opset, Fingerprint.of(model)))
    assert [opset for opset, _ in prints] == [13, 21, 21]
    assert prints[0][1].difference(prints[1][1]) is prints[1][1].difference(prints[2][1]) is None
    assert prints[0][1].nodes != prints[1][1].nodes


def test_constants_of_every_type_count(small) -> None:
    values = [
        np.array([1, 2], np.int64),
        np.array([1, 2], ml_dtypes.bfloat16),
        np.array([1, 2, 3], ml_dtypes.int4),
        np.array([True, False]),
    ]
    for value in values:
        source = small.convs(opset=21)
        source.graph.initializer.append(numpy_helper.from_array(value, "c"))
        other = copy.deepcopy(source)
        other.graph.initializer[-1].CopyFrom(numpy_helper.from_array(value[::-1].copy(), "c"))
        assert fingerprint(source).difference(fingerprint(other)) == "weights c (1 of 5) differ"


def test_a_trained_constant_node_counts(small) -> None:
    nodes = "c = Constant<value = float[3,1,1] {1, 2, 3}>() m = Mul(x, c) y = Conv(m, w)"
    source = small.build(nodes, {"w": (4, 3, 1, 1)})
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    before = Fingerprint.of(model)
    with torch.no_grad():
        model.stored("c").mul_(2)
    assert before.difference(Fingerprint.of(model)) == "weights c (1 of 2) differ"


BODIES = (
    "m = ReduceMean<keepdims=0>(x) g = Greater(m, z) a = Conv(x, w) "
    "y = If (g) <then_branch = t () => (float[N,4,8,8] p) {{ p = {} }}, "
    "else_branch = e () => (float[N,4,8,8] q) {{ q = Relu(a) }}>"
)


def test_the_nodes_of_branches_count(small) -> None:
    weights = {"w": (4, 3, 1, 1), "z": np.array(0, np.float32)}
    mine, theirs = (
        fingerprint(small.build(BODIES.format(node), weights)) for node in ("Neg(a)", "Abs(a)")
    )
    expected = "the first difference is at node '/p' (Neg-1 here, Abs-1 there)"
    assert mine.difference(theirs) == expected


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: None,
        lambda _: [],
        lambda c: {**c, "weights": [1]},
        lambda c: {**c, "weights": {"w1": 1}},
        lambda c: {**c, "nodes": [["a"]]},
        lambda c: {**c, "nodes": "abc"},
        lambda c: {**c, "opset": "13"},
        lambda c: {**c, "ends": [["input", "x", None]]},
        lambda c: {"nodes": c["nodes"]},
    ],
)
def test_a_damaged_fingerprint_is_refused(small, damage) -> None:
    content = json.loads(json.dumps(fingerprint(small.convs()).to_dict()))
    with pytest.raises(StatisticsError, match="the fingerprint of its model is damaged"):
        Fingerprint.from_dict(damage(content))


def test_memory_does_not_hold_a_second_copy_of_the_weights(small, tmp_path) -> None:
    size = 48 << 20
    source = small.build("y = MatMul(x, w)", {}, "float[N,3] x", "float[N,M] y")
    big = np.zeros((3, size // 12), np.float32)
    source.graph.initializer.append(numpy_helper.from_array(big, "w"))
    onnx.save(source, tmp_path / "m.onnx", save_as_external_data=True, location="m.data")
    model = qwrap.load(tmp_path / "m.onnx")
    assert os.path.getsize(tmp_path / "m.data") >= size
    tracemalloc.start()
    Fingerprint.of(model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size * 0.75  # blocks of 16 MiB, one at a time
