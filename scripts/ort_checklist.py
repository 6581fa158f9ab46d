#!/usr/bin/env python3
"""Name the tests behind every row of onnxruntime's feature list, and behind every defect.

Usage:

    python scripts/ort_checklist.py            # a line per row; exit 1 where one has neither
    python scripts/ort_checklist.py --missing  # the rows without a test alone

A test says what it covers with ``@pytest.mark.ort(182, "G1")``. The rows are those of
``ORT_CHECKLIST.csv``, the defects those of section c of ``ORT_FEATURES.md``, in the folder that
``QWRAP_SHARED`` names.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from shared_models import default_folder

ROOT = Path(__file__).resolve().parents[1]

LEFT_OUT: Mapping[str, str] = {}
"""Rows and defects without a test, and why."""


@dataclass(frozen=True)
class Row:
    """One feature or defect of the list."""

    id: str
    area: str
    feature: str


class Marks:
    """A pytest plugin that notes which tests bear which mark."""

    def __init__(self) -> None:
        self.tests: dict[str, list[str]] = defaultdict(list)

    def pytest_collection_modifyitems(self, items: Sequence[pytest.Item]) -> None:
        """Note every test under the rows it says it covers."""
        for item in items:
            name = item.nodeid.split("[")[0]
            for mark in item.iter_markers("ort"):
                for row in map(str, mark.args):
                    if name not in self.tests[row]:
                        self.tests[row].append(name)


def collect(folders: Sequence[str]) -> Marks:
    """Collect the tests of ``folders`` without running them."""
    marks, output = Marks(), io.StringIO()
    with contextlib.redirect_stdout(output):
        arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
        code = pytest.main([*arguments, *folders], plugins=[marks])
    if code not in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}:
        raise SystemExit(f"tests could not be collected:\n{output.getvalue()[-3000:]}")
    return marks


def read_rows(folder: Path) -> list[Row]:
    """Read the features, then the defects."""
    with (folder / "ORT_CHECKLIST.csv").open(newline="", encoding="utf8") as file:
        rows = [Row(row["id"], row["area"], row["feature"]) for row in csv.DictReader(file)]
    text = (folder / "ORT_FEATURES.md").read_text(encoding="utf8")
    found = re.findall(r"^\| (G\d+) \| (.*?) \|[^|]*\| ([VR][^|]*) \|$", text, re.MULTILINE)
    return rows + [Row(name, f"defect ({seen.strip()})", what) for name, what, seen in found]


def report(rows: Sequence[Row], tests: Mapping[str, Sequence[str]], missing: bool) -> int:
    """Print a line per row and return how many have neither test nor reason."""
    lacking = 0
    for row in rows:
        covered = tests.get(row.id, ())
        answer = ", ".join(covered[:3]) + (f" and {len(covered) - 3} more" if covered[3:] else "")
        if not covered:
            answer = f"left out: {LEFT_OUT[row.id]}" if row.id in LEFT_OUT else "NO TEST"
            lacking += row.id not in LEFT_OUT
        if not missing:
            print(f"{row.id:>4}  {row.area:18} {answer}")
        elif not covered:
            print(f"{row.id:>4}  {row.area:18} {answer}: {row.feature[:80]}")
    print(f"{len(rows)} rows, {lacking} without a test or a reason")
    return lacking


def main() -> None:
    """Check the list."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=default_folder())
    parser.add_argument("--missing", action="store_true", help="only rows without a test")
    parser.add_argument("folders", nargs="*", default=[str(ROOT / "tests")])
    arguments = parser.parse_args()
    rows = read_rows(arguments.shared)
    marks = collect(arguments.folders)
    unknown = sorted(marks.tests.keys() - {row.id for row in rows})
    if unknown:
        print(f"marks that name no row: {', '.join(unknown)}")
    sys.exit(bool(report(rows, marks.tests, arguments.missing) or unknown))


if __name__ == "__main__":
    main()
