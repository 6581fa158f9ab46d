"""Calibrators: what they watch, run and return, beside onnxruntime's."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxruntime.quantization as incumbent_package
import pytest
from calibration_cases import Reader, assert_close, conv_model, images, text_model
from onnxruntime.quantization import calibrate as incumbent

from qwrap.ort import calibrate
from qwrap.ort.calibrate import CalibrationMethod, TensorsData, create_calibrator

METHODS = [method.name for method in CalibrationMethod]
CLASSES = (
    "MinMaxCalibrater",
    "HistogramCalibrater",
    "EntropyCalibrater",
    "PercentileCalibrater",
    "DistributionCalibrater",
)


@pytest.mark.ort(82, 91, 93)
@pytest.mark.parametrize("name", ["CalibraterBase", *CLASSES, "HistogramCollector"])
def test_signatures_are_those_of_onnxruntime(name: str) -> None:
    ours = inspect.signature(getattr(calibrate, name).__init__).parameters
    theirs = inspect.signature(getattr(incumbent, name).__init__).parameters
    wanted = [(p.name, p.default) for p in theirs.values()]
    assert [(p.name, p.default) for p in ours.values()][: len(wanted)] == wanted


@pytest.mark.ort(362)
def test_all_names_of_the_module_are_there() -> None:
    defined = {
        n for n, v in vars(incumbent).items() if getattr(v, "__module__", "") == incumbent.__name__
    }
    assert defined <= set(calibrate.__all__)


@pytest.mark.ort(91)
def test_the_calibrators_have_onnxruntimes_bases() -> None:
    assert hasattr(incumbent_package, "MinMaxCalibrater")
    for name in CLASSES[2:]:
        assert issubclass(getattr(calibrate, name), calibrate.HistogramCalibrater)
    assert issubclass(calibrate.MinMaxCalibrater, calibrate.CalibraterBase)


@pytest.mark.ort(43, 82, 83)
@pytest.mark.parametrize("method", METHODS)
def test_the_protocol_of_a_calibrator(method: str, conv_path: Path) -> None:
    kind = CalibrationMethod[method]
    augmented = conv_path.with_name("augmented.onnx")
    calibrator = create_calibrator(conv_path, None, augmented, kind)
    assert [path.name for path in conv_path.parent.iterdir()] == ["conv.onnx"]
    assert [i.name for i in calibrator.infer_session.get_inputs()] == ["x"]
    calibrator.set_execution_providers(["CPUExecutionProvider"])
    calibrator.create_inference_session()
    names, values = calibrator.select_tensors_to_calibrate(calibrator.model)
    assert names == {"x", "c", "r", "g", "f", "y"} <= set(values)
    calibrator.augment_graph()
    outputs = [o.name for o in calibrator.get_augment_model().graph.output]
    ends = ("_ReduceMin", "_ReduceMax") if method == "MinMax" else ("",)
    assert outputs[0] == "y"
    assert set(outputs) == {"y"} | {name + end for name in names for end in ends}
    assert [o.name for o in onnx.load(augmented).graph.output] == outputs
    calibrator.collect_data(Reader(images(2)))
    calibrator.clear_collected_data()
    calibrator.collect_data(Reader(images(2, seed=1)))
    ranges = calibrator.compute_data()
    assert isinstance(ranges, TensorsData)
    assert ranges.calibration_method is CalibrationMethod[method]
    assert set(ranges) == names


@pytest.mark.ort(82)
def test_an_unknown_method_is_refused(conv_path: Path) -> None:
    with pytest.raises(ValueError, match="Unsupported calibration method"):
        create_calibrator(conv_path, calibrate_method="MinMax")  # type: ignore[arg-type]


@pytest.mark.ort(85)
def test_a_model_in_memory_is_taken_too(conv_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_path should be model path\."):
        incumbent.CalibraterBase(conv_model())
    with pytest.raises(ValueError, match=r"model_path should be model path\."):
        calibrate.CalibraterBase(3)  # type: ignore[arg-type]
    model = conv_model()
    before = model.SerializeToString()
    ranges = []
    for source in (model, conv_path, str(conv_path)):
        calibrator = create_calibrator(source)
        calibrator.collect_data(Reader(images()))
        ranges.append(calibrator.compute_data())
    assert_close(ranges[0], ranges[1])
    assert_close(ranges[0], ranges[2])
    assert model.SerializeToString() == before


@pytest.mark.ort(84)
@pytest.mark.parametrize("op_types", [None, [], ["Relu"], ["Conv", "MatMul"], ["Gemm"]])
def test_the_same_tensors_are_watched(op_types: Any, conv_path: Path) -> None:
    ours = calibrate.CalibraterBase(conv_path, op_types)
    theirs = incumbent.CalibraterBase(conv_path, op_types)
    watched = ours.select_tensors_to_calibrate(ours.model)[0]
    assert watched == theirs.select_tensors_to_calibrate(theirs.model)[0]


@pytest.mark.ort(50, 84)
def test_only_float32_and_float16_tensors_are_watched() -> None:
    model = text_model(
        """d = Cast <to = 11> (x)  e = Add (d, d)  s = Shape (x)  i = Cast <to = 1> (s)
        h = Cast <to = 10> (x)  n = Neg (h)  y = Cast <to = 1> (n)""",
        inputs="float[N,2] x",
    )
    calibrator = create_calibrator(model)
    calibrator.collect_data(Reader([{"x": np.ones((1, 2), np.float32)}]))
    ranges = calibrator.compute_data()
    assert set(ranges) == {"x", "i", "h", "n", "y"}
    assert ranges["n"].lowest.dtype == np.float16
    assert ranges["n"].lowest == -1


@pytest.mark.ort(84, "G68")
def test_tensors_in_bodies_are_watched(both: Any, tmp_path: Path) -> None:
    """onnxruntime reads nodes of the main graph only; a tensor of two branches is one."""
    then = "then_branch = t () => (float[N,2] u) { a = Add (x, x)  u = Identity (a) }"
    other = "else_branch = e () => (float[N,2] v) { a = Mul (x, x)  v = Identity (a) }"
    model = text_model(
        f"""n = ReduceMax <keepdims = 0> (x)  k = Constant <value = float {{1.5}}> ()
        c = Greater (n, k)  y = If (c) <{then}, {other}>""",
        inputs="float[N,2] x",
    )
    onnx.save(model, tmp_path / "if.onnx")
    batches = [{"x": np.array([[1, -1]], np.float32)}, {"x": np.array([[3, -5]], np.float32)}]
    ours, theirs = both(tmp_path / "if.onnx", "MinMax", [batches])
    assert set(theirs) == {"x", "n", "k", "y"}
    assert set(ours) == {"x", "n", "y", "a", "u", "v"}  # a constant is no activation
    ends = {name: (float(d.lowest[0]), float(d.highest[0])) for name, d in ours.items()}
    assert ends["a"] == (-10, 6)  # Mul gives 1 and 1, Add 6 and -10
    assert ends["u"] == (-10, 6)
    assert ends["v"] == (1, 1)


@pytest.mark.ort("G68")
@pytest.mark.parametrize("method", METHODS)
def test_every_iteration_of_a_loop_counts(method: str) -> None:
    model = text_model(
        """n = Constant <value_int = 4> ()  c = Constant <value = bool[1] {1}> ()  t = Squeeze (c)
        y = Loop (n, t, x) <body = b (int64 i, bool go, float[2] a) => (bool more, float[2] s)
          { more = Identity (go)  s = Add (a, a) }>""",
        inputs="float[2] x",
        outputs="float[2] y",
    )
    calibrator = create_calibrator(model, calibrate_method=CalibrationMethod[method])
    calibrator.collect_data(Reader([{"x": np.array([1, -2], np.float32)}]))
    found = calibrator.compute_data()["s"]
    assert found.lowest == -32
    if method != "MinMax":
        assert found.hist.sum() == 8


@pytest.mark.ort(86)
def test_ranges_are_those_of_the_graph_as_it_stands(both: Any, tmp_path: Path) -> None:
    """A session with optimisations would fuse BatchNormalization and Relu into Conv."""
    rng = np.random.default_rng(1)
    names = {"w": (4, 3, 1, 1), "s": (4,), "b": (4,), "m": (4,)}
    weights = {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in names.items()}
    nodes = "c = Conv (x, w)  n = BatchNormalization (c, s, b, m, v)  y = Relu (n)"
    model = text_model(nodes, {**weights, "v": np.ones(4, np.float32)}, outputs="float[N,4,H,W] y")
    onnx.save(model, tmp_path / "bn.onnx")
    ours, theirs = both(tmp_path / "bn.onnx", "MinMax", [images()])
    assert set(ours) == {"x", "c", "n", "y"}
    assert_close(ours, theirs)


@pytest.mark.ort(92)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("module", [calibrate, incumbent])
def test_no_data_is_refused(module: Any, method: str, conv_path: Path, tmp_path: Path) -> None:
    calibrator = module.create_calibrator(
        conv_path,
        augmented_model_path=str(tmp_path / "a.onnx"),
        calibrate_method=module.CalibrationMethod[method],
    )
    with pytest.raises(ValueError, match=r"No data is collected\."):
        calibrator.collect_data(Reader([]))


@pytest.mark.ort(92)
@pytest.mark.parametrize("method", METHODS)
def test_ranges_before_data_are_refused(method: str, conv_path: Path) -> None:
    calibrator = create_calibrator(conv_path, calibrate_method=CalibrationMethod[method])
    with pytest.raises(ValueError, match=r"No data is collected|No collector created"):
        calibrator.compute_data()


@pytest.mark.ort(13, "G64")
def test_providers_are_checked_and_mapped(
    conv_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """onnxruntime prints that it does not know a provider, and goes on without it."""
    calibrator = create_calibrator(conv_path, providers=["CPUExecutionProvider"])
    assert calibrator.infer_session.get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(ValueError, match=r"'CPUExecutionProvide' does not exist; 'CPUExec"):
        create_calibrator(conv_path, providers=["CPUExecutionProvide"])
    with pytest.raises(ValueError, match=r"must be either strings or"):
        calibrator.set_execution_providers([3])
    with caplog.at_level(logging.WARNING):
        calibrator.set_execution_providers([
            ("XnnpackExecutionProvider", {}),
            "CPUExecutionProvider",
        ])
    assert "XnnpackExecutionProvider: torch has no device" in caplog.text
    assert set(onnxruntime.get_all_providers()) <= _known_providers()


def _known_providers() -> set[str]:
    from qwrap.ort.calibration import float_model

    return {float_model.CPU, *float_model._ON_CUDA, *float_model._ELSEWHERE}


@pytest.mark.ort(83)
def test_the_session_runs_the_model(conv_path: Path) -> None:
    session = create_calibrator(conv_path).infer_session
    theirs = onnxruntime.InferenceSession(conv_path, providers=["CPUExecutionProvider"])
    feed = images(1)[0]
    np.testing.assert_allclose(
        session.run(None, feed)[0],
        theirs.run(None, feed)[0],
        atol=1e-5,  # float32 sums in another order
    )
    assert len(session.run(["y"], feed)) == 1
    for ours, other in zip(
        [*session.get_inputs(), *session.get_outputs()],
        [*theirs.get_inputs(), *theirs.get_outputs()],
        strict=True,
    ):
        assert (ours.name, ours.type, ours.shape) == (other.name, other.type, other.shape)


@pytest.mark.ort("G67")
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_printed(
    method: str, conv_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """onnxruntime prints numbers of tensors and bins."""
    calibrator = create_calibrator(conv_path, calibrate_method=CalibrationMethod[method])
    calibrator.collect_data(Reader(images()))
    calibrator.compute_data()
    assert capfd.readouterr() == ("", "")


@pytest.mark.ort(83)
def test_a_batch_that_does_not_fit_is_refused(conv_path: Path) -> None:
    calibrator = create_calibrator(conv_path)
    with pytest.raises(
        ValueError, match=r"calibration data: batch 1: graph inputs \['x'\] are mis"
    ):
        calibrator.collect_data(Reader([*images(1), {"z": np.zeros(3)}]))
    with pytest.raises(ValueError, match="expected 4 dimensions"):
        calibrator.collect_data(Reader([{"x": np.zeros(3, np.float32)}]))


@pytest.mark.ort(351)
def test_tensors_with_dynamic_shapes_are_watched() -> None:
    model = text_model(
        """s = Shape (x)  h = ReduceProd <keepdims = 1> (s)  r = Reshape (x, h)
        z = NonZero (r)  t = Squeeze (z)  y = Gather (r, t)""",
        inputs="float[N,M] x",
        outputs="float[K] y",
    )
    calibrator = create_calibrator(model)
    batches = [{"x": np.full((i, 3), i, np.float32)} for i in (1, 2, 5)]
    calibrator.collect_data(Reader(batches))
    ranges = calibrator.compute_data()
    assert {n: float(ranges[n].highest[0]) for n in ranges} == {"x": 5, "r": 5, "y": 5}
