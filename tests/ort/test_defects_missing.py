"""What onnxruntime's tool does not do, cannot be told, or does in quadratic time."""

from __future__ import annotations

import importlib
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from both_ways import make_side
from one_operator import Case, Made, constants_of, make, make_batches, make_model, run, sqnr
from operator_cases import CASES, CONTRIB, LAYERS, ROWS
from ort_script import INCUMBENT, OWN, Reader, Setting, quantize, quiet


def quantize_module(module: str) -> Any:
    return importlib.import_module(f"{module}.quantize")


def best_time(action: Callable[[], object], rounds: int = 3) -> float:
    """Seconds of processor, the least of some rounds."""
    found = []
    for _ in range(rounds):
        start = time.process_time()
        action()
        found.append(time.process_time() - start)
    return min(found)


@pytest.mark.ort("G60", "G61")
def test_time_is_linear_in_the_number_of_nodes(tmp_path: Path) -> None:
    """The incumbent scans all nodes and initializers for every tensor."""

    def seconds(module: str, count: int) -> float:
        nodes = " ".join(f"t{i + 1} = Add(t{i}, c{i})" for i in range(count))
        weights = {f"c{i}": (16,) for i in range(count)}
        case = Case(nodes, {"t0": (-1, 16)}, {f"t{count}": 2}, weights)
        made = Made(make_model(case), make_batches(case, 1))
        source = tmp_path / f"{count}.onnx"
        onnx.save(made.model, source)
        output = tmp_path / "out.onnx"
        rounds = 2 if module == OWN else 1
        return best_time(lambda: quantize(module, source, made.batches, output, Setting()), rounds)

    # Four times the nodes: four times the time if it is linear, sixteen if quadratic.
    small, large = seconds(OWN, 100), seconds(OWN, 400)
    assert large < 8 * small
    assert seconds(INCUMBENT, 400) > large / 3


@pytest.mark.ort("G63", 141)
def test_arguments_are_checked_before_calibration(tmp_path: Path) -> None:
    """The incumbent calibrates for an hour, then says that types do not go together."""
    side = make_side(tmp_path, LAYERS["Conv"])

    class Counting(Reader):
        read = 0

        def get_next(self) -> Any:
            Counting.read += 1
            return super().get_next()

    for module, reads in ((OWN, 0), (INCUMBENT, 4)):
        tool = importlib.import_module(module)
        Counting.read = 0
        with quiet(module), pytest.raises(ValueError, match="16-bit"):
            tool.quantize_static(
                side.source,
                tmp_path / "out.onnx",
                Counting(side.made.batches),
                quant_format=tool.QuantFormat.QOperator,
                activation_type=tool.QuantType.QInt16,
            )
        assert Counting.read == reads


@pytest.mark.ort("G66", 268)
def test_an_opset_is_raised_beside_operators_of_other_domains(tmp_path: Path) -> None:
    """The incumbent uses onnx's converter, which knows no other domain."""
    case = Case(
        "g = com.microsoft.Gelu(x) y = MatMul(g, w)",
        ROWS,
        {"y": 2},
        {"w": (16, 8)},
        domains=("com.microsoft",),
    )
    side = make_side(tmp_path, case, opset=13)
    setting = Setting(activation="QUInt16")
    own = side.quantize(OWN, setting)
    assert side.quality(own) > 35
    assert {o.domain: o.version for o in own.opset_import} == {"": 21, "com.microsoft": 1}


@pytest.mark.ort("G68", 84)
def test_tensors_in_bodies_are_calibrated(tmp_path: Path) -> None:
    """The incumbent reads the nodes of the main graph alone."""
    nodes = """
        h = MatMul(x, w) total = ReduceSum<keepdims=0>(h) positive = Greater(total, zero)
        y = If(positive) <
            then_branch = then () => (float[N,8] p) { t = MatMul(h, v) p = Relu(t) },
            else_branch = otherwise () => (float[N,8] q) { q = MatMul(h, v) }
        >
    """
    weights = {"w": (16, 8), "v": (8, 8), "zero": np.array(0.0)}
    case = Case(nodes, ROWS, {"y": 2}, weights, half=False)
    onnx.save(make_model(case), tmp_path / "in.onnx")
    batches = make_batches(case, 8)
    names = {}
    for module in (OWN, INCUMBENT):
        calibrator = importlib.import_module(f"{module}.calibrate").create_calibrator(
            tmp_path / "in.onnx", augmented_model_path=str(tmp_path / "augmented.onnx")
        )
        calibrator.collect_data(Reader(batches))
        names[module] = set(calibrator.compute_data().keys())
    assert names[OWN] - names[INCUMBENT] >= {"t", "q"}


