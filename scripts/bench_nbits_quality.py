"""Print how close n-bit files come to their float model on held-back data, by method.

    python scripts/bench_nbits_quality.py [--shared DIR] [--bits 2 3 4 8] [model ...]

Every MatMul with a constant is quantized to 4 bits, or as many as are asked for, and onnxruntime
runs the MatMulNBits files on one thread. Figures are signal to noise ratios of the first output
over all held-back samples, in dB, and the seconds that it took to make the file. Methods without
zero points for symmetric codes keep theirs there. "gptq alone" is GPTQ of which each weight learns
from inputs of the float model. The onnxruntime columns are its own quantizer's files, for rounding
to nearest ("DEFAULT") and GPTQ; it leaves weights in float that an Identity passes on, as the head
of stories260k, and knows no 3 bits.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, matmul_nbits_quantizer
from shared_models import Inputs, SharedModels, default_folder

import qwrap

MODELS = {"stories260k": (32, 16), "minilm_l6": (128, 64)}  # samples to learn from and to judge by
METHODS = ("rtn", "hqq", "k_quant", "awq", "gptq alone", "gptq")
BITS = (2, 3, 4, 8)
FROM_DATA = ("awq", "gptq alone", "gptq")
FORMATS = tuple(itertools.product((32, 128), (False, True)))  # block sizes; whether symmetric

Make = Callable[[], onnx.ModelProto]


@dataclass(frozen=True)
class Form:
    """How weights are stored."""

    bits: int
    block_size: int
    symmetric: bool


class Judge:
    """Compares files with the float model on the same samples."""

    def __init__(self, path: Path, samples: Sequence[Inputs]) -> None:
        self._samples = samples
        self._expected = self._run(onnx.load(path))
        self._power = sum(float(np.square(y).sum()) for y in self._expected)

    def sqnr(self, model: onnx.ModelProto) -> float:
        """Signal to noise ratio of the first output, in dB."""
        found = self._run(model)
        noise = sum(
            float(np.square(a - b).sum()) for a, b in zip(found, self._expected, strict=True)
        )
        return 10 * math.log10(self._power / noise)

    def _run(self, model: onnx.ModelProto) -> list[np.ndarray]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return [session.run(None, dict(x))[0].astype(np.float64) for x in self._samples]


class Reader(CalibrationDataReader):
    """Gives samples to onnxruntime's quantizer."""

    def __init__(self, samples: Sequence[Inputs]) -> None:
        self._samples = iter(samples)

    def get_next(self) -> Inputs | None:
        """Return the next sample, None behind the last."""
        return next(self._samples, None)


def own(path: Path, method: str, form: Form, data: Sequence[Inputs]) -> Make:
    """Return what makes a file with qwrap."""
    given = data if method in FROM_DATA else None
    name, _, alone = method.partition(" ")

    def make() -> onnx.ModelProto:
        made = qwrap.quantize_weights(
            path, method=name, batches=given, sequential=not alone, **asdict(form)
        )
        assert made is not None
        return made

    return make


def incumbent(path: Path, method: str, form: Form, data: Sequence[Inputs]) -> Make:
    """Return what makes a file with onnxruntime's quantizer."""

    def make() -> onnx.ModelProto:
        config = None
        if method == "gptq":
            config = matmul_nbits_quantizer.GPTQWeightOnlyQuantConfig(Reader(data))
        quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
            onnx.load(path),
            bits=form.bits,
            block_size=form.block_size,
            is_symmetric=form.symmetric,
            algo_config=config,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            quantizer.process()
        return quantizer.model.model

    return make


def figure(judge: Judge, make: Make) -> str:
    """Return the ratio and the seconds that it took to make the file."""
    start = time.perf_counter()
    try:
        model = make()
    # onnxruntime's packs an odd number of zero points in a row wrongly, and asserts its bits.
    except (ValueError, AssertionError):
        return "fails"
    taken = time.perf_counter() - start
    return f"{judge.sqnr(model):6.2f}{taken:4.0f}s"


def table(name: str, shared: SharedModels, bits: int) -> None:
    """Print the figures of one model."""
    learned, judged = MODELS[name]
    path, data = shared.path(name), shared.calibration(name, learned)
    judge = Judge(path, shared.validation(name, judged))
    columns = [*METHODS, "ort default", "ort gptq"]
    print(f"\n{name}, {bits} bits, {len(data)} samples to learn from, {judged} to judge by")
    print(f"{'block':>5} {'symmetric':>9} " + " ".join(f"{c:>11}" for c in columns))
    for size, symmetric in FORMATS:
        form = Form(bits, size, symmetric)
        makers = [own(path, m, form, data) for m in METHODS]
        makers += [incumbent(path, m, form, data) for m in ("default", "gptq")]
        figures = [figure(judge, make) for make in makers]
        print(f"{size:>5} {symmetric!s:>9} " + " ".join(f"{f:>11}" for f in figures), flush=True)


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--bits", type=int, nargs="+", choices=BITS, default=[4])
    parser.add_argument("--shared", type=Path, default=default_folder())
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    for name in arguments.models:
        for bits in arguments.bits:
            table(name, SharedModels(arguments.shared), bits)


if __name__ == "__main__":
    main()
