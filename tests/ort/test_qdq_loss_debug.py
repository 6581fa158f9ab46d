"""The debugging tools against onnxruntime's, on files that onnxruntime's quantizer made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime.quantization as incumbent_quantization
import pytest
from onnx import TensorProto, helper, numpy_helper, reference
from onnxruntime.quantization import qdq_loss_debug as incumbent

from qwrap.ort import qdq_loss_debug as debug
from qwrap.ort.errors import UnknownNameError


def random(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


class Reader:
    """A reader as users write them: no base class, no __iter__."""

    def __init__(self, count: int = 3, batch: int = 2) -> None:
        self.batches = iter([{"x": random(batch + i, 3, 8, 8, seed=i)} for i in range(count)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


class IncumbentReader(incumbent_quantization.CalibrationDataReader):
    def __init__(self) -> None:
        self.batches = iter([{"x": random(2, 3, 8, 8, seed=i)} for i in range(3)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def float_model() -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 21]> g (float[N,3,8,8] x) => (float[N,6] y) {
            c = Conv<pads=[1,1,1,1]>(x, w, b)
            r = Relu(c)
            m = ReduceMean<keepdims=0>(r, axes)
            y = MatMul(m, v)
        }"""
    )
    values = {"w": random(5, 3, 3, 3), "b": random(5), "v": random(5, 6)}
    values["axes"] = np.array([2, 3])
    for name, value in values.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    for index, node in enumerate(model.graph.node):
        node.name = f"node_{index}"
    return model


@pytest.fixture(params=["QInt8", "QUInt8", "QInt4", "QUInt4", "QInt16", "per channel", "blocked"])
def quantized(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path]:
    kind = request.param
    model = float_model()
    if kind == "blocked":  # which the incumbent can only do to matrices
        del model.graph.node[:3]
        model.graph.node[0].input[0] = "x"
        model.graph.input[0].CopyFrom(
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 5])
        )
        model.graph.output[0].ClearField("type")
        model.graph.output[0].type.tensor_type.elem_type = 1
    onnx.save(model, tmp_path / "float.onnx")
    reader = IncumbentReader()
    if kind == "blocked":
        reader.batches = iter([{"x": random(2, 3, 8, 5)}])
    incumbent_quantization.quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "qdq.onnx",
        reader,
        per_channel=kind == "per channel",
        activation_type=incumbent_quantization.QuantType.QUInt8,
        weight_type=incumbent_quantization.QuantType[kind if kind[0] == "Q" else "QInt8"],
        extra_options={"BlockSize": 2} if kind == "blocked" else {},
    )
    return kind, tmp_path / "float.onnx", tmp_path / "qdq.onnx"


