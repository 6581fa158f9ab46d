"""What a file is worth: its task metric in onnxruntime, its size, what optimisation leaves."""

from __future__ import annotations

from pathlib import Path

from file_order import one_line
from measurements import operators_left, session
from results import FileResult
from shared_models import SharedModels


def judge(shared: SharedModels, name: str, file: FileResult) -> None:
    """Fill in size, task metric and what optimisation leaves, or the error that prevents it."""
    try:
        run = session(file.file)
        metric = shared.evaluate(name, lambda inputs: run.run(None, dict(inputs)))
        left = operators_left(file.file)
    except Exception as error:  # a file that onnxruntime refuses is a finding, not the end
        file.error = "; ".join(filter(None, (file.error, one_line(error))))
        return
    file.size = Path(file.file).stat().st_size
    file.metric = metric
    file.quantize_left, file.dequantize_left = left["QuantizeLinear"], left["DequantizeLinear"]
