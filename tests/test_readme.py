"""The README's Python runs as it stands, and its commands are where the CI looks for them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch

import qwrap
from qwrap.data import read_preprocessing
from qwrap.demo import batches, digits, model_path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(model_path(), tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    loader = [[torch.from_numpy(array[:16]) for array in digits("train")]]
    names = {"qwrap": qwrap, "batches": batches("calibration", 16)[:2], "loader": loader}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "model.int8.onnx").exists()
    float_file, tuned = (onnx.load(tmp_path / f) for f in ("model.onnx", "model.tuned.onnx"))
    pairs = zip(float_file.graph.initializer, tuned.graph.initializer, strict=True)
    assert [old.name for old, new in pairs if old != new] == ["head.weight", "head.bias"]


def test_the_preprocessing_file_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    (tmp_path / "p.json").write_text(block, encoding="utf-8")
    assert read_preprocessing(str(tmp_path / "p.json")).size == (256, 256)


def test_the_five_lines_stand_before_line_30() -> None:
    head = "\n".join(README.splitlines()[:29])
    for verb in ("load", "prepare", "calibrate", "export", "verify"):
        assert f"qwrap.{verb}(" in head


@pytest.mark.parametrize("name", ["demo", "tests"])
def test_the_ci_finds_each_command(name: str) -> None:
    pattern = rf"^<!-- command: {name} -->\n```sh\n.*pip install -c constraints\.txt .*\n```$"
    assert re.search(pattern, README, re.MULTILINE)


def test_importing_qwrap_leaves_the_shells_packages_alone() -> None:
    code = "import sys, qwrap; print(sorted({'typer', 'rich', 'PIL'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0)
