"""The entry points: what they take, leave alone, return and write."""

import inspect
import json
import logging
import multiprocessing
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxruntime.quantization as incumbent
import pytest
from onnx import TensorProto, helper, numpy_helper

import qwrap.ort as ort
from qwrap.ort.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    RTNWeightOnlyQuantConfig,
)

BATCHES = [
    {"x": np.random.default_rng(seed).normal(size=(2, 4, 8, 8)).astype(np.float32)}
    for seed in range(4)
]


class Reader(ort.CalibrationDataReader):
    """Batches that may be read in parts."""

    def __init__(self, batches: list[dict[str, Any]] = BATCHES) -> None:
        self.batches = batches
        self.set_range(0, len(batches))

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.rest = iter(self.batches[start_index:end_index])

    def get_next(self) -> Any:
        return next(self.rest, None)


def network(opset: int = 17) -> onnx.ModelProto:
    """Return x -> Conv "c1" -> Relu "r" -> Conv "c2" -> pool -> Gemm "head" -> Tanh "t" -> y."""
    rng = np.random.default_rng(7)
    shapes = {"w1": (8, 4, 3, 3), "b1": (8,), "w2": (8, 8, 3, 3), "wh": (5, 8), "bh": (5,)}
    weights = [
        numpy_helper.from_array((rng.normal(size=s) * 0.2).astype(np.float32), n)
        for n, s in shapes.items()
    ]
    pads = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], "c1", **pads),
        helper.make_node("Relu", ["a"], ["r"], "r"),
        helper.make_node("Conv", ["r", "w2"], ["c"], "c2", **pads),
        helper.make_node("GlobalAveragePool", ["c"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "wh", "bh"], ["h"], "head", transB=1),
        helper.make_node("Tanh", ["h"], ["y"], "t"),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def forms(model: onnx.ModelProto) -> list[tuple[str, str, tuple[str, ...], tuple[str, ...]]]:
    return [(n.op_type, n.name, tuple(n.input), tuple(n.output)) for n in model.graph.node]


def run(model: onnx.ModelProto | Path, batch: dict[str, Any] = BATCHES[0]) -> np.ndarray:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, batch)
    return np.asarray(result)


def static(model: Any = None, path: Any = None, **arguments: Any) -> Any:
    arguments.setdefault("calibration_data_reader", Reader())
    return ort.quantize_static(network() if model is None else model, path, **arguments)


@pytest.mark.ort(1, 23, 27, 28, 29, 30)
@pytest.mark.parametrize(
    "name",
    [
        "quantize_static",
        "quantize_dynamic",
        "quantize",
        "get_qdq_config",
        "QuantConfig",
        "StaticQuantConfig",
        "DynamicQuantConfig",
        "check_static_quant_arguments",
    ],
)
def test_arguments_have_the_names_order_and_defaults_of_the_incumbents(name: str) -> None:
    ours, theirs = (
        list(inspect.signature(getattr(import_module(module), name)).parameters.values())
        for module in ("qwrap.ort.quantize", "onnxruntime.quantization.quantize")
    )
    for mine, other in zip(ours, theirs, strict=False):
        assert mine.name == other.name
        if mine.name != "model_output":  # None returns the model
            assert str(mine.default) == str(other.default)
    assert all(p.default is not inspect.Parameter.empty for p in ours[len(theirs) :])


@pytest.mark.ort(2, 3, "G76")
def test_a_path_a_string_and_a_model_give_one_graph_and_stay_as_they_are(tmp_path: Path) -> None:
    model = network()
    before = model.SerializeToString()
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir()
    onnx.save(model, path)
    os.chmod(path.parent, 0o555)  # nothing is written beside the input
    results = [static(source) for source in (model, path, str(path))]
    assert static(path, tmp_path / "out.onnx") is None
    assert static(path, str(tmp_path / "out2.onnx")) is None
    os.chmod(path.parent, 0o755)
    assert model.SerializeToString() == before
    assert os.listdir(path.parent) == ["model.onnx"]
    results += [onnx.load(tmp_path / name) for name in ("out.onnx", "out2.onnx")]
    assert sorted(os.listdir(tmp_path)) == ["in", "out.onnx", "out2.onnx"]
    for result in results[1:]:
        assert forms(result) == forms(results[0])
        assert list(result.graph.initializer) == list(results[0].graph.initializer)


