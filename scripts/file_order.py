"""One file to be made by a process of its own: what it is told, and what it prints about it."""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from process_memory import peak_bytes
from sample_folder import SampleFolder

EFFORTS = ("plain", "default", "high")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What file to make.

    Attributes:
        source: the float file.
        target: the QDQ file to write.
        samples: folder of calibration samples.
        weight: bits of weights.
        activation: bits of activations.
        effort: "plain", calibration alone; "default", what the tool does unasked; "high", the best
            of its post-training algorithms.
    """

    source: Path
    target: Path
    samples: Path
    weight: int = 8
    activation: int = 8
    effort: str = "default"

    @property
    def data(self) -> SampleFolder:
        """The calibration samples."""
        return SampleFolder(self.samples)

    def arguments(self) -> list[str]:
        """The order as arguments of a command."""
        return [f"--{name}={value}" for name, value in asdict(self).items()]


@dataclass(slots=True, kw_only=True)
class Report:
    """What became of an order.

    Attributes:
        seconds: from the file read to the file written; libraries were loaded before.
        processor: the same in time of all processors.
        peak: the most bytes that the process held, libraries included.
        version: of the tool.
        notes: what the tool says it did.
        error: one line; empty where the file was made.
    """

    seconds: float = 0.0
    processor: float = 0.0
    peak: int = 0
    version: str = ""
    notes: list[str] = field(default_factory=list)
    error: str = ""


def one_line(error: BaseException) -> str:
    """An error as one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def processor_seconds() -> float:
    """Time that processors spent on this process, and on those it started that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def serve(make: Callable[[Order], list[str] | None], version: str) -> None:
    """Carry out the order on the command line and print the report as one line of JSON.

    Args:
        make: writes the file; returns notes, if any.
        version: of the tool.
    """
    order = _order()
    report = Report(version=version)
    start, spent = time.perf_counter(), processor_seconds()
    try:
        report.notes = list(make(order) or ())
    except Exception as error:  # whatever the tool raises is a finding
        traceback.print_exc()
        report.error = one_line(error)
    report.seconds = time.perf_counter() - start
    report.processor = processor_seconds() - spent
    report.peak = peak_bytes()
    print(json.dumps(asdict(report)), flush=True)


def _order() -> Order:
    parser = argparse.ArgumentParser(description="make one quantized file, print a report as JSON")
    parser.add_argument("--source", type=Path, required=True, help="float ONNX file")
    parser.add_argument("--target", type=Path, required=True, help="QDQ file to write")
    parser.add_argument("--samples", type=Path, required=True, help="folder of .npz files")
    parser.add_argument("--weight", type=int, default=8, choices=(8, 4), help="bits")
    parser.add_argument("--activation", type=int, default=8, choices=(8, 4), help="bits")
    parser.add_argument("--effort", default="default", choices=EFFORTS)
    return Order(**vars(parser.parse_args()))
