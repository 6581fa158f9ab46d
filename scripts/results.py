"""What the model benchmark measured: one record per file, one per model, and their JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True, kw_only=True)
class FileResult:
    """One ONNX file and what was measured on it; ``error`` says why there is nothing.

    Attributes:
        method: ``float``, ``qwrap`` or the incumbent's calibration method.
        preparation: what the incumbent was given: the file as it is, or pre-processed.
        per_channel: whether weights have one scale per output channel.
        file: path of the file; empty when none was made.
        size: bytes.
        metric: what the task metric of the model says, its first entry counts.
        quantize_left: QuantizeLinear nodes left after onnxruntime's optimisation.
        dequantize_left: the same for DequantizeLinear.
        latency: threads -> time over the float file's in interleaved rounds.
        fastest_latency: the same between the fastest bursts of all rounds.
        milliseconds: threads -> median time of one run.
        seconds: time that quantizing took.
        processor: the same in time of all processors, which other work disturbs less.
        peak: the most bytes that the process held for it, where it had one of its own.
        error: one line: what failed, or what had to be done otherwise; empty when all went well.
    """

    method: str
    preparation: str = ""
    per_channel: bool = True
    file: str = ""
    size: int = 0
    metric: dict[str, float] = field(default_factory=dict)
    quantize_left: int = 0
    dequantize_left: int = 0
    latency: dict[str, float] = field(default_factory=dict)
    fastest_latency: dict[str, float] = field(default_factory=dict)
    milliseconds: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    processor: float = 0.0
    peak: int = 0
    error: str = ""

    @property
    def exists(self) -> bool:
        """Whether there is a file to measure."""
        return bool(self.file) and Path(self.file).is_file()


@dataclass(slots=True, kw_only=True)
class ModelResult:
    """One model: the float file, the incumbent's attempts, qwrap's file and its verify figures."""

    model: str
    samples: int
    reference: FileResult
    incumbent: list[FileResult] = field(default_factory=list)
    qwrap: FileResult | None = None
    verify: dict[str, Any] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """Name of the task metric."""
        return next(iter(self.reference.metric))

    def best_incumbent(self, preparation: str | None = None) -> FileResult | None:
        """The attempt with the best task metric, of equals the smallest; None when all failed."""
        done = [
            attempt
            for attempt in self.incumbent
            if attempt.metric and preparation in {None, attempt.preparation}
        ]
        sign = -1 if self.metric.startswith("perplexity") else 1
        return max(
            done,
            key=lambda attempt: (sign * attempt.metric[self.metric], -attempt.size),
            default=None,
        )


def write(path: Path, settings: dict[str, Any], models: Iterable[ModelResult]) -> None:
    """Write all results as JSON."""
    record = {"settings": settings, "models": [asdict(model) for model in models]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")


def read(path: Path) -> dict[str, ModelResult]:
    """Results by model name from a file that :func:`write` made."""
    records = json.loads(path.read_text(encoding="utf8"))["models"]
    return {record["model"]: _model(record) for record in records}


def _model(record: dict[str, Any]) -> ModelResult:
    files = {
        "reference": FileResult(**record["reference"]),
        "incumbent": [FileResult(**attempt) for attempt in record["incumbent"]],
        "qwrap": FileResult(**record["qwrap"]) if record["qwrap"] else None,
    }
    return ModelResult(**{**record, **files})
