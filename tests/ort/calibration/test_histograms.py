"""Ranges from histograms, beside onnxruntime's."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from calibration_cases import Reader, assert_close, conv_model, images, text_model
from onnxruntime.quantization import calibrate as incumbent

from qwrap.ort import calibrate
from qwrap.ort.calibrate import CalibrationMethod, create_calibrator

HISTOGRAMS = ["Entropy", "Percentile", "Distribution"]


def of_x(batches: Any, method: str, **options: Any) -> Any:
    """Return the range of an input, after one collect_data."""
    model = text_model("y = Relu (x)", inputs="float[N] x", outputs="float[N] y")
    calibrator = create_calibrator(
        model, calibrate_method=CalibrationMethod[method], extra_options=options
    )
    calibrator.collect_data(Reader([{"x": np.ravel(batch)} for batch in batches]))
    return calibrator.compute_data()["x"]


def outliers(count: int = 20000) -> np.ndarray:
    values = np.random.default_rng(0).normal(0, 1, count).astype(np.float32)
    values[:2] = 40, -38
    return values


@pytest.mark.ort(74, 96, 98, "G13")
@pytest.mark.parametrize("percentile", [90, 99.9, 99.999])
@pytest.mark.parametrize("symmetric", [None, False])
def test_percentile_ends_one_border_further_than_onnxruntimes(
    percentile: float, symmetric: bool | None, conv_path: Path, both: Any
) -> None:
    """onnxruntime takes the left border of the bin in which the share is reached."""
    options = {"percentile": percentile, **({} if symmetric is None else {"symmetric": symmetric})}
    calls = [images(4, scale=0.5), images(3, seed=9)]
    ours, theirs = both(conv_path, "Percentile", calls, **options)
    assert set(ours) == set(theirs)
    for name in theirs:
        a, b, width = ours[name], theirs[name], float(np.diff(ours[name].bins)[-1])
        assert (a.lowest.dtype, a.highest.dtype) == (np.float32, np.float32)
        # A value may lie in the bin beside, for torch and onnxruntime round apart.
        moved = float(a.highest) - float(b.highest)
        assert -0.01 * width < moved < 2.01 * width
        assert abs(float(a.lowest) - float(b.lowest)) < 2.01 * width


@pytest.mark.ort(97, 98)
@pytest.mark.parametrize("scenario", ["same", "p3"])
def test_distribution_is_that_of_onnxruntime(scenario: str, conv_path: Path, both: Any) -> None:
    calls = [images(4, scale=0.5), images(3, seed=9)]
    ours, theirs = both(conv_path, "Distribution", calls, scenario=scenario)
    attributes = ("lowest", "highest", "avg", "std", "hist_edges")
    assert_close(ours, theirs, attributes)
    for name in theirs:  # values at a border may be rounded to either side of it
        assert np.abs(ours[name].hist.cumsum() - theirs[name].hist.cumsum()).max() <= 4


@pytest.mark.ort(97)
def test_the_deviation_is_that_of_the_values() -> None:
    values = np.random.default_rng(1).normal(1, 2, 50000).astype(np.float32)
    found = of_x([values[:20000], values[20000:]], "Distribution")
    assert abs(found.avg - values.mean()) < 1e-3  # bins are 0.01 wide
    assert abs(found.std - values.std()) < 1e-3


@pytest.mark.ort(97)
@pytest.mark.parametrize(
    ("options", "reason"),
    [({"num_bins": 511}, "Must be in range 512 <= num_bins"), ({"scenario": "p4"}, "'same', 'p3'")],
)
def test_wrong_options_of_distribution_are_refused(
    options: Any, reason: str, conv_path: Path, collected: Any
) -> None:
    for module in (calibrate, incumbent):
        with pytest.raises(ValueError, match=reason):
            collected(module, conv_path, "Distribution", [images(1)], **options)


@pytest.mark.ort(74, "G13")
def test_percentile_100_is_the_largest_value(conv_path: Path, collected: Any) -> None:
    """onnxruntime's is one bin short."""
    for options in ({}, {"symmetric": False}, {"symmetric": True}):
        found = of_x([outliers()], "Percentile", percentile=100, **options)
        assert (float(found.highest), abs(float(found.lowest))) in ((40, 38), (40, 40))
    theirs = collected(incumbent, conv_path, "Percentile", [images()], percentile=100)
    ours = collected(calibrate, conv_path, "Percentile", [images()], percentile=100)
    assert theirs["r"].highest < ours["r"].highest * 0.9999


