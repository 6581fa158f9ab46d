"""What the shell shows of a verification, and which figures fail it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from qwrap.verify import FilesReport, LevelReport, VerifyReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Limits on a verification; None sets none.

    Attributes:
        max_differing: largest share of differing codes.
        min_sqnr: lowest SQNR of an output of the quantized file against the float model, in dB.
    """

    max_differing: float | None = None
    min_sqnr: float | None = None

    def failures(self, *, differing: float, sqnr: float) -> list[str]:
        """Return one line for every limit that the figures break."""
        found = []
        if self.max_differing is not None and not differing <= self.max_differing:
            found.append(f"differing codes: {differing:.3g} of all, limit {self.max_differing:.3g}")
        if self.min_sqnr is not None and not sqnr >= self.min_sqnr:
            found.append(f"SQNR: {sqnr:.1f} dB, limit {self.min_sqnr:.1f} dB")
        return found


class FirstBatches:
    """Passes batches on and keeps the first ``count`` of them, for a check after their use."""

    def __init__(self, batches: Iterable[Any], count: int) -> None:
        self._batches, self._count = batches, count
        self.kept: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        room = 0 if self.kept else self._count  # a second reading has nothing new
        for batch in self._batches:
            if len(self.kept) < room:
                self.kept.append(batch)
            yield batch


def verify_summary(report: VerifyReport, files: FilesReport) -> str:
    """Return in five lines what ``report`` says of the simulation, and ``files`` of the result.

    The float file, not the float model in ``report``, is what the result is held against: biases
    of the model may have been corrected since it was loaded.
    """
    batches = f"{report.batches} batch{'' if report.batches == 1 else 'es'}"
    lines = [
        f"verified against onnxruntime on {batches} of the calibration data",
        f"  exact simulation, file as deployed:    {_level(report.deployed)}",
        f"  training simulation, file as written:  {_level(report.specification)}",
        f"  quantized file against float file:     {_closeness(files)}",
    ]
    return "\n".join([*lines, *(f"  note: {note}" for note in report.notes)])


def _level(level: LevelReport) -> str:
    return f"{_closeness(level)}; {level.differing} of {level.elements} codes differ"


def _closeness(found: LevelReport | FilesReport) -> str:
    top1 = found.top1_agreement
    agreement = "" if top1 is None else f", same top-1 {top1:.2%}"
    return f"SQNR {found.sqnr:.1f} dB{agreement}"
