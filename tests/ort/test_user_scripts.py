"""What public scripts do with onnxruntime's tool beside the entry points, run with both modules.

Each script takes a package name, so that its calls are those that a user writes.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from calibration_cases import Reader, conv_model, images
from onnx import helper, numpy_helper

from qwrap.ort.errors import QuantizationError

OWN, INCUMBENT = "qwrap.ort", "onnxruntime.quantization"
Ranges = dict[str, tuple[float, float]]


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "float.onnx"
    onnx.save(conv_model(), path)
    return str(path)


def part(package: str, name: str) -> Any:
    return importlib.import_module(f"{package}.{name}")


def numbers(ranges: Any) -> Ranges:
    ends = {name: found.range_value for name, found in ranges.items()}
    return {
        n: (float(np.ravel(low)[0]), float(np.ravel(high)[0])) for n, (low, high) in ends.items()
    }


def collected(calibrator: Any, batches: int = 4) -> Ranges:
    calibrator.augment_graph()
    calibrator.create_inference_session()
    with contextlib.redirect_stdout(io.StringIO()):
        calibrator.collect_data(Reader(images(batches)))
        return numbers(calibrator.compute_data())


def assert_alike(script: Callable[[str], Ranges]) -> Ranges:
    """Run the script with both; torch and onnxruntime sum in other orders, hence the slack."""
    ours, theirs = script(OWN), script(INCUMBENT)
    assert ours.keys() == theirs.keys()
    for name, ends in theirs.items():
        assert ours[name] == pytest.approx(ends, rel=1e-5, abs=1e-6), name
    return ours


# --- calibrators of one's own --------------------------------------------------------------------


@pytest.mark.ort(83, 91)
def test_a_session_of_ones_own_on_the_augmented_file(tmp_path: Path, model: str) -> None:
    def script(package: str) -> Ranges:
        class Own(part(package, "calibrate").MinMaxCalibrater):
            def create_inference_session(self) -> None:
                self.infer_session = onnxruntime.InferenceSession(
                    self.augmented_model_path, providers=self.execution_providers
                )

            def select_tensors_to_calibrate(self, model: Any) -> Any:
                names, values = super().select_tensors_to_calibrate(model)
                return names - {"g"}, values

        return collected(Own(model, augmented_model_path=str(tmp_path / "augmented.onnx")))

    assert assert_alike(script).keys() == {"x", "c", "r", "f", "y"}


@pytest.mark.ort(83, 90, 91)
@pytest.mark.parametrize("opset", [13, 18])
def test_a_session_of_ones_own_per_channel(tmp_path: Path, opset: int) -> None:
    made = conv_model()
    made.opset_import[0].version = opset
    path = tmp_path / "float.onnx"
    onnx.save(made, path)
    session = onnxruntime.InferenceSession

    def script(package: str) -> Ranges:
        class Own(part(package, "calibrate").MinMaxCalibrater):
            def create_inference_session(self) -> None:
                self.infer_session = session(self.augmented_model_path)

        augmented = str(tmp_path / "augmented.onnx")
        calibrator = Own(path, ["Conv"], augmented_model_path=augmented, per_channel=True)
        collected(calibrator)
        ranges = calibrator.compute_data()
        return {
            f"{name}{i}": (float(low), float(high))
            for name, found in ranges.items()
            for i, (low, high) in enumerate(zip(found.lowest, found.highest, strict=True))
        }

    assert len(assert_alike(script)) == 3 + 4


@pytest.mark.ort(83, 91)
def test_a_graph_augmented_by_a_subclass(tmp_path: Path, model: str) -> None:
    def script(package: str) -> Ranges:
        class Halved(part(package, "calibrate").MinMaxCalibrater):
            """Watches halves of tensors, which only its own graph has."""

            def augment_graph(self) -> None:
                made = copy.deepcopy(self.model)
                half = numpy_helper.from_array(np.float32(0.5), "half")
                made.graph.initializer.append(half)
                for name in ("r", "c"):
                    node = helper.make_node("Mul", [name, "half"], [f"{name}_halved"])
                    made.graph.node.append(node)
                    for word in ("ReduceMin", "ReduceMax"):
                        output = f"{name}_{word}"
                        node = helper.make_node(word, [f"{name}_halved"], [output], keepdims=0)
                        made.graph.node.append(node)
                        value = helper.make_tensor_value_info(output, 1, [])
                        made.graph.output.append(value)
                onnx.save(made, self.augmented_model_path)

        augmented = str(tmp_path / "augmented.onnx")
        return collected(Halved(model, augmented_model_path=augmented, max_intermediate_outputs=9))

    found = assert_alike(script)
    assert found["r"][1] == found["c"][1]
    assert found.keys() == {"r", "c"}


@pytest.mark.ort(83, 99)
def test_a_collector_of_ones_own(tmp_path: Path, model: str) -> None:
    def script(package: str) -> Ranges:
        calibrate = part(package, "calibrate")

        class Halves(calibrate.HistogramCollector):
            def __init__(self) -> None:
                super().__init__("halves", True, 64, 64, 99.9, "same")

            def collect(self, name_to_arr: Any) -> None:
                for name, arrays in name_to_arr.items():
                    largest = max(np.abs(array).max() for array in arrays)
                    self.histogram_dict[name] = largest / np.float32(2)

            def compute_collection_result(self) -> Any:
                counts, edges = np.zeros(64, int), np.linspace(-1, 1, 65)
                return {n: (-v, v, counts, edges) for n, v in self.histogram_dict.items()}

        class Own(calibrate.HistogramCalibrater):
            def __init__(self) -> None:
                augmented = str(tmp_path / "augmented.onnx")
                super().__init__(model, None, augmented, method="halves", symmetric=True)
                self.collector = Halves()

            def compute_data(self) -> Any:
                result = self.collector.compute_collection_result()
                return calibrate.TensorsData(calibrate.CalibrationMethod.Entropy, result)

        return collected(Own())

    assert assert_alike(script).keys() == {"x", "c", "r", "g", "f", "y"}


def batch_by_batch(package: str) -> Callable[..., None]:
    """The loop that scripts put in place of collect_data, to save memory."""

    def collect_data(self: Any, data_reader: Any) -> None:
        names = [output.name for output in self.infer_session.get_outputs()]
        self.collector = self.collector or part(package, "calibrate").HistogramCollector(
            method=self.method,
            symmetric=self.symmetric,
            num_bins=self.num_bins,
            num_quantized_bins=self.num_quantized_bins,
            percentile=self.percentile,
            scenario=self.scenario,
        )
        while batch := data_reader.get_next():
            values = self.infer_session.run(None, batch)
            wanted = self.tensors_to_calibrate
            found = {n: [v] for n, v in zip(names, values, strict=True) if n in wanted}
            self.collector.collect(found)

    return collect_data


def graph_form(path: Path) -> list[Any]:
    nodes = onnx.load(path).graph.node
    return sorted((n.op_type, n.name, tuple(n.input), tuple(n.output)) for n in nodes)


@pytest.mark.ort(83, 94, 96)
@pytest.mark.parametrize("method", ["Percentile", "Entropy"])
def test_collect_data_that_is_put_in_place_reaches_quantize_static(
    tmp_path: Path, model: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = []
    for package in (OWN, INCUMBENT):
        module = importlib.import_module(package)
        base = part(package, "calibrate").HistogramCalibrater
        monkeypatch.setattr(base, "collect_data", batch_by_batch(package))
        output = tmp_path / f"{package}.onnx"
        with contextlib.redirect_stdout(io.StringIO()):
            module.quantize_static(
                model,
                output,
                Reader(images(3)),
                calibrate_method=module.CalibrationMethod[method],
            )
        forms.append(graph_form(output))
    assert forms[0] == forms[1]


@pytest.mark.ort(82, 91)
@pytest.mark.parametrize("package", [OWN, INCUMBENT])
def test_a_class_put_in_place_reaches_quantize_static(
    tmp_path: Path, model: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, calibrate = importlib.import_module(package), part(package, "calibrate")
    collected_by = []

    class Own(calibrate.MinMaxCalibrater):
        def collect_data(self, data_reader: Any) -> None:
            collected_by.append(type(self))
            super().collect_data(data_reader)

    monkeypatch.setattr(calibrate, "MinMaxCalibrater", Own)
    module.quantize_static(model, tmp_path / "out.onnx", Reader(images(2)))
    assert collected_by == [Own]


@pytest.mark.ort(83)
@pytest.mark.parametrize("method", ["MinMax", "Percentile"])
def test_the_augmented_file_runs_and_has_the_outputs_of_the_incumbent(
    tmp_path: Path, model: str, method: str
) -> None:
    outputs = []
    for package in (OWN, INCUMBENT):
        path = str(tmp_path / f"{package}.onnx")
        kind = getattr(part(package, "calibrate"), f"{method}Calibrater")
        calibrator = kind(model, augmented_model_path=path)
        calibrator.augment_graph()
        calibrator.create_inference_session()
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert session.run(None, images(1)[0])
        names = {output.name for output in session.get_outputs()}
        assert {output.name for output in calibrator.infer_session.get_outputs()} == names
        outputs.append(names)
    assert outputs[0] == outputs[1]


# --- readers -------------------------------------------------------------------------------------


class Raising:
    """Ends as ``next`` without a default does."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches: Iterator[Any] = iter(batches)

    def get_next(self) -> Any:
        return next(self._batches)


