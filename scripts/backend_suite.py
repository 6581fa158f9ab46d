"""onnx's own backend suite, run by its own runner on ``qwrap.backend``."""

from __future__ import annotations

import io
import unittest
import warnings
from dataclasses import dataclass, field
from typing import Any

from onnx.backend.test import BackendTest

import qwrap.backend
from qwrap.errors import ModelError

DOWNLOADED = "Real"  # a class of cases that fetch their models
CPU = "_cpu"


@dataclass(slots=True)
class Verdicts:
    """Names of cases by what became of them."""

    passed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many cases ran."""
        return len(self.passed) + len(self.refused) + len(self.differing)


class _Recorder(unittest.TestResult):
    """Sorts cases: a ModelError refuses one, any other exception makes it differ."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.verdicts = Verdicts()

    def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802 -- unittest's name
        self.verdicts.passed.append(_name(test))

    def addError(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        is_refused = isinstance(err[1], ModelError)
        (self.verdicts.refused if is_refused else self.verdicts.differing).append(_name(test))

    addFailure = addError  # noqa: N815


def _name(test: unittest.TestCase) -> str:
    return test.id().rpartition(".")[2].removesuffix(CPU)


def run_suite() -> Verdicts:
    """Run the cases that need no download, on the CPU."""
    recorder = _Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some cases overflow or divide by zero on purpose
        cases = BackendTest(qwrap.backend, __name__).test_cases
        for name, case in cases.items():
            if DOWNLOADED not in name:
                wanted = (n for n in vars(case) if n.startswith("test_") and n.endswith(CPU))
                unittest.TestSuite(map(case, wanted)).run(recorder)
    return recorder.verdicts
