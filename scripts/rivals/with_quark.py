"""Makes a file with AMD Quark's ONNX quantizer, which has 8 bits only for files in QDQ form.

Install: ``pip install amd-quark onnxruntime``.

"default" calibrates by its default method, with a scale per output channel; "high" equalizes layers
first and then learns the rounding of weights (AdaRound), both with their default options.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import onnx
from file_order import Order, serve
from onnxruntime.quantization import CalibrationDataReader
from quark.onnx import ModelQuantizer, QConfig
from quark.onnx.quantization.config.algorithm import AdaRoundConfig, CLEConfig
from quark.onnx.quantization.config.spec import (
    Int8Spec,
    QLayerConfig,
    QuantGranularity,
    UInt8Spec,
)
from sample_folder import SampleFolder

from rivals.float_model import load


class _Reader(CalibrationDataReader):
    """Gives the samples again after ``rewind``; the algorithms read them more than once."""

    def __init__(self, data: SampleFolder) -> None:
        self._data = data
        self.rewind()

    def __len__(self) -> int:
        return len(self._data)

    def get_next(self) -> dict | None:
        return next(self._left, None)

    def rewind(self) -> None:
        self._left: Iterator[dict] = iter(self._data)

    reset_iter = rewind


def make(order: Order) -> list[str]:
    """Quantize, by calibration alone or with CLE and AdaRound."""
    if (order.weight, order.activation) != (8, 8):
        raise NotImplementedError("Quark has no 4-bit integers for QDQ files")
    algorithms = []
    if order.effort == "high":
        algorithms = [CLEConfig(), AdaRoundConfig(data_size=len(order.data))]
    config = QConfig(
        global_config=QLayerConfig(
            activation=UInt8Spec(), weight=Int8Spec(quant_granularity=QuantGranularity.Channel)
        ),
        algo_config=algorithms,
    )
    source = order.target.with_suffix(".source.onnx")
    onnx.save(load(order.source), source)
    ModelQuantizer(config).quantize_model(str(source), str(order.target), _Reader(order.data))
    return [type(algorithm).__name__ for algorithm in algorithms]


if __name__ == "__main__":
    serve(make, version("amd-quark"))
