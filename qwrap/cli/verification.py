"""``qwrap verify``: which function judges two files, and which figures fail it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Report(Protocol):
    """What the shell reads of a verification report.

    Attributes:
        differing_codes: elements of quantized tensors whose code differs from onnxruntime's.
        codes: all elements of quantized tensors.
        sqnr: of the outputs against onnxruntime's, in dB.
    """

    differing_codes: int
    codes: int
    sqnr: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Limits on a report; None sets none."""

    max_differing: float | None = None
    min_sqnr: float | None = None

    def failures(self, report: Report) -> list[str]:
        """Return one line for every limit that ``report`` breaks."""
        found = []
        differing = report.differing_codes / max(report.codes, 1)
        if self.max_differing is not None and not differing <= self.max_differing:
            found.append(f"differing codes: {differing:.3g} of all, limit {self.max_differing:.3g}")
        if self.min_sqnr is not None and not report.sqnr >= self.min_sqnr:
            found.append(f"SQNR: {report.sqnr:.1f} dB, limit {self.min_sqnr:.1f} dB")
        return found


def verify_quantized(model: Path, quantized: Path, batches: Iterable[Any]) -> Report:
    """Return the report on the file ``quantized``, made of the file ``model``."""
    from qwrap.verify import verify_files

    report: Report = verify_files(model, quantized, batches)
    return report
