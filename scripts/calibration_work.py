"""What bench_calibration.py calibrates: a file, and samples for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from networks import NETWORKS, export
from shared_models import Inputs, SharedModels


class SharedWork:
    """A shared model with its calibration samples.

    Attributes:
        path: the float model.
    """

    def __init__(self, name: str, shared: SharedModels) -> None:
        self._shared, self._name = shared, name
        self.path = shared.path(name)

    def samples(self, count: int) -> Iterator[Inputs]:
        """Yield ``count`` samples; one at a time is in memory."""
        yield from self._shared.stream_calibration(self._name, count)


class NetworkWork:
    """A published architecture with seeded random weights and inputs, for time and memory alone.

    Attributes:
        path: the float model.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._network, self.path = NETWORKS[name], folder / f"{name}_torchscript.onnx"
        with torch.device("meta"):  # samples need to know its sizes; weights would cost memory
            self._module = self._network.real()

    def export(self) -> None:
        """Write the file if it is not there."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            module = self._network.make(small=False)
            inputs = self._network.sample(module, 2, self._network.real_size, 1)
            export(self._network, module, inputs, self.path, "torchscript")

    def samples(self, count: int) -> Iterator[Inputs]:
        """Yield ``count`` samples; one at a time is in memory."""
        for seed in range(count):
            made = self._network.sample(self._module, 1, self._network.real_size, seed)
            if "attention_mask" in made:  # onnxruntime's histograms fail on masked scores
                made["attention_mask"].fill_(1)
            yield {name: value.numpy() for name, value in made.items()}


Work = SharedWork | NetworkWork


def batches(work: Work, samples: int, size: int) -> Iterator[Inputs]:
    """Yield samples joined to batches of ``size``; one batch at a time is in memory."""
    collected: list[Inputs] = []
    for inputs in work.samples(samples):
        collected.append(inputs)
        if len(collected) == size:
            yield {key: np.concatenate([each[key] for each in collected]) for key in inputs}
            collected = []
    if collected:
        yield {key: np.concatenate([each[key] for each in collected]) for key in collected[0]}
