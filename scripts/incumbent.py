"""onnxruntime's own ``quantize_static``, given every chance: what qwrap is compared with."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import onnx
import onnxruntime
from file_order import one_line, processor_seconds
from onnx import version_converter
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from process_memory import peak_bytes
from results import FileResult
from shared_models import Inputs

METHODS = ("MinMax", "Percentile", "Entropy")
PREPARATIONS = ("as is", "pre-processed")

_PER_CHANNEL_OPSET = 13  # the attribute ``axis`` of QuantizeLinear came with it


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    def __init__(self, samples: Sequence[Inputs]) -> None:
        self._samples: Iterator[Inputs] = iter(samples)

    def get_next(self) -> Inputs | None:
        return next(self._samples, None)


def attempt(
    source: Path,
    folder: Path,
    samples: Sequence[Inputs],
    method: str,
    preparation: str,
    types: tuple[str, str] = ("QUInt8", "QInt8"),
) -> FileResult:
    """Quantize ``source`` into ``folder``: QDQ, by default U8 activations and S8 weights.

    Per channel at opset 13 or later; where that gives no file that runs, per tensor at the file's
    own opset. In a process of its own, since histogram calibration keeps every activation of every
    sample and may run out of memory.

    Args:
        source: the float file.
        folder: where the quantized file and its prepared source go.
        samples: calibration samples; the first also proves that the result runs.
        method: one of METHODS.
        preparation: one of PREPARATIONS.
        types: names of ``QuantType`` for activations and weights.
    """
    result = FileResult(method=method, preparation=preparation)
    errors = []
    for per_channel in (True, False):
        name = f"{source.stem}.{preparation}.{method}.{'channel' if per_channel else 'tensor'}.onnx"
        target = folder / name.replace(" ", "_")
        try:
            result.seconds, result.processor, result.peak = _in_process(
                source, target, list(samples), method, preparation, per_channel, types
            )
        except Exception as error:  # whatever it raises is a finding about the incumbent
            errors.append(f"{'per channel' if per_channel else 'per tensor'}: {one_line(error)}")
        else:
            result.file, result.per_channel = str(target), per_channel
            break
    result.error = "; ".join(errors)
    return result


def _in_process(source: Path, target: Path, *arguments: object) -> tuple[float, float, int]:
    with (
        tempfile.TemporaryDirectory() as scratch,  # the tools leave files where they run
        ProcessPoolExecutor(
            1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=os.chdir,
            initargs=(scratch,),
        ) as pool,
    ):
        return pool.submit(_quantize, source.resolve(), target.resolve(), *arguments).result()


def _quantize(
    source: Path,
    target: Path,
    samples: list[Inputs],
    method: str,
    preparation: str,
    per_channel: bool,
    types: tuple[str, str],
) -> tuple[float, float, int]:
    """Seconds and processor seconds that it took, and the most bytes that this process held."""
    start, spent = time.perf_counter(), processor_seconds()
    logging.disable(logging.WARNING)
    onnxruntime.set_default_logger_severity(4)  # errors come back as exceptions
    prepared = _prepared(source, target.with_suffix(".source.onnx"), preparation, per_channel)
    with Path(os.devnull).open("w") as silence, contextlib.redirect_stdout(silence):
        quantize_static(
            prepared,
            target,
            _Reader(samples),
            quant_format=QuantFormat.QDQ,
            per_channel=per_channel,
            activation_type=QuantType[types[0]],
            weight_type=QuantType[types[1]],
            calibrate_method=CalibrationMethod[method],
        )
    seconds, processor = time.perf_counter() - start, processor_seconds() - spent
    peak = peak_bytes()
    onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"]).run(None, samples[0])
    return seconds, processor, peak


def _prepared(source: Path, target: Path, preparation: str, per_channel: bool) -> Path:
    model = onnx.load(source)
    opset = next(entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"})
    if per_channel and opset < _PER_CHANNEL_OPSET:
        model = version_converter.convert_version(model, _PER_CHANNEL_OPSET)
    onnx.save(model, target)
    if preparation == "pre-processed":
        _pre_process(target)
    return target


def _pre_process(path: Path) -> None:
    """Infer shapes, fold constants and fuse, in place; symbolic inference fails on some files."""
    try:
        quant_pre_process(path, path)
    except Exception:  # it raises bare Exception when inference is incomplete
        quant_pre_process(path, path, skip_symbolic_shape=True)
