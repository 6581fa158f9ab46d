"""Ranges of extremes and averages, beside onnxruntime's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from calibration_cases import Reader, assert_close, conv_model, images, text_model
from onnxruntime.quantization import calibrate as incumbent

from qwrap.ort import calibrate
from qwrap.ort.calibrate import create_calibrator

IDENTITY = "y = Identity (x)"


def of_x(batches: Any, inputs: str = "float[N,M] x", **options: Any) -> Any:
    """Return the range of an input, after one collect_data."""
    model = text_model(IDENTITY, inputs=inputs, outputs=inputs.replace(" x", " y"))
    calibrator = create_calibrator(model, extra_options=options)
    calibrator.collect_data(Reader(batches))
    return calibrator.compute_data()["x"]


def rows(*values: Any) -> list[dict[str, np.ndarray]]:
    return [{"x": np.array(v, np.float32, ndmin=2)} for v in values]


@pytest.mark.ort(70, 87, 88, 348)
@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_are_those_of_onnxruntime(symmetric: bool, conv_path: Path, both: Any) -> None:
    ours, theirs = both(conv_path, "MinMax", [images(), images(2, seed=5)], symmetric=symmetric)
    assert_close(ours, theirs)
    if symmetric:
        assert all((data.lowest == -data.highest).all() for data in ours.values())


@pytest.mark.ort(87)
def test_ranges_are_the_extremes_of_all_batches() -> None:
    batches = rows([1, -2], [3, 0], [-1, 5])
    found = of_x(batches)
    assert (found.lowest, found.highest) == ([-2], [5])
    assert found.lowest.dtype == np.float32


@pytest.mark.ort(71, 89)
def test_averages_across_calls_are_those_of_onnxruntime(conv_path: Path, both: Any) -> None:
    calls = [images(1, seed=seed) for seed in range(3)]
    options = {"moving_average": True, "averaging_constant": 0.3}
    ours, theirs = both(conv_path, "MinMax", calls, **options)
    assert_close(ours, theirs)


@pytest.mark.ort(71, 72, 89, "G15")
def test_the_constant_counts_within_a_call(conv_path: Path, both: Any, collected: Any) -> None:
    """onnxruntime takes the plain mean of the batches of a call."""
    found = of_x(rows([0, 10], [0, 20], [0, 40]), moving_average=True, averaging_constant=0.25)
    assert found.highest == 10 + 0.25 * (20 - 10) + 0.25 * (40 - 12.5)
    options = {"moving_average": True, "averaging_constant": 0.25}
    ours, theirs = both(conv_path, "MinMax", [images(3)], **options)
    one_by_one = collected(incumbent, conv_path, "MinMax", [[b] for b in images(3)], **options)
    assert_close(ours, one_by_one)
    assert abs(ours["x"].highest - theirs["x"].highest) > 0.1


@pytest.mark.ort(72)
@pytest.mark.parametrize("constant", [1.5, -0.1])
def test_a_constant_outside_of_0_to_1_is_refused(constant: float, conv_path: Path) -> None:
    for cls in (calibrate.MinMaxCalibrater, incumbent.MinMaxCalibrater):
        with pytest.raises(ValueError, match="Invalid averaging constant, which should not be"):
            cls(conv_path, moving_average=True, averaging_constant=constant)


@pytest.mark.ort(73, "G5")
@pytest.mark.parametrize("every", [1, 3, 4, 100])
def test_intermediate_outputs_change_nothing(every: int, conv_path: Path, collected: Any) -> None:
    """onnxruntime throws every ``every`` batches away; here the first hold the extremes."""
    batches = images(8)[::-1]
    plain = collected(calibrate, conv_path, "MinMax", [batches])
    folded = collected(calibrate, conv_path, "MinMax", [batches], max_intermediate_outputs=every)
    assert all(folded[name].range_value == plain[name].range_value for name in plain)
    if every == 3:
        options = {"max_intermediate_outputs": every}
        theirs = collected(incumbent, conv_path, "MinMax", [batches], **options)
        assert theirs["x"].highest < 0.7 * plain["x"].highest


@pytest.mark.ort(75, 349)
def test_strides_and_batches_lead_to_the_same_ranges(conv_path: Path, collected: Any) -> None:
    batches = images(6)
    whole = collected(calibrate, conv_path, "MinMax", [batches])
    strided = collected(calibrate, conv_path, "MinMax", [batches[i : i + 2] for i in (0, 2, 4)])
    joined = {"x": np.concatenate([batch["x"] for batch in batches])}
    assert all(strided[n].range_value == whole[n].range_value for n in whole)
    assert_close(collected(calibrate, conv_path, "MinMax", [[joined]]), whole)


@pytest.mark.ort(90)
@pytest.mark.parametrize("opset", [13, 18])
def test_ranges_per_channel_are_those_of_onnxruntime(opset: int, both: Any, tmp_path: Path) -> None:
    model = text_model("y = Relu (x)", outputs="float[N,3,H,W] y", opset=opset)
    onnx.save(model, tmp_path / "m.onnx")
    ours, theirs = both(tmp_path / "m.onnx", "MinMax", [images()], per_channel=True)
    assert_close(ours, theirs)
    assert ours["x"].lowest.shape == (3,)


@pytest.mark.ort(90, "G49")
def test_ranges_per_channel_widen_in_a_second_call(conv_path: Path, collected: Any) -> None:
    """onnxruntime compares arrays with ``min`` there: the truth value of an array is ambiguous."""
    calls = [images(2), images(2, seed=3)]
    found = collected(calibrate, conv_path, "MinMax", calls, per_channel=True)
    values = np.concatenate([batch["x"] for call in calls for batch in call])
    np.testing.assert_array_equal(found["x"].lowest, values.min((0, 2, 3)))
    np.testing.assert_array_equal(found["x"].highest, values.max((0, 2, 3)))
    with pytest.raises(ValueError, match="truth value of an array"):
        collected(incumbent, conv_path, "MinMax", calls, per_channel=True)


@pytest.mark.ort(90)
def test_a_changing_number_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="tensor 'x': 3 channels after 2"):
        of_x(rows([1, 2], [1, 2, 3]), per_channel=True)


@pytest.mark.ort(87, "G29")
def test_nan_and_infinity_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    """onnxruntime drops NaN without a word, and makes a range of infinity, of which a scale."""
    with caplog.at_level(logging.WARNING):
        found = of_x(rows([1, np.nan, -np.inf], [2, np.inf, -3]))
    assert (found.lowest, found.highest) == ([-3], [2])
    assert "tensor 'x': 1 values are NaN and 2 infinite" in caplog.text
    assert "its range is that of the others" in caplog.text


@pytest.mark.ort("G29")
def test_a_tensor_of_nothing_but_nan_has_no_range(caplog: pytest.LogCaptureFixture) -> None:
    model = text_model("z = Log (x)  y = Relu (x)", inputs="float[N,M] x", outputs="float[N,M] y")
    calibrator = create_calibrator(model)
    with caplog.at_level(logging.WARNING):
        calibrator.collect_data(Reader(rows([-1, -2])))
        assert set(calibrator.compute_data()) == {"x", "y"}
    assert "tensor 'z': 2 values are NaN and 0 infinite" in caplog.text
    assert "it has no range" in caplog.text


@pytest.mark.ort("G29")
def test_channels_without_a_finite_value_are_zero() -> None:
    found = of_x(rows([[1, np.inf, 2], [np.nan, np.nan, -2]]), per_channel=True)
    assert found.lowest.tolist() == [1, 0, -2]
    assert found.highest.tolist() == [1, 0, 2]


@pytest.mark.ort(87)
def test_empty_tensors_are_skipped() -> None:
    """onnxruntime's ReduceMax fails on them."""
    empty = {"x": np.zeros((0, 2), np.float32)}
    found = of_x([empty, *rows([1, 2]), empty])
    assert (found.lowest, found.highest) == ([1], [2])
    found = of_x([empty])
    assert (found.lowest, found.highest) == ([0], [0])


