import dataclasses
import json
import math

import pytest

from qwrap.verify import (
    LevelReport,
    OutputReport,
    SkippedTensor,
    TensorReport,
    VerifyReport,
    verify,
)


def tensor(name: str, differing: int, steps: float = 1.0) -> TensorReport:
    return TensorReport(
        name=name,
        dtype="uint8",
        dequantized=(f"{name}_dq",),
        elements=100,
        differing=differing,
        worst_step=steps if differing else 0.0,
        sqnr=30.0 if differing else math.inf,
    )


def output(name: str, sqnr: float, top1: float | None) -> OutputReport:
    return OutputReport(
        name=name,
        elements=10,
        differing=3,
        max_abs_difference=0.5,
        sqnr=sqnr,
        top1_agreement=top1,
    )


def report(*tensors: TensorReport) -> VerifyReport:
    outputs = (output("a", 40.0, 0.9), output("b", 25.0, None), output("c", math.inf, 0.75))
    level = LevelReport(
        name="deployed",
        simulation="exact simulation",
        runtime="all optimisations",
        tensors=tensors,
        outputs=outputs,
    )
    return VerifyReport(
        specification=level,
        deployed=level,
        quantization=outputs,
        skipped=(SkippedTensor(name="z[1]", reason="is a constant"),),
        notes=("a note",),
        batches=2,
    )


def test_a_level_adds_up_its_tensors_and_takes_the_worst_output() -> None:
    level = report(tensor("p", 0), tensor("q", 5, 2.0), tensor("r", 1)).deployed
    assert (level.differing, level.elements, level.fraction) == (6, 300, 0.02)
    assert (level.worst_step, level.first_differing) == (2.0, "q")
    assert (level.sqnr, level.top1_agreement) == (25.0, 0.75)


def test_limits_decide_what_passes() -> None:
    found = report(tensor("p", 5))
    assert not found.passed()
    assert found.passed(max_differing=0.05)
    assert found.passed(max_differing=0.05, min_sqnr=25.0)
    assert not found.passed(max_differing=0.05, min_sqnr=25.1)
    assert not found.passed(max_differing=0.049)


def test_where_no_codes_were_compared_output_values_decide() -> None:
    assert not report().passed()
    assert report().passed(max_differing=0.3)


@pytest.mark.parametrize("made", [report(), report(tensor("p", 0), tensor("q", 5, math.inf))])
def test_json_gives_the_report_back(made: VerifyReport, tmp_path) -> None:
    made.to_json(tmp_path / "report.json")
    assert VerifyReport.from_json(tmp_path / "report.json") == made
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=pytest.fail)  # Infinity and NaN are not JSON


def test_json_of_a_real_report_gives_it_back(make_pair) -> None:
    pair = make_pair({"h": (0.06, 0)})
    made = verify(pair.model, pair.path, pair.batches, progress=False)
    assert VerifyReport.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_derived_figures_are_in_the_json() -> None:
    values = report(tensor("p", 5)).to_dict()
    assert values["deployed"]["first_differing"] == "p"
    assert values["deployed"]["fraction"] == 0.05
    assert values["differing_codes"] == 5
    assert values["passed"] is False


def test_a_report_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        report().batches = 3  # type: ignore[misc]


def test_the_table_names_what_differs_and_what_was_not_compared() -> None:
    text = str(report(tensor("equal", 0), tensor("[bold]layer", 5, 2.0)))
    assert "5 of 200 codes differ (0.025), in 1 of 2 tensors; largest difference 2 steps" in text
    assert "[bold]layer" in text
    assert " equal" not in text
    assert "1: is a constant (z[1])" in text
    assert "note: a note" in text
    assert "\x1b" not in text


def test_a_long_table_is_cut_and_says_so() -> None:
    text = str(report(*(tensor(f"t{i}", 1) for i in range(50))))
    assert "t19" in text
    assert "t20" not in text
    assert "… and 30 more" in text
