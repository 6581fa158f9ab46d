"""The benchmark's results as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from results import FileResult, ModelResult

_NONE = "\N{EN DASH}"
_HEADER = (
    "model (metric)",
    "float",
    "onnxruntime's best",
    "qwrap",
    "size",
    "latency, 1 thread",
    "2 threads",
    "Q + DQ left",
    "codes that differ",
    "SQNR, dB",
)


def markdown(models: Sequence[ModelResult]) -> str:
    """One row per model.

    Size and latency are over the float file's; where such a cell holds two figures, they are
    qwrap's and onnxruntime's. The last two columns are of ``qwrap.verify``: codes of the exact
    simulation against the deployed file, outputs of both levels, specification first.
    """
    rows = [_HEADER, ("---",) * len(_HEADER), *map(_row, models)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(model: ModelResult) -> tuple[str, ...]:
    best, own = model.best_incumbent(), model.qwrap
    return (
        f"{model.model} ({model.metric})",
        _metric(model, model.reference),
        f"{_metric(model, best)} ({best.method})" if best else _NONE,
        _metric(model, own),
        _pair(own, best, lambda file: f"{file.size / model.reference.size:.2f}"),
        _pair(own, best, lambda file: _latency(file, "1")),
        _pair(own, best, lambda file: _latency(file, "2")),
        _pair(own, best, lambda file: f"{file.quantize_left} + {file.dequantize_left}"),
        _codes(model.verify.get("deployed", {})),
        " / ".join(_sqnr(model.verify.get(name, {})) for name in ("specification", "deployed")),
    )


def _metric(model: ModelResult, file: FileResult | None) -> str:
    return f"{file.metric[model.metric]:.3f}" if file and file.metric else _NONE


def _pair(own: FileResult | None, best: FileResult | None, cell: Any) -> str:
    return " / ".join(cell(file) if file and file.metric else _NONE for file in (own, best))


def _latency(file: FileResult, threads: str) -> str:
    return f"{file.latency[threads]:.2f}" if threads in file.latency else _NONE


def _codes(level: dict[str, Any]) -> str:
    return f"{level['differing_codes']} of {level['codes']}" if level.get("codes") else _NONE


def _sqnr(level: dict[str, Any]) -> str:
    return f"{level['sqnr_dB']:.1f}" if level else _NONE