@pytest.mark.ort("G65", 276)
def test_processes_that_quantize_one_file_at_once_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(network(), path)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        outputs = [tmp_path / f"{index}.onnx" for index in range(4)]
        pool.starmap(ort.quantize_dynamic, [(path, output) for output in outputs])
    assert len({output.read_bytes() for output in outputs}) == 1
    assert len(os.listdir(tmp_path)) == 5


@pytest.mark.ort(4, 5, 6)
def test_types_that_are_not_named_are_all_that_are_supported() -> None:
    everything = sorted(
        {*ort.registry.QLinearOpsRegistry, *ort.registry.QDQRegistry}  # type: ignore[attr-defined]
    )
    assert forms(static()) == forms(static(op_types_to_quantize=everything))
    assert forms(static(op_types_to_quantize=[])) == forms(static())
    assert "Tanh" not in everything
    named = static(op_types_to_quantize=["Tanh"])
    types = [node.op_type for node in named.graph.node]
    assert types[-5:] == [
        "QuantizeLinear",
        "DequantizeLinear",
        "Tanh",
        "QuantizeLinear",
        "DequantizeLinear",
    ]
    assert types[:-5] == [node.op_type for node in network().graph.node][:-1]
    operators = static(
        op_types_to_quantize=["Tanh"],
        quant_format=ort.QuantFormat.QOperator,
        activation_type=ort.QuantType.QUInt8,
    )
    assert forms(operators) == forms(network())


@pytest.mark.ort(7, 8)
def test_only_nodes_that_are_named_and_not_excluded_are_quantized() -> None:
    chosen = static(nodes_to_quantize=["c1"])
    names = {t.name for t in chosen.graph.initializer}
    assert "w1_quantized" in names
    assert {"w2", "wh"} <= names
    rest = {t.name for t in static(nodes_to_exclude=["c1"]).graph.initializer}
    assert {"w2_quantized", "wh_quantized", "w1"} <= rest


@pytest.mark.ort(10, 11)
def test_weights_have_a_scale_per_channel_and_seven_bits_where_asked() -> None:
    model = static(per_channel=True, reduce_range=True)
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert arrays["w1_scale"].shape == (8,)
    assert arrays["wh_scale"].shape == (5,)
    assert np.abs(arrays["w1_quantized"].astype(int)).max() == 64
    plain = {t.name: numpy_helper.to_array(t) for t in static().graph.initializer}
    assert plain["w1_scale"].shape == ()


@pytest.mark.ort(12)
def test_external_data_lies_in_one_file_beside_the_output(tmp_path: Path) -> None:
    batch = {"x": np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)}
    for name, external in (("q.onnx", True), ("plain.onnx", False)):
        static(
            matmul(),
            tmp_path / name,
            calibration_data_reader=Reader([batch]),
            use_external_data_format=external,
        )
    assert sorted(os.listdir(tmp_path)) == ["plain.onnx", "q.onnx", "q.onnx.data"]
    assert np.array_equal(run(tmp_path / "q.onnx", batch), run(tmp_path / "plain.onnx", batch))


@pytest.mark.ort(13)
def test_a_provider_that_does_not_exist_is_refused() -> None:
    static(calibration_providers=["CPUExecutionProvider"])
    with pytest.raises(ValueError, match="NoSuchProvider"):
        static(calibration_providers=["NoSuchProvider"])