@pytest.mark.ort(74, 96)
def test_a_percentile_leaves_out_that_share() -> None:
    values = np.linspace(-1, 1, 100001, dtype=np.float32)
    for percentile, options in ((99, {}), (90, {"symmetric": False})):
        found = of_x([values], "Percentile", percentile=percentile, **options)
        inside = np.mean((values >= found.lowest) & (values <= found.highest))
        assert percentile / 100 <= inside <= percentile / 100 + 2 / 2048


@pytest.mark.ort(74)
@pytest.mark.parametrize("percentile", [101, -1])
def test_a_percentile_outside_of_0_to_100_is_refused(
    percentile: float, conv_path: Path, collected: Any
) -> None:
    for module in (calibrate, incumbent):
        with pytest.raises(ValueError, match="Must be in range 0 <= percentile <= 100"):
            collected(module, conv_path, "Percentile", [images(1)], percentile=percentile)


@pytest.mark.ort(70, 95, 96, "G14")
@pytest.mark.parametrize("method", ["Percentile", "Entropy"])
def test_symmetric_ranges_are_symmetric(method: str, conv_path: Path, both: Any) -> None:
    """onnxruntime cuts each end at the extreme of its side."""
    ours, theirs = both(conv_path, method, [images()], symmetric=True)
    assert all(data.lowest == -data.highest for data in ours.values())
    assert theirs["r"].lowest == 0 < theirs["r"].highest


@pytest.mark.ort(96)
def test_percentile_ranges_end_where_the_values_do_if_not_asked_for(
    conv_path: Path, both: Any
) -> None:
    ours, theirs = both(conv_path, "Percentile", [images()])
    assert ours["r"].lowest == theirs["r"].lowest == 0


@pytest.mark.ort(94, 95, "G6")
def test_entropy_is_a_search(collected: Any, tmp_path: Path) -> None:
    """onnxruntime's default leaves it one threshold: that of MinMax."""
    values = [outliers()]
    found, whole = of_x(values, "Entropy"), of_x(values, "MinMax")
    assert (whole.lowest, whole.highest) == ([-38], [40])
    assert 3 < found.highest < 16  # an eighth of the histogram is the least that is tried
    assert -16 < found.lowest < -3
    onnx.save(text_model("y = Relu (x)", inputs="float[N] x", outputs="float[N] y"), tmp_path / "m")
    theirs = collected(incumbent, tmp_path / "m", "Entropy", [[{"x": outliers()}]])
    assert (theirs["x"].lowest, theirs["x"].highest) == (-38, 40)


@pytest.mark.ort(94, 95, 98)
def test_entropy_with_as_many_levels_as_bins_is_min_max(
    caplog: pytest.LogCaptureFixture, conv_path: Path, both: Any
) -> None:
    with caplog.at_level(logging.WARNING):
        options = {"num_bins": 128, "num_quantized_bins": 128}
        ours, theirs = both(conv_path, "Entropy", [images()], **options)
    assert_close(ours, theirs)
    assert "num_bins=128 for num_quantized_bins=128 leave one threshold" in caplog.text


@pytest.mark.ort(94)
def test_entropy_ranges_do_not_depend_on_the_order_of_batches() -> None:
    batches = np.split(outliers(), 8)
    first, last = of_x(batches, "Entropy"), of_x(batches[::-1], "Entropy")
    assert first.range_value == last.range_value
    np.testing.assert_array_equal(first.hist, last.hist)
    assert first.hist.sum() == 20000


@pytest.mark.ort("G77")
@pytest.mark.parametrize(
    ("method", "options", "bins"),
    [
        ("Entropy", {"num_bins": 512, "num_quantized_bins": 64}, 512),
        ("Percentile", {"num_bins": 777}, 777),
        ("Distribution", {"num_bins": 600, "scenario": "p3"}, 600),
    ],
)
def test_bins_levels_and_scenario_are_options(method: str, options: Any, bins: int) -> None:
    assert len(of_x([outliers()], method, **options).hist) == bins


@pytest.mark.ort("G33")
@pytest.mark.parametrize("method", HISTOGRAMS)
def test_batches_may_have_any_shapes(method: str, conv_path: Path, collected: Any) -> None:
    """onnxruntime stacks them: inhomogeneous shape."""
    batches = [images(1, size=size)[0] for size in (8, 11, 6)]
    found = collected(calibrate, conv_path, method, [batches])
    values = np.concatenate([batch["x"].ravel() for batch in batches])
    assert found["x"].hist.sum() == values.size
    with pytest.raises(ValueError, match="inhomogeneous"):
        collected(incumbent, conv_path, method, [batches])