@pytest.mark.ort(49, "G34")
def test_ranges_of_float16_models_are_float16(both: Any, tmp_path: Path) -> None:
    onnx.save(conv_model("float16"), tmp_path / "half.onnx")
    batches = [{"x": batch["x"].astype(np.float16)} for batch in images()]
    ours, theirs = both(tmp_path / "half.onnx", "MinMax", [batches])
    assert set(ours) == set(theirs)
    for name in theirs:
        assert ours[name].lowest.dtype == np.float16
        # onnxruntime computes in float32 between its casts; two steps of float16 apart
        np.testing.assert_allclose(ours[name].highest, theirs[name].highest, rtol=2e-3, atol=2e-3)


@pytest.mark.ort(83)
def test_merged_ranges_leave_their_sources_as_they_are(conv_path: Path) -> None:
    calibrator = calibrate.MinMaxCalibrater(conv_path)
    make = lambda low, high: calibrate.TensorsData(  # noqa: E731  # two of them
        calibrate.CalibrationMethod.MinMax, {"x": (np.array([low], "f"), np.array([high], "f"))}
    )
    old, new = make(-1, 1), make(-3, 0.5)
    merged = calibrator.merge_range(old, new)
    assert merged["x"].range_value == ([-3], [1])
    assert new["x"].range_value == ([-3], [0.5])
    assert calibrator.merge_range(None, new) is new
