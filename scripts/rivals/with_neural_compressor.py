"""Makes a file with Intel Neural Compressor for ONNX, which has 8 bits only.

Install: ``pip install onnx-neural-compressor onnxruntime transformers scipy "onnx<1.17"``, of which
it names only the first two; the package neural-compressor itself has no ONNX part any more.

"default" calibrates by minimum and maximum, with a scale per output channel; "high" smooths
activations first (SmoothQuant), with default options.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import onnx
from file_order import Order, serve
from onnx_neural_compressor.data_reader import CalibrationDataReader
from onnx_neural_compressor.quantization import config, quantize
from onnxruntime.quantization import QuantFormat
from sample_folder import SampleFolder

from rivals.float_model import load


class _Reader(CalibrationDataReader):
    """Gives the samples again after ``rewind``."""

    def __init__(self, data: SampleFolder) -> None:
        self._data = data
        self.rewind()

    def get_next(self) -> dict | None:
        return next(self._left, None)

    def rewind(self) -> None:
        self._left: Iterator[dict] = iter(self._data)


def make(order: Order) -> list[str]:
    """Quantize, by calibration alone or with SmoothQuant."""
    if (order.weight, order.activation) != (8, 8):
        raise NotImplementedError("Neural Compressor quantizes activations to 8 bits only")
    smooth = order.effort == "high"
    settings = config.StaticQuantConfig(
        calibration_data_reader=_Reader(order.data),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        calibration_sampling_size=len(order.data),
        extra_options={"SmoothQuant": True, "SmoothQuantCalibIter": len(order.data)}
        if smooth
        else {},
    )
    source = order.target.with_suffix(".source.onnx")
    onnx.save(load(order.source), source)
    quantize(str(source), str(order.target), settings)
    _embed(order.target)
    return ["SmoothQuant"] * smooth


def _embed(path: Path) -> None:
    """Take the data that was written beside the file into it, as all others have it."""
    model = onnx.load(path)
    beside = path.with_name(path.name + "_data")
    if beside.exists():
        onnx.save(model, path)
        beside.unlink()


if __name__ == "__main__":
    serve(make, version("onnx-neural-compressor"))