def constants_dequantized(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """By the reference implementation of the operator."""
    model = onnx.load(path)
    weights = {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in weights:
            own = [t for t in model.graph.initializer if t.name in node.input]
            result = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
            graph = helper.make_graph([node], "g", [], [result], own)
            one = helper.make_model(graph, opset_imports=model.opset_import)
            yield node.input[0], reference.ReferenceEvaluator(one).run(None, {})[0]


@pytest.mark.ort(314, "G12")
def test_weights_are_dequantized_as_the_operator_does(quantized: tuple[str, Path, Path]) -> None:
    """onnxruntime's subtracts unsigned codes from each other: -9.8 dB for a good weight."""
    kind, float_path, path = quantized
    matched = debug.create_weight_matching(str(float_path), str(path))
    want = {name.removesuffix("_quantized"): v for name, v in constants_dequantized(path)}
    assert matched.keys() == want.keys() != set()
    for name, match in matched.items():
        np.testing.assert_allclose(match["dequantized"], want[name], rtol=1e-6, atol=0)
        assert match["dequantized"].shape == match["float"].shape
    errors = debug.compute_weight_error(matched)
    assert min(errors.values()) > (12 if "4" in kind else 35)
    if kind in ("QInt8", "per channel", "QInt16"):
        theirs = incumbent.create_weight_matching(str(float_path), str(path))
        for name, match in theirs.items():
            np.testing.assert_allclose(
                matched[name]["dequantized"], match["dequantized"], rtol=1e-6, atol=0
            )
            assert np.array_equal(matched[name]["float"], match["float"])
    if kind == "QUInt8":
        theirs = incumbent.compute_weight_error(
            incumbent.create_weight_matching(str(float_path), str(path))
        )
        assert theirs["w"] < 0 < 35 < errors["w"]


@pytest.mark.ort(314)
def test_weights_in_bodies_and_constant_nodes_are_matched() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (bool c) => (float[2] y) {
        y = If(c) <
            then_branch = t () => (float[2] p) <int8[2] w_quantized = {1, 2}, float s = {0.5}> {
                p = DequantizeLinear(w_quantized, s) },
            else_branch = e () => (float[2] q) {
                v_quantized = Constant<value = uint8[2] {128, 130}>()
                t = Constant<value = float {2.0}>()
                z = Constant<value = uint8 {128}>()
                q = DequantizeLinear(v_quantized, t, z) }
        > }"""
    source = text.replace("_quantized", "").replace("DequantizeLinear(w, s)", "Identity(w)")
    source = source.replace("DequantizeLinear(v, t, z)", "Identity(v)")
    source = source.replace("int8[2] w = {1, 2}", "float[2] w = {0.6, 1.1}")
    source = source.replace("uint8[2] {128, 130}", "float[2] {0.1, 4.0}")
    matched = debug.create_weight_matching(
        onnx.parser.parse_model(source), onnx.parser.parse_model(text)
    )
    assert {name: list(m["dequantized"]) for name, m in matched.items()} == {
        "w": [0.5, 1.0],
        "v": [0.0, 4.0],
    }


@pytest.mark.ort(311)
@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("op_types", [None, [], ["Conv"]])
def test_every_float_tensor_becomes_an_output(
    tmp_path: Path, op_types: list[str] | None, external: bool
) -> None:
    onnx.save(float_model(), tmp_path / "m.onnx")
    paths = [tmp_path / "ours.onnx", tmp_path / "theirs.onnx"]
    for module, path in zip((debug, incumbent), paths, strict=True):
        module.modify_model_output_intermediate_tensors(
            str(tmp_path / "m.onnx"), str(path), op_types, save_as_external_data=external
        )
    ours, theirs = (onnx.load(path) for path in paths)
    described = [
        {(o.name, o.type.tensor_type.elem_type, len(o.type.tensor_type.shape.dim))
         for o in model.graph.output} for model in (ours, theirs)
    ]  # fmt: skip
    assert described[0] == described[1]
    assert len(described[0]) == 3 if op_types else 6
    assert {n.name for n in ours.graph.node} == {n.name for n in theirs.graph.node}
    assert (tmp_path / "ours.onnx.data").exists() is False  # nothing here has 1024 bytes


@pytest.mark.ort(311, "G24")
def test_a_model_is_augmented_in_memory_and_unknown_types_are_refused() -> None:
    model = float_model()
    before = model.SerializeToString()
    made = debug.modify_model_output_intermediate_tensors(model, None)
    assert model.SerializeToString() == before
    assert len(made.graph.output) == 6
    with pytest.raises(UnknownNameError, match="'Convv' does not exist; 'Conv'"):
        debug.modify_model_output_intermediate_tensors(model, None, ["Convv"])


@pytest.mark.ort(312)
def test_activations_of_batches_of_any_size_are_collected() -> None:
    made = debug.modify_model_output_intermediate_tensors(float_model(), None)
    found = debug.collect_activations(made, Reader())
    assert set(found) == {"x", "c", "r", "m", "y"}
    assert [len(v) for v in found.values()] == [3] * 5
    assert [v.size for v in found["x"]] == [n * 3 * 64 for n in (2, 3, 4)]
    assert np.array_equal(found["r"][1], np.maximum(found["c"][1], 0))
    with pytest.raises(RuntimeError, match="No data is collected"):
        debug.collect_activations(made, Reader(count=0))


@pytest.mark.ort(312)
def test_activations_come_batch_by_batch() -> None:
    made = debug.modify_model_output_intermediate_tensors(float_model(), None)
    reader = Reader(count=10)
    stream = debug.iterate_activations(made, reader)
    assert set(next(stream)) == {"x", "c", "r", "m", "y"}
    assert len(list(reader.batches)) == 9  # not read ahead


@pytest.mark.ort(313, 316)
def test_activations_are_matched_as_onnxruntime_matches_them(
    quantized: tuple[str, Path, Path], tmp_path: Path
) -> None:
    kind, float_path, path = quantized
    if kind == "blocked":
        pytest.skip("another input shape")
    found = []
    for source in (path, float_path):
        debug.modify_model_output_intermediate_tensors(source, tmp_path / "a.onnx")
        found.append(debug.collect_activations(str(tmp_path / "a.onnx"), Reader(batch=3)))
    ours = debug.create_activation_matching(*found)
    theirs = incumbent.create_activation_matching(*found)
    assert ours.keys() == theirs.keys()
    assert "x" in ours
    assert "y" in ours  # the graph's output, named on the other side of its pair
    for name, match in theirs.items():
        assert match.keys() == ours[name].keys()
        assert all(match[key] is ours[name][key] for key in match)
    mine, other = debug.compute_activation_error(ours), incumbent.compute_activation_error(theirs)
    for name, errors in other.items():
        for key, value in errors.items():
            assert mine[name][key] == pytest.approx(value, abs=1e-3)  # theirs sums in float32


@pytest.mark.ort(313)
def test_dedicated_pairs_are_matched() -> None:
    a, b, c = ([random(4, seed=i)] for i in range(3))
    found = {"t": a, "t_DequantizeLinear_Output_1": b, "t_DequantizeLinear_Output_2": c}
    assert debug.create_activation_matching(found) == {"t": {"pre_qdq": a, "post_qdq": b}}


@pytest.mark.ort(316, "G50")
def test_without_the_float_model_there_is_the_pairs_own_error() -> None:
    """onnxruntime's raises KeyError: 'float'."""
    x = [random(4)]
    match = {"t": {"pre_qdq": x, "post_qdq": [x[0] * 0.9]}}
    with pytest.raises(KeyError, match="float"):
        incumbent.compute_activation_error(match)
    errors = debug.compute_activation_error(match)
    assert errors == {"t": {"qdq_err": pytest.approx(20.0, abs=1e-4)}}
    assert debug.compute_activation_error(match, lambda *_: 7.0) == {"t": {"qdq_err": 7.0}}


@pytest.mark.ort(315)
def test_the_ratio_is_that_of_norms_in_decibels() -> None:
    x, y = random(40, 3), random(40, 3, seed=9)
    ratio = debug.compute_signal_to_quantization_noice_ratio
    want = 20 * math.log10(np.linalg.norm(x) / np.linalg.norm(x - y))
    assert ratio(x, y) == pytest.approx(want, abs=1e-5)
    assert ratio([x, y], [y, x]) == pytest.approx(
        incumbent.compute_signal_to_quantization_noice_ratio([x, y], [y, x]), abs=1e-4
    )
    # lengths may differ between batches, which numpy.concatenate of the incumbent refuses
    assert ratio([x, x[:3, :2]], [y, x[:3, :2]]) > ratio([x], [y])
    assert ratio(x, x) > 300
    assert ratio(np.zeros(3), np.zeros(3)) == 0
    with pytest.raises(RuntimeError, match="Unequal number of tensors to compare!"):
        ratio([x], [x, y])
    with pytest.raises(RuntimeError, match=r"shapes \(40, 3\) and \(3,\)"):
        ratio([x], [y[0]])