@pytest.mark.ort(14, 15, 16)
def test_a_cache_saves_the_calibration(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = tmp_path / "ranges.json"
    first = static(calibration_cache_path=cache)
    second = static(calibration_data_reader=None, calibration_cache_path=str(cache))
    assert first.SerializeToString() == second.SerializeToString()
    with pytest.raises(ValueError, match=r"MinMax.*Entropy"):
        static(calibration_cache_path=cache, calibrate_method=ort.CalibrationMethod.Entropy)
    with pytest.raises(ValueError, match="calibration_cache_path is not a file"):
        static(calibration_cache_path=tmp_path)
    with pytest.raises(ValueError, match="Either calibration_data_reader or an existing"):
        static(calibration_data_reader=None)
    content = json.loads(cache.read_text())
    cache.write_text(json.dumps({**content, "smooth_quant": True}))
    with caplog.at_level(logging.WARNING):
        static(calibration_cache_path=cache)
    assert "Recomputing ranges and overwriting cache" in caplog.text
    assert json.loads(cache.read_text()) == content


@pytest.mark.ort("G26")
def test_a_cache_of_another_model_is_refused(tmp_path: Path) -> None:
    """The incumbent takes it where the tensors have equal names."""
    static(calibration_cache_path=tmp_path / "ranges.json")
    other = network()
    other.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.ones((8, 4, 3, 3), np.float32), "w1")
    )
    with pytest.raises(ValueError, match="model"):
        static(other, calibration_cache_path=tmp_path / "ranges.json")
    incumbent.quantize_static(
        network(), tmp_path / "a.onnx", Reader(), calibration_cache_path=tmp_path / "theirs.json"
    )
    incumbent.quantize_static(
        other, tmp_path / "b.onnx", None, calibration_cache_path=tmp_path / "theirs.json"
    )
    static(calibration_data_reader=None, calibration_cache_path=tmp_path / "theirs.json")


@pytest.mark.ort(17, 21, "G67")
def test_warnings_are_logged_and_nothing_is_printed(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        static(quant_format=ort.QuantFormat.QOperator)
    assert "pre-processing before quantization" in caplog.text
    assert "Please use QuantFormat.QDQ for activation type QInt8" in caplog.text
    caplog.clear()
    model = network()
    helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    with caplog.at_level(logging.WARNING):
        static(model)
    assert not caplog.text
    assert capsys.readouterr() == ("", "")


@pytest.mark.ort(26, 27, 28, 29, 299, "G77")
def test_quantize_goes_by_the_configuration(tmp_path: Path) -> None:
    config = ort.StaticQuantConfig(
        Reader(), per_channel=True, calibration_cache_path=tmp_path / "ranges.json"
    )
    assert (config.op_types_to_quantize, config.nodes_to_exclude) == ([], [])
    assert forms(ort.quantize(network(), None, config)) == forms(static(per_channel=True))
    assert (tmp_path / "ranges.json").exists()
    dynamic = ort.quantize(network(), None, ort.DynamicQuantConfig(op_types_to_quantize=["Gemm"]))
    assert forms(dynamic) == forms(
        ort.quantize_dynamic(network(), None, op_types_to_quantize=["Gemm"])
    )
    for settings in (DefaultWeightOnlyQuantConfig(block_size=16), RTNWeightOnlyQuantConfig()):
        path = tmp_path / f"{settings.algorithm}.onnx"
        assert ort.quantize(matmul(), path, settings) is None
        assert "MatMulNBits" in {node.op_type for node in onnx.load(path).graph.node}
        assert path.with_name(path.name + ".data").exists()
    with pytest.raises(TypeError, match="StaticQuantConfig"):
        ort.quantize(network(), None, object())  # type: ignore[arg-type]


def matmul() -> onnx.ModelProto:
    weight = np.random.default_rng(3).normal(size=(64, 32)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "m")],
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


@pytest.mark.ort(30, 31, 32, 33, 34, 35, 36)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"nodes_to_exclude": ["c1"]},
        {"nodes_to_exclude": lambda _, node: node.op_type == "Tanh"},
        {"op_types_to_quantize": ["Conv", "Gemm"]},
        {
            "calibrate_args": {
                "symmetric": True,
                "moving_average": True,
                "averaging_constant": 0.02,
                "max_intermediate_outputs": 2,
                "percentile": 99.9,
            }
        },
        {"min_real_range": 1e-4, "keep_removable_activations": True, "activation_symmetric": True},
        {"weight_type": "QInt4"},
        {"weight_type": "QInt4", "activation_type": "QUInt16"},
        {"tensor_quant_overrides": {"a": [{"symmetric": True}]}, "weight_symmetric": True},
        {"extra_options": {"ForceQuantizeNoInputCheck": False}, "per_channel": True},
    ],
)
def test_a_configuration_for_whole_models_is_the_incumbents(arguments: dict[str, Any]) -> None:
    both = []
    for module in (ort, incumbent):
        typed = {
            key: module.QuantType[value] if key.endswith("_type") else value
            for key, value in arguments.items()
        }
        config = module.get_qdq_config(network(), Reader(), **typed)
        values = dict(vars(config))
        for name in ("calibration_data_reader", "calibration_cache_path"):
            values.pop(name, None)
        values["op_types_to_quantize"] = sorted(values["op_types_to_quantize"])
        both.append({key: str(value) for key, value in values.items()})
    assert both[0] == both[1]


