"""What a sensitivity analysis found."""

import builtins
import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr

import qwrap
from qwrap.errors import ConfigError, ExportError, StatisticsError
from qwrap.mixed.choices import FLOAT, Choice, Group

U8, U4 = Choice("uint8", "int8"), Choice("uint8", "int4")
LOSSES = {
    ("/a", U8): 0.1, ("/a", U4): 0.4, ("/a", FLOAT): 0.0,
    ("/b", U8): 0.3, ("/b", U4): 0.35, ("/b", FLOAT): 0.0,
    ("/c", U8): 0.2, ("/c", FLOAT): 0.0,
}  # fmt: skip


def made(losses: dict[Any, float] | None = None, **changes: Any) -> qwrap.Sensitivity:
    groups = tuple(Group(name, (name,), (U8, U4, FLOAT)) for name in ("/a", "/b", "/c"))
    fields: dict[str, Any] = {
        "losses": LOSSES if losses is None else losses,
        "groups": groups,
        "by": "layer",
        "method": "measured",
        "measure": "kl",
        "rest": "float",
        "samples": 64,
        "outputs": {"y": "kl"},
        "everything": {U8: 0.5, U4: 1.5},
    }
    return qwrap.Sensitivity(**{**fields, **changes})


def test_the_most_sensitive_group_is_first() -> None:
    assert made().ranking(U8) == ["/b", "/c", "/a"]
    assert made().ranking(U4) == ["/a", "/b"]
    assert made().ranking() == ["/a", "/b", "/c"]  # by .4, .35, .2


def test_an_unknown_choice_has_no_ranking() -> None:
    with pytest.raises(ConfigError, match="no losses for choice uint16/int8; there are uint8/int8"):
        made().ranking(Choice("uint16", "int8"))


def test_spearman_is_that_of_scipy() -> None:
    other = {("/a", U8): 5.0, ("/b", U8): 5.0, ("/c", U8): 4.0, ("/b", U4): 9.0}
    keys = [key for key in LOSSES if key in other]
    wanted = spearmanr([LOSSES[k] for k in keys], [other[k] for k in keys]).statistic
    assert made().spearman(other) == pytest.approx(wanted)
    keys = [key for key in keys if key[1] == U8]
    wanted = spearmanr([LOSSES[k] for k in keys], [other[k] for k in keys]).statistic
    assert made().spearman(made(other), U8) == pytest.approx(wanted)


def test_what_has_no_ranks_cannot_be_compared() -> None:
    with pytest.raises(ConfigError, match="1 losses in common"):
        made().spearman({("/a", U8): 1.0})
    with pytest.raises(ConfigError, match="all losses of one analysis are equal"):
        made().spearman(dict.fromkeys(LOSSES, 1.0))


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    infinite = {("/a", U8): -math.inf, ("/b", U8): -31.5, ("/c", U8): math.inf}
    for found in (made(), made(infinite, measure="sqnr", everything={})):
        found.save(tmp_path / "s.json")
        assert qwrap.Sensitivity.load(tmp_path / "s.json") == found
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


def test_a_file_is_standard_json(tmp_path: Path) -> None:
    made({("/a", U8): -math.inf}).save(tmp_path / "s.json")

    def refuse(text: str) -> None:
        raise AssertionError(text)

    content = json.loads((tmp_path / "s.json").read_text(), parse_constant=refuse)
    assert content["losses"] == [["/a", "uint8/int8", "-inf"]]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for write in (made().save, made().plot):
        with pytest.raises(ExportError, match="does not exist"):
            write(tmp_path / "none" / "s.png")


def damaged(**changes: Any) -> str:
    return json.dumps({**made().to_dict(), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "no sensitivity analysis"),
        ('{"format": "qwrap statistics"}', "no sensitivity analysis"),
        (damaged(version=2), "version 2 of the format"),
        (damaged(losses=[["/a", "uint8/int8"]]), "damaged"),
        (damaged(losses=[["/a", "octet/int8", 1.0]]), "damaged"),
        (damaged(losses=[["/a", "uint8/int8", "many"]]), "damaged"),
        (damaged(losses=[["/a", "uint8/int8", True]]), "damaged"),
        (damaged(groups=7), "damaged"),
        (damaged(by=None), "damaged"),
        (damaged(outputs=[]), "damaged"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(StatisticsError, match=rf"s\.json: .*{message}"):
        qwrap.Sensitivity.load(tmp_path / "s.json")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match="cannot be read"):
        qwrap.Sensitivity.load(tmp_path / "s.json")


def test_the_table_has_a_row_for_each_group() -> None:
    lines = str(made()).splitlines()
    assert lines[0] == "measured, each layer alone quantized, 64 samples; divergence in nats"
    assert lines[1].split() == ["layer", "uint8/int8", "uint8/int4"]
    assert [line.split()[:3] for line in lines[2:4]] == [
        ["/a", "0.1", "0.4"],
        ["/b", "0.3", "0.35"],
    ]
    assert lines[4].split()[:2] == ["/c", "0.2"]
    assert [line.count("█") for line in lines[2:5]] == [24, 21, 12]
    assert lines[5] == "all of them in uint8/int8: 0.5"
    assert "… and 2 more" in made().summary(most=1)


def test_names_with_brackets_are_shown_as_they_are() -> None:
    text = made({("/a[0]/[bold]x", U8): 1.0}, groups=()).summary()
    assert "/a[0]/[bold]x" in text


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_plot_is_written(tmp_path: Path, ending: str) -> None:
    made().plot(tmp_path / f"s.{ending}")
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert (tmp_path / f"s.{ending}").read_bytes().startswith(start)


def test_a_plot_can_hold_losses_that_are_negative_or_infinite(tmp_path: Path) -> None:
    made({("/a", U8): -0.5, ("/b", U8): 1.0}, rest="quantized").plot(tmp_path / "a.svg")
    made({("/a", U8): -math.inf, ("/b", U8): -31.0}, measure="sqnr").plot(tmp_path / "b.svg")


def test_an_unknown_form_of_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no image form 'txt'; choose one of .*png"):
        made().plot(tmp_path / "s.txt")


def test_without_matplotlib_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install qwrap\[plot\]"):
        made().plot(tmp_path / "s.png")
