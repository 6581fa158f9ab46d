"""The benchmark's results as a Markdown table, and its place in the README."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import FileResult, ModelResult

_NONE = "\N{EN DASH}"
_SECTION = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)
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
    "top-1 agreement",
)


def markdown(models: Sequence[ModelResult]) -> str:
    """One row per model; where a cell holds two figures, they are qwrap's and onnxruntime's."""
    rows = [_HEADER, ("---",) * len(_HEADER), *map(_row, models)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def update_readme(path: Path, table: str) -> None:
    """Replace what stands between the two ``results`` comments of ``path``.

    Raises:
        SystemExit: the comments are missing.
    """
    text = path.read_text(encoding="utf8")
    if not _SECTION.search(text):
        raise SystemExit(f"{path}: found no <!-- results --> … <!-- /results --> to write between")
    new = _SECTION.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)
    path.write_text(new, encoding="utf8")


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
        _codes(model.verify),
        _figure(model.verify, "sqnr_dB", ".1f"),
        _figure(model.verify, "top1_agreement", ".3f"),
    )


def _metric(model: ModelResult, file: FileResult | None) -> str:
    return f"{file.metric[model.metric]:.3f}" if file and file.metric else _NONE


def _pair(own: FileResult | None, best: FileResult | None, cell: Any) -> str:
    return " / ".join(cell(file) if file and file.metric else _NONE for file in (own, best))


def _latency(file: FileResult, threads: str) -> str:
    return f"{file.latency[threads]:.2f}" if threads in file.latency else _NONE


def _codes(verify: dict[str, Any]) -> str:
    differing, codes = verify.get("differing_codes"), verify.get("codes")
    return _NONE if differing is None or codes is None else f"{differing} of {codes}"


def _figure(verify: dict[str, Any], name: str, form: str) -> str:
    value = verify.get(name)
    return _NONE if value is None else format(value, form)
