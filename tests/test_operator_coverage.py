"""The table of operators in the README, against the registry."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
from operator_coverage import revisions, table

README = Path(__file__).resolve().parents[1] / "README.md"


def test_every_revision_of_the_standard_domain_is_computed_without_onnxruntime() -> None:
    left = [r for r in revisions() if not r.domain and r.way in ("onnxruntime", "refused")]
    assert not left


def test_the_readme_shows_the_table_of_these_versions() -> None:
    text = README.read_text(encoding="utf-8")
    if f"onnx {onnx.__version__} (" not in text or onnxruntime.__version__ not in text:
        pytest.skip("the table is of other versions of onnx and onnxruntime")
    assert table(revisions()) in text
