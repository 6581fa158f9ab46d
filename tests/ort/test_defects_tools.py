"""Tables, comparisons and commands of onnxruntime's tool that mislead or fail."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from both_ways import make_side
from one_operator import constants_of, make
from onnx import numpy_helper
from operator_cases import CASES, LAYERS
from ort_script import INCUMBENT, OWN, Reader, Setting, quiet

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
BOTH = pytest.mark.parametrize("module", [OWN, INCUMBENT])


def part(module: str, name: str) -> Any:
    return importlib.import_module(f"{module}.{name}")


@pytest.mark.ort("G12", 314)
@pytest.mark.parametrize("weight", ["QInt8", "QUInt8"])
def test_the_error_of_unsigned_weights_does_not_wrap(tmp_path: Path, weight: str) -> None:
    """The incumbent subtracts zero points in uint8: some -10 dB for a good weight."""
    side = make_side(tmp_path, LAYERS["Conv"])
    side.quantize(INCUMBENT, Setting(weight=weight))
    errors = {}
    for module in (OWN, INCUMBENT):
        debug = part(module, "qdq_loss_debug")
        with quiet(module), np.errstate(over="ignore"):
            pairs = debug.create_weight_matching(
                str(side.source), str(tmp_path / f"{INCUMBENT}.onnx")
            )
            errors[module] = debug.compute_weight_error(pairs)["w"]
    assert errors[OWN] > 35
    if weight == "QUInt8":
        assert errors[INCUMBENT] < 0


@pytest.mark.ort("G50", 316)
def test_errors_of_activations_need_no_float_model() -> None:
    """The incumbent: KeyError 'float'."""
    values = [np.ones(4, np.float32)]
    pairs = {"x": {"pre_qdq": values, "post_qdq": [v * np.float32(0.9) for v in values]}}
    found = part(OWN, "qdq_loss_debug").compute_activation_error(pairs)
    assert found["x"]["qdq_err"] == pytest.approx(20, abs=0.1)
    with pytest.raises(KeyError, match="float"):
        part(INCUMBENT, "qdq_loss_debug").compute_activation_error(pairs)


def model_folder(folder: Path) -> Path:
    """A model with samples beside it, as the runner wants them."""
    made = make(CASES["MatMul"])
    onnx.save(made.model, folder / "model.onnx")
    for number, batch in enumerate(made.batches):
        samples = folder / f"test_data_set_{number}"
        samples.mkdir()
        data = numpy_helper.from_array(batch["x"], "x")
        (samples / "input_0.pb").write_bytes(data.SerializeToString())
    return folder / "model.onnx"


def command(module: str, name: str, *arguments: object) -> None:
    """Run the module as ``python -m`` does, in this process."""
    with pytest.MonkeyPatch.context() as patch, quiet(module), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it was imported before
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_module(f"{module}.{name}", run_name="__main__")


@pytest.mark.ort("G51", 326, 329, 330)
def test_the_runner_takes_axes_and_overrides(tmp_path: Path) -> None:
    """The incumbent leaves the axis a string and wants scales in every override."""
    model = model_folder(tmp_path)
    overrides = tmp_path / "overrides.json"
    overrides.write_text(json.dumps({"x": [{"quant_type": "QUInt16"}]}), encoding="utf8")
    # fmt: off
    asked = {
        "axis": ["--per_channel", "--op_per_channel_axis", "MatMul", "0"],
        "overrides": ["--tensor_quant_overrides", overrides],
    }
    # fmt: on
    for name, extra in asked.items():
        command(OWN, "static_quantize_runner", "-i", model, "-o", tmp_path / f"{name}.onnx", *extra)
        with pytest.raises((TypeError, KeyError)):
            command(INCUMBENT, "static_quantize_runner", "-i", model, "-o", tmp_path / "x", *extra)
    assert constants_of(onnx.load(tmp_path / "axis.onnx"))["w_scale"].shape == (16,)
    assert constants_of(onnx.load(tmp_path / "overrides.onnx"))["x_zero_point"].dtype == np.uint16


@pytest.mark.ort("G52", 324)
def test_a_step_of_preprocessing_is_skipped_where_that_is_true(tmp_path: Path) -> None:
    """The incumbent reads any text as true: with all three steps skipped it writes nothing."""
    onnx.save(make(CASES["Conv_Relu_Conv"]).model, tmp_path / "in.onnx")
    skip = [f"--skip_{step}" for step in ("optimization", "onnx_shape", "symbolic_shape")]
    flags = [part for flag in skip for part in (flag, "False")]
    given = ["--input", tmp_path / "in.onnx", "--output", tmp_path / "out.onnx", *flags]
    with contextlib.suppress(SystemExit):
        command(INCUMBENT, "preprocess", *given)
    assert not (tmp_path / "out.onnx").exists()
    with contextlib.suppress(SystemExit):
        command(OWN, "preprocess", *given)
    assert (tmp_path / "out.onnx").exists()


@pytest.mark.ort("G67", 363)
def test_importing_and_calibrating_say_nothing(tmp_path: Path) -> None:
    """The incumbent configures logging at import, and prints while it collects."""
    onnx.save(make(CASES["Add_constant"]).model, tmp_path / "in.onnx")
    script = """
import logging, sys
import numpy as np
import {0}.matmul_nbits_quantizer
from {0} import quantize_static
from {0}.calibrate import CalibrationMethod
class Reader:
    rest = [{{"x": np.ones((2, 3, 8, 8), np.float32)}}]
    def get_next(self):
        return self.rest.pop() if self.rest else None
configured = bool(logging.root.handlers)
quantize_static("in.onnx", "out.onnx", Reader(), calibrate_method=CalibrationMethod.Percentile)
sys.exit(configured)
"""
    for module, quietly in ((OWN, True), (INCUMBENT, False)):
        done = subprocess.run(
            [sys.executable, "-c", script.format(module)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env=ENVIRONMENT,
        )
        assert (done.returncode == 0) == quietly, done.stderr[-2000:]
        assert (done.stdout == "") == quietly


@pytest.mark.ort("G49", 90)
def test_ranges_per_channel_take_more_than_one_pass(tmp_path: Path) -> None:
    """The incumbent: 'truth value of an array' at the second collect_data."""
    made = make(CASES["Add_constant"])
    onnx.save(made.model, tmp_path / "in.onnx")
    for module in (OWN, INCUMBENT):
        calibrator = part(module, "calibrate").create_calibrator(
            tmp_path / "in.onnx",
            augmented_model_path=str(tmp_path / "augmented.onnx"),
            extra_options={"per_channel": True},
        )
        calibrator.collect_data(Reader(made.batches[:1]))
        if module == INCUMBENT:
            with pytest.raises(ValueError, match="truth value"):
                calibrator.collect_data(Reader(made.batches[1:]))
            continue
        calibrator.collect_data(Reader(made.batches[1:]))
        low, high = calibrator.compute_data()["x"].range_value
        values = np.concatenate([batch["x"] for batch in made.batches])
        np.testing.assert_array_equal(np.ravel(low), values.min((0, 2, 3)))
        np.testing.assert_array_equal(np.ravel(high), values.max((0, 2, 3)))