@pytest.mark.ort("G69", 342)
def test_a_quantized_model_can_be_trained(tmp_path: Path) -> None:
    """The incumbent has no ``quantize_qat`` any more."""
    assert not hasattr(importlib.import_module(INCUMBENT), "quantize_qat")
    made = make(CASES["Conv_Relu_Conv"])
    before = constants_of(made.model)["w2"]

    def train(module: torch.nn.Module) -> None:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for batch in made.batches:
            optimizer.zero_grad()
            module(torch.from_numpy(batch["x"])).square().mean().backward()
            optimizer.step()

    quantize_qat = importlib.import_module(OWN).quantize_qat
    path = tmp_path / "trained.onnx"
    quantize_qat(made.model, path, train=train, calibration_data_reader=Reader(made.batches))
    wanted, got = run(made.model, made.batches[0]), run(str(path), made.batches[0])
    assert np.square(got[0]).mean() < np.square(wanted[0]).mean()
    np.testing.assert_array_equal(constants_of(made.model)["w2"], before)


@pytest.mark.ort("G70", 353)
@pytest.mark.parametrize("name", ["LSTM", "LSTM_bidirectional", "Attention"])
def test_recurrent_and_attention_weights_are_quantized_statically(
    tmp_path: Path, name: str
) -> None:
    """The incumbent takes them for activations: one scale, the activation type."""
    side = make_side(tmp_path, CONTRIB[name])
    kind = name.split("_")[0]
    setting = Setting(arguments={"op_types_to_quantize": [kind]}, per_channel=True)
    own = side.quantize(OWN, setting)
    assert constants_of(own)["w_quantized"].dtype == np.int8
    assert side.quality(own) > 25
    theirs = constants_of(side.quantize(INCUMBENT, setting))
    assert theirs["w_quantized"].dtype == np.uint8
    assert theirs["w_scale"].shape == ()


@pytest.mark.ort("G75", 249)
def test_a_report_says_what_was_left_and_why() -> None:
    """The incumbent logs, and returns nothing."""
    made = make(CASES["a_type_not_listed"])
    report = importlib.import_module(f"{OWN}.report").Report()
    tool = importlib.import_module(OWN)
    tool.quantize_static(
        made.model, None, Reader(made.batches), nodes_to_exclude=["/y"], report=report
    )
    by_name = {node.name: node for node in report.nodes}
    assert by_name["/h"].quantized
    assert not by_name["/t"].quantized
    assert by_name["/t"].reason
    assert "Tanh" in str(report)


@pytest.mark.ort("G76", 2)
def test_a_model_comes_back_where_no_path_is_given() -> None:
    """The incumbent needs a path."""
    made = make(CASES["MatMul"])
    tool = importlib.import_module(OWN)
    kinds = {"activation_type": tool.QuantType.QUInt8}
    models = [
        tool.quantize_static(made.model, None, Reader(made.batches), **kinds),
        tool.quantize_dynamic(made.model, None),
        tool.quantize(made.model, None, tool.DynamicQuantConfig()),
    ]
    for model in models:
        assert sqnr(run(made.model, made.batches[0]), run(model, made.batches[0])) > 30
    with pytest.raises((TypeError, AttributeError)), quiet(INCUMBENT):
        importlib.import_module(INCUMBENT).quantize_dynamic(made.model, None)


@pytest.mark.ort("G77", 14, 28, 95)
def test_configurations_reach_everything(tmp_path: Path) -> None:
    """The incumbent's have no cache; bins cannot be set from quantize_static."""
    own, theirs = (
        set(inspect.signature(quantize_module(module).StaticQuantConfig).parameters)
        for module in (OWN, INCUMBENT)
    )
    assert own - theirs == {"calibration_cache_path"}
    side = make_side(tmp_path, LAYERS["Conv"])
    scales = set()
    for bins in (256, 4096):
        setting = Setting(method="Entropy", options={"CalibNumBins": bins})
        scales.add(float(constants_of(side.quantize(OWN, setting))["x_scale"]))
    assert len(scales) == 2


@pytest.mark.ort("G78", 43, 93)
def test_the_documentation_names_every_method_and_option() -> None:
    """The incumbent's docstring knows two methods of four, and not BlockSize."""
    options = importlib.import_module(f"{OWN}.entry.options").OPTIONS
    assert {"BlockSize", "DefaultTensorType", "CalibPercentile"} <= set(options)
    text = inspect.getdoc(quantize_module(INCUMBENT).quantize_static) or ""
    assert "BlockSize" not in text
    methods = importlib.import_module(f"{OWN}.calibrate").CalibrationMethod
    assert [m.name for m in methods] == ["MinMax", "Entropy", "Percentile", "Distribution"]