@pytest.mark.ort(36)
def test_external_data_of_the_input_is_kept_external(tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    assert ort.get_qdq_config(tmp_path / "m.onnx", Reader()).use_external_data_format
    assert not ort.get_qdq_config(network(), Reader()).use_external_data_format


@pytest.mark.ort(37, 38)
def test_the_output_says_who_made_it() -> None:
    model = static()
    assert (model.producer_name, model.producer_version) == ("onnx.quantize", "0.1.0")
    props = {prop.key: prop.value for prop in model.metadata_props}
    assert props["onnx.infer"] == "onnxruntime.quant"


@pytest.mark.parametrize("opset", [10, 11, 12, 13])
def test_scales_per_channel_need_opset_13(opset: int) -> None:
    """The incumbent writes an attribute that opsets before do not have; the file does not load."""
    model = static(network(opset), per_channel=True)
    assert model.opset_import[0].version == 13
    assert run(model).shape == (2, 5)
    assert static(network(opset)).opset_import[0].version == opset


@pytest.mark.ort("G75")
def test_the_report_says_what_became_of_every_node() -> None:
    report = ort.Report()
    static(nodes_to_exclude=["c1"], report=report)
    told = {node.name: node for node in report.nodes}
    assert list(told) == [node.name for node in network().graph.node]
    assert told["c2"].quantized
    assert not told["c1"].quantized
    assert "exclude" in told["c1"].reason
    assert not told["t"].quantized
    assert "op_types_to_quantize" in told["t"].reason
    assert "nodes quantized" in str(report)


@pytest.mark.ort(75, 349)
def test_strides_are_read_one_by_one_and_must_divide_the_data() -> None:
    whole = static()
    parts = static(extra_options={"CalibStridedMinMax": 2})
    assert whole.SerializeToString() == parts.SerializeToString()
    with pytest.raises(
        ValueError, match=r"Total data size \(4\) is not divisible by stride size \(3\)."
    ):
        static(extra_options={"CalibStridedMinMax": 3})


@pytest.mark.ort(342, "G69")
def test_training_brings_a_quantized_model_closer_to_the_float_one() -> None:
    """The incumbent has no quantize_qat any more, and trains nothing."""
    assert not hasattr(incumbent, "quantize_qat")
    rng = np.random.default_rng(0)
    batches = [{"x": rng.normal(size=(8, 4, 8, 8)).astype(np.float32)} for _ in range(10)]
    options = {"weight_type": ort.QuantType.QInt4, "activation_type": ort.QuantType.QUInt8}
    plain = static(calibration_data_reader=Reader(batches), **options)
    trained = ort.quantize_qat(
        network(), calibration_data_reader=Reader(batches), steps=150, **options
    )
    assert trained is not None
    assert forms(trained) == forms(plain)
    new = {"x": rng.normal(size=(64, 4, 8, 8)).astype(np.float32)}
    exact = run(network(), new)
    error = [float(np.square(run(model, new) - exact).mean()) for model in (plain, trained)]
    assert error[1] < 0.8 * error[0]


@pytest.mark.ort(342)
def test_ones_own_training_loop_gets_the_module(tmp_path: Path) -> None:
    seen = []

    def train(module: Any) -> None:
        import torch

        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        for batch in BATCHES:
            optimizer.zero_grad()
            module(torch.from_numpy(batch["x"])).square().mean().backward()
            optimizer.step()
        seen.append(module)

    quantized = static(activation_type=ort.QuantType.QUInt8)
    assert ort.quantize_qat(quantized, tmp_path / "q.onnx", train=train) is None
    result = onnx.load(tmp_path / "q.onnx")
    assert len(seen) == 1
    assert forms(result) == forms(quantized)
    assert result.SerializeToString() != quantized.SerializeToString()
    with pytest.raises(ValueError, match="nothing to train with"):
        ort.quantize_qat(network())
