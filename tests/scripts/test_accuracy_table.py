"""The tables of the benchmark of accuracy, from figures made up for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from accuracy_goals import SETTINGS, bound, reaches
from accuracy_results import Cell, Results, Way
from accuracy_table import markdown
from results import FileResult

MODEL = "mobilenetv2_cifar10_128"


def made(top1: float, seconds: float, latency: float = 0.3) -> FileResult:
    ratios = {"1": latency, "2": latency}
    return FileResult(
        method="",
        metric={"top1": top1},
        seconds=seconds,
        processor=2 * seconds,
        peak=2**30,
        latency=ratios,
        fastest_latency=ratios,
    )


def cell(tool: str, effort: str, file: FileResult, setting: str = "W8A8", **known) -> Cell:
    return Cell(
        model=MODEL, setting=setting, tool=tool, effort=effort, samples=64, file=file, **known
    )


def filled(path: Path | None = None) -> Results:
    results = Results(path)
    results.references[MODEL] = FileResult(method="float", metric={"top1": 0.822})
    results.put([
        cell("qwrap", "plain", made(0.800, 2.0), version="with torch 2"),
        cell("qwrap", "default", made(0.820, 5.0, latency=1.4), coded=0.98),
        cell("onnxruntime", "plain", made(0.790, 3.0)),
        cell("nncf", "default", FileResult(method="", error="RuntimeError: no")),
    ])
    return results


def rows(results: Results, table: int) -> list[dict[str, str]]:
    """The rows of one of the tables, heading -> cell."""
    tables = [part for part in markdown(results).split("\n\n") if part.startswith("|")]
    head, _, *lines = [line.strip("| ").split(" | ") for line in tables[table].splitlines()]
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_accuracy_is_shown_as_the_difference_from_float_and_held_to_the_bound() -> None:
    (row,) = rows(filled(), 0)
    assert row == {
        "model (metric)": f"{MODEL} (top1)",
        "setting": "W8A8",
        "float": "0.822",
        "bound": "-0.006",
        "within bound": "qwrap (default)",
        "qwrap plain": "-0.022",
        "qwrap default": "-0.002",
        "onnxruntime": "-0.032",
        "nncf default": "fails",
    }


def test_cost_is_shown_over_plain_calibration() -> None:
    (row,) = rows(filled(), 1)
    assert (row["default / plain"], row["high / plain"]) == ("2.5", "\N{EN DASH}")
    assert row["qwrap default"] == "5.0 s, 1024"


def test_files_slower_than_float_are_named() -> None:
    (row,) = rows(filled(), 2)
    assert (row["qwrap's slower than float"], row["qwrap default"]) == (
        "default",
        "1.40 / 1.40, 98%",
    )


def test_what_failed_is_listed_with_its_reason() -> None:
    assert markdown(filled()).endswith(f"- {MODEL}, W8A8, nncf default: RuntimeError: no")


def test_a_run_goes_on_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    first = filled(path)
    second = Results(path)
    assert (second.cells, second.references) == (first.cells, first.references)
    assert second.find(MODEL, "W8A8", Way("qwrap", "high")) is None


def test_a_cell_measured_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    results = filled(tmp_path / "accuracy.json")
    results.put([cell("qwrap", "plain", made(0.81, 1.0))])
    assert len(results.cells) == 4
    assert results.of(MODEL, "W8A8")[0].file.metric == {"top1": 0.81}


@pytest.mark.parametrize(
    ("model", "setting", "reference", "expected"),
    [
        ("stories260k", "W8A8", 3.548, 3.655),
        ("minilm_l6", "W4A8", 0.745, 0.725),
        ("silero_vad", "W4A8", 0.987, None),
        (MODEL, "W4A4", 0.822, None),
    ],
)
def test_bounds_are_those_asked_for(model, setting, reference, expected) -> None:
    assert bound(model, setting, reference) == expected


def test_a_perplexity_stays_below_its_bound() -> None:
    assert reaches(3.6, 3.655, "perplexity_story")
    assert not reaches(3.7, 3.655, "perplexity_story")
    assert not reaches(0.81, 0.816, "top1")


def test_four_bit_activations_are_for_classifiers() -> None:
    assert SETTINGS["W4A4"].suits(MODEL)
    assert not SETTINGS["W4A4"].suits("minilm_l6")
