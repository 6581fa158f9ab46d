"""Runs a process that carries out a file order, and reads its report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from file_order import Order, Report

_SCRIPTS = Path(__file__).resolve().parent


def carry_out(
    command: Sequence[str], order: Order, timeout: float, environment: Mapping[str, str]
) -> Report:
    """Run ``command`` with the order as its arguments; a failure is part of the report.

    Args:
        command: a Python and what it runs, which calls ``file_order.serve``.
        order: its paths are absolute: the process runs where tools may leave files.
        timeout: seconds after which the process is ended.
        environment: variables beside those of this process.
    """
    with tempfile.TemporaryDirectory() as scratch:
        process = subprocess.Popen(
            [*command, *order.arguments()],
            cwd=scratch,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that what it starts itself ends with it
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _end(process)
            return Report(seconds=timeout, error=f"not done after {timeout:.0f} s")
        except BaseException:
            _end(process)
            raise
    return _report(out) or Report(error=_reason(process.returncode, err))


def own_environment() -> dict[str, str]:
    """What lets a process import the modules of this folder, and those of this process."""
    given = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(_SCRIPTS), given)))}


def foreign_environment() -> dict[str, str]:
    """What lets the Python of another environment import the modules of this folder alone."""
    return {"PYTHONPATH": str(_SCRIPTS)}


def _end(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _report(out: str) -> Report | None:
    """The last line that is a report; tools print lines of their own."""
    for line in reversed(out.splitlines()):
        if line.startswith('{"seconds"'):
            return Report(**json.loads(line))
    return None


def _reason(code: int, err: str) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = [line for line in err.splitlines() if line.strip()]
    return (lines[-1].strip() if lines else f"ended with {code} and no report")[:300]
