"""One user's script, run with onnxruntime.quantization or with qwrap.ort: the import decides."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

INCUMBENT, OWN = "onnxruntime.quantization", "qwrap.ort"
Batch = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Setting:
    """What a script asks for.

    Attributes:
        form: QDQ, QOperator or dynamic.
        activation: name of a ``QuantType``.
        weight: name of a ``QuantType``.
        method: name of a ``CalibrationMethod``.
        per_channel: scales per channel of weights.
        reduce_range: a bit less for weights.
        options: ``extra_options``, or a function of the module that makes them.
        arguments: further arguments of ``quantize_static`` or ``quantize_dynamic``.
    """

    form: str = "QDQ"
    activation: str = "QUInt8"
    weight: str = "QInt8"
    method: str = "MinMax"
    per_channel: bool = False
    reduce_range: bool = False
    options: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [self.form, f"{self.activation}/{self.weight}", self.method]
        parts += [name for name in ("per_channel", "reduce_range") if getattr(self, name)]
        options = {} if callable(self.options) else self.options
        parts += [f"{key}={value}" for key, value in {**options, **self.arguments}.items()]
        return "-".join(parts)


class Reader:
    """``get_next`` until there is nothing left; strides by ``set_range``."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = list(batches)
        self._position, self._stop = 0, len(self._batches)

    def get_next(self) -> Batch | None:
        """Return the next batch, or None after the last."""
        if self._position >= self._stop:
            return None
        self._position += 1
        return self._batches[self._position - 1]

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Batch:
        batch = self.get_next()
        if batch is None:
            raise StopIteration
        return batch

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Give the batches from ``start_index`` to before ``end_index`` next."""
        self._position, self._stop = start_index, min(end_index, len(self._batches))


def quantize(
    module: str,
    source: str | os.PathLike[str] | onnx.ModelProto,
    batches: Sequence[Batch],
    output: Path,
    setting: Setting,
) -> onnx.ModelProto:
    """Run the script with that module, and read what it wrote."""
    ort = importlib.import_module(module)
    arguments: dict[str, Any] = {
        "per_channel": setting.per_channel,
        "reduce_range": setting.reduce_range,
        "weight_type": ort.QuantType[setting.weight],
        "extra_options": dict(_options(setting, ort)),
        **setting.arguments,
    }
    with quiet(module):
        if setting.form == "dynamic":
            ort.quantize_dynamic(source, output, **arguments)
        else:
            _quantize_static(ort, source, output, Reader(batches), setting, arguments)
    return onnx.load(output)


def _options(setting: Setting, ort: ModuleType) -> Mapping[str, Any]:
    """Extra options; those that name the module's types come from a function of the module."""
    return setting.options(ort) if callable(setting.options) else setting.options


def _quantize_static(
    ort: ModuleType,
    source: Any,
    output: Path,
    reader: Reader,
    setting: Setting,
    arguments: dict[str, Any],
) -> None:
    methods = importlib.import_module(f"{ort.__name__}.calibrate").CalibrationMethod
    ort.quantize_static(
        source,
        output,
        reader,
        quant_format=ort.QuantFormat[setting.form],
        activation_type=ort.QuantType[setting.activation],
        calibrate_method=methods[setting.method],
        **arguments,
    )


@contextlib.contextmanager
def quiet(module: str) -> Iterator[None]:
    """Keep what onnxruntime's tool prints and logs to the root logger out of the way."""
    if module != INCUMBENT:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), corrected_percentile():
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def corrected_percentile() -> Iterator[None]:
    """Let the incumbent's percentile thresholds take the right edge of the bin they fall into.

    It searches the cumulated counts, which end at the right edges, and then reads the left one:
    its upper threshold is a bin short, and the 100th percentile is not the maximum.
    """
    collector = importlib.import_module(f"{INCUMBENT}.calibrate").HistogramCollector
    before: Callable[[Any], dict[str, tuple[Any, ...]]] = collector.compute_percentile
    collector.compute_percentile = _compute_percentile
    try:
        yield
    finally:
        collector.compute_percentile = before


def _compute_percentile(collector: Any) -> dict[str, tuple[Any, ...]]:
    found = {}
    for name, (counts, edges, low, high, *_) in collector.histogram_dict.items():
        shares = np.cumsum(counts / counts.sum())
        cut = (100.0 - collector.percentile) / (100.0 if collector.symmetric else 200.0)
        last = len(counts) - 1
        top = edges[min(int(np.searchsorted(shares, 1.0 - cut)), last) + 1]
        bottom = -top if collector.symmetric else edges[int(np.searchsorted(shares, cut))]
        bounds = (max(bottom, low), min(top, high))
        limits = (np.array(value, dtype=edges.dtype) for value in bounds)
        found[name] = (*limits, counts, edges)
    return found
