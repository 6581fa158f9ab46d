"""Files made by processes of their own: what they are told, and what comes back."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from file_order import Order, Report
from file_process import carry_out, own_environment
from sample_folder import SampleFolder

SERVE = "from file_order import serve; serve({}, 'tool 1')"


def run(tmp_path: Path, make: str, timeout: float = 60) -> Report:
    SampleFolder.write(tmp_path / "samples", [{"x.1": np.ones(2)}, {"x.1": np.zeros(3)}])
    order = Order(source=tmp_path / "a", target=tmp_path / "b", samples=tmp_path / "samples")
    return carry_out([sys.executable, "-c", make], order, timeout, own_environment())


def test_samples_come_back_in_order(tmp_path: Path) -> None:
    run(tmp_path, "")
    folder = SampleFolder(tmp_path / "samples")
    assert [list(sample["x.1"]) for sample in folder] == [[1, 1], [0, 0, 0]]
    assert len(folder) == 2


def test_a_report_has_time_memory_and_notes(tmp_path: Path) -> None:
    make = SERVE.format("lambda o: print('noise') or [f'{len(o.data)} samples, {o.weight} bits']")
    report = run(tmp_path, make)
    assert (report.error, report.version, report.notes) == ("", "tool 1", ["2 samples, 8 bits"])
    assert 5 * 2**20 < report.peak < 2**30  # a Python with numpy
    assert 0 < report.seconds < 60


def test_what_the_tool_raises_is_reported(tmp_path: Path) -> None:
    assert run(tmp_path, SERVE.format("lambda o: 1 / 0")).error.startswith("ZeroDivisionError")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import no_such_tool", "ModuleNotFoundError: No module named 'no_such_tool'"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
    ],
)
def test_a_process_without_a_report_says_why(tmp_path: Path, code: str, error: str) -> None:
    assert run(tmp_path, code).error == error


def test_a_process_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    report = run(tmp_path, "import time; time.sleep(60)", timeout=0.5)
    assert report.error == "not done after 0 s"