@pytest.mark.ort(49, "G34")
@pytest.mark.parametrize("method", HISTOGRAMS)
def test_float16_models_have_histograms(method: str, collected: Any, tmp_path: Path) -> None:
    """onnxruntime: Too many bins for data range. Cannot create 2048 finite-sized bins."""
    onnx.save(conv_model("float16"), tmp_path / "half.onnx")
    batches = [{"x": batch["x"].astype(np.float16)} for batch in images()]
    found = collected(calibrate, tmp_path / "half.onnx", method, [batches])
    for data in found.values():
        assert {data.lowest.dtype, data.highest.dtype} == {np.dtype(np.float16)}
        assert len(data.hist) == 2048
    if method != "Entropy":
        with pytest.raises(ValueError, match="Too many bins for data range"):
            collected(incumbent, tmp_path / "half.onnx", method, [batches])


@pytest.mark.ort("G29")
@pytest.mark.parametrize("method", HISTOGRAMS)
def test_nan_and_infinity_are_left_out_and_named(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    values = outliers()
    values[5:8] = np.nan, np.inf, -np.inf
    with caplog.at_level(logging.WARNING):
        found = of_x([values, outliers()], method)
    assert "tensor 'x': 1 values are NaN and 2 infinite" in caplog.text
    assert found.hist.sum() == 39997
    assert np.isfinite([found.lowest, found.highest]).all()


@pytest.mark.ort("G29")
@pytest.mark.parametrize("method", HISTOGRAMS)
@pytest.mark.parametrize("value", [0.0, 3.0, -3.4028235e38, 1e-42])
def test_constant_and_extreme_tensors_have_ranges(method: str, value: float) -> None:
    """-3.4e38 is what exporters mask attention with; onnxruntime cannot make bins for it."""
    found = of_x([np.full((2, 3), value, np.float32)], method, percentile=100)
    ends = float(found.lowest), float(found.highest)
    if method != "Distribution":
        assert np.float32(value) in np.float32(ends)
    assert np.isfinite(ends).all()
    assert found.hist.sum() == 6


@pytest.mark.ort("G29")
@pytest.mark.parametrize("method", HISTOGRAMS)
def test_empty_tensors_have_a_range_of_zero(method: str) -> None:
    empty = np.zeros((0, 2), np.float32)
    found = of_x([empty], method)
    if method != "Distribution":
        assert (found.lowest, found.highest) == (0, 0)
    assert of_x([empty, np.ones((1, 2), np.float32)], method).hist.sum() == 2


@pytest.mark.ort("G58")
def test_batches_are_not_kept(tmp_path: Path) -> None:
    """onnxruntime keeps every tensor of every batch, several times over."""
    code = """
import json, resource, sys
import numpy as np
from calibration_cases import text_model
from qwrap.ort.calibrate import CalibrationMethod, create_calibrator
class Reader:
    def __init__(self, count): self.left = count
    def get_next(self):
        self.left -= 1
        rng = np.random.default_rng(0)
        return {"x": rng.random((64, 1024), np.float32)} if self.left >= 0 else None
nodes = " ".join(f"a{i + 1} = Relu (a{i})" for i in range(30)).replace("a0)", "x)")
model = text_model(nodes + " y = Neg (a30)", inputs="float[N,M] x", outputs="float[N,M] y")
peaks = []
for method in CalibrationMethod:
    for count in (4, 64):
        calibrator = create_calibrator(model, calibrate_method=method)
        calibrator.collect_data(Reader(count))
        calibrator.compute_data()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(json.dumps(peaks))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    peaks = json.loads(done.stdout)
    # One batch of all tensors takes 8 MB; 60 more of them would take 480.
    assert max(peaks) - peaks[0] < 24_000  # KiB


@pytest.mark.ort("G58")
def test_text_inputs_run_twice_too() -> None:
    inputs = "string[N] t, float[N] x"
    model = text_model("u = Identity (t)  y = Neg (x)", inputs=inputs, outputs="float[N] y")
    calibrator = create_calibrator(model, calibrate_method=CalibrationMethod.Percentile)
    batch = {"t": np.array(["a"], object), "x": np.array([1, 2], np.float32)}
    calibrator.collect_data(Reader([batch, batch]))
    assert calibrator.compute_data()["y"].hist.sum() == 4
