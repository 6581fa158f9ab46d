"""The README says of each format what ONNX and onnxruntime say."""

from __future__ import annotations

import format_table
import onnxruntime
import pytest

from qwrap.dtypes import FLOATS, INTEGERS, quant_type


def lines() -> dict[str, list[str]]:
    """Type -> cells of its line in the README."""
    text = format_table.README.read_text(encoding="utf-8")
    section = text.split("<!-- formats -->")[1].split("<!-- /formats -->")[0]
    assert f"onnxruntime {onnxruntime.__version__} " in section
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    return {cells[0]: cells[1:] for cells in rows}


@pytest.mark.parametrize("name", [t.name for t in (*INTEGERS, *FLOATS)])
def test_the_readme_has_what_is_measured(name: str, monkeypatch) -> None:
    if name not in ("uint8", "int4", "float8e4m3fn"):  # these cost a second each
        monkeypatch.setattr(format_table, "kernel_of", lambda *_: "?")
    monkeypatch.setattr(format_table, "INTEGERS", (quant_type(name),))
    monkeypatch.setattr(format_table, "FLOATS", ())
    (row,) = format_table.rows()
    cells = format_table.table([row]).splitlines()[-1].strip("| ").split(" | ")
    known = len(cells) - 3 if row.activation == "?" else len(cells)
    assert cells[1:known] == lines()[name][: known - 1]


def test_the_readme_has_the_scales() -> None:
    for line in format_table.scales().splitlines()[2:]:
        name, *cells = line.strip("| ").split(" | ")
        assert lines()[name] == cells