@pytest.mark.ort(81)
def test_a_reader_may_end_with_stop_iteration(tmp_path: Path, model: str) -> None:
    """The incumbent lets the exception through, with no message."""
    ours, theirs = importlib.import_module(OWN), importlib.import_module(INCUMBENT)
    ours.quantize_static(model, tmp_path / "raising.onnx", Raising(images(3)))
    ours.quantize_static(model, tmp_path / "plain.onnx", Reader(images(3)))
    written = [(tmp_path / f"{name}.onnx").read_bytes() for name in ("raising", "plain")]
    assert written[0] == written[1]
    with pytest.raises(StopIteration):
        theirs.quantize_static(model, tmp_path / "theirs.onnx", Raising(images(3)))


# --- what older versions took --------------------------------------------------------------------


@pytest.mark.ort(23)
@pytest.mark.parametrize("package", [OWN, INCUMBENT])
@pytest.mark.parametrize("name", ["optimize_model", "activation_type", "input_qType"])
def test_keywords_of_older_versions_are_refused_as_such(
    model: str, package: str, name: str
) -> None:
    quantize_dynamic = importlib.import_module(package).quantize_dynamic
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        quantize_dynamic(model, "out.onnx", **{name: True})


@pytest.mark.ort(3, 23)
@pytest.mark.parametrize("package", [OWN, INCUMBENT])
def test_a_missing_output_folder_is_a_missing_file(
    tmp_path: Path, model: str, package: str
) -> None:
    quantize_dynamic = importlib.import_module(package).quantize_dynamic
    with pytest.raises(FileNotFoundError):
        quantize_dynamic(model, tmp_path / "missing" / "out.onnx")


# --- weight-only ---------------------------------------------------------------------------------


@pytest.mark.ort(279)
@pytest.mark.parametrize("package", [OWN, INCUMBENT])
def test_the_logger_of_the_weight_only_module_can_be_set(package: str) -> None:
    module = part(package, "matmul_nbits_quantizer")
    assert module.logger is logging.getLogger(f"{package}.matmul_nbits_quantizer")


@pytest.mark.ort(279)
def test_a_configuration_without_an_algorithm_says_so(model: str) -> None:
    """The incumbent fails with an AttributeError inside."""
    module = part(OWN, "matmul_nbits_quantizer")
    bare = module.WeightOnlyQuantConfig("DEFAULT", module.QuantFormat.QOperator)
    with pytest.raises(QuantizationError, match="says nothing of an algorithm"):
        module.MatMulNBitsQuantizer(onnx.load(model), algo_config=bare).process()
