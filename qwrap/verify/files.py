"""A quantized file against a float one, where there is no wrapped model: onnxruntime alone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from qwrap.graph.index import OnnxGraph
from qwrap.graph.load import read_model
from qwrap.model.batches import iterate
from qwrap.verify.compare import track
from qwrap.verify.qdq_file import QdqFile
from qwrap.verify.report import FilesReport, LevelReport
from qwrap.verify.runtime import Runtime, to_feed
from qwrap.verify.session import Mode, Session
from qwrap.verify.tally import OutputTally, TensorTally, add_outputs


def verify_files(
    float_path: str | os.PathLike[str],
    quantized_path: str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    progress: bool = True,
) -> FilesReport:
    """Compare a quantized file with the float file it was made of, both in onnxruntime.

    Tells the error of quantization (both files with all optimisations), and what the integer
    kernels change (the quantized file with all optimisations against the same as written, tensor
    by tensor). That needs no simulation, so any QDQ file will do, whoever made it.

    Args:
        float_path: the model before quantization.
        quantized_path: the QDQ file made of it.
        batches: as for ``calibrate``.
        progress: show a progress bar.

    Raises:
        ModelError: a file is missing, invalid or refused by onnxruntime, or their inputs, outputs
            or shapes differ.
        InputError: there are no batches, or one does not fit.
    """
    graph = OnnxGraph(read_model(float_path))
    file = QdqFile(quantized_path)
    file.check_interface(graph, str(float_path))
    tensors, skipped = file.tensors(None)
    float_file = Session(float_path, Mode.OPTIMISED, Path(float_path).parent, str(float_path))
    optimised, literal = (Runtime(file, mode, tensors) for mode in (Mode.OPTIMISED, Mode.LITERAL))
    tallies = [TensorTally(tensor) for tensor in tensors]
    quantization, outputs = ([OutputTally(name) for name in file.outputs] for _ in range(2))
    count = 0
    for inputs in track(iterate(batches, graph), batches, progress):
        count += 1
        feed = to_feed(inputs)
        deployed, codes = optimised.run(feed)
        written, meant = literal.run(feed)
        for tally in tallies:
            name = tally.tensor.returned
            tally.add(tally.tensor.dequantize(meant[name]), codes[name])
        add_outputs(outputs, reference=deployed, other=written)
        reference = float_file.run(file.outputs, feed)
        reference_tensors = {name: torch.from_numpy(array) for name, array in reference.items()}
        add_outputs(quantization, reference=reference_tensors, other=deployed)
    found = (tally.report() for tally in tallies)
    level = LevelReport(
        name="optimisation",
        simulation=f"the quantized file {Mode.LITERAL.value}",
        runtime=Mode.OPTIMISED.value,
        tensors=tuple(tensor for tensor in found if tensor is not None),
        outputs=tuple(tally.report() for tally in outputs),
    )
    return FilesReport(
        quantization=tuple(tally.report() for tally in quantization),
        optimisation=level,
        skipped=skipped,
        batches=count,
    )
