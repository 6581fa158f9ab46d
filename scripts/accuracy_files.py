"""Makes the files that the benchmark of accuracy compares: by qwrap, onnxruntime and rivals."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import incumbent
import onnxruntime
from accuracy_goals import SETTINGS, lower_is_better
from accuracy_results import Cell, Way
from coded_weights import coded_values, float_values
from file_order import EFFORTS, Order, Report
from file_process import carry_out, foreign_environment, own_environment
from judge import judge
from results import FileResult
from sample_folder import SampleFolder
from shared_models import SharedModels

RIVALS = {  # name -> module that makes its files, and whether it has other than 8 bits
    "nncf": ("rivals.with_nncf", False),
    "aimet": ("rivals.with_aimet", True),
    "quark": ("rivals.with_quark", False),
    "neural_compressor": ("rivals.with_neural_compressor", False),
}
_TYPES = {8: ("QUInt8", "QInt8"), 4: ("QUInt4", "QInt4")}  # of activations and weights


class Makers:
    """Every way of making a file.

    Args:
        shared: the models and their data.
        workdir: where files and samples go, and stay.
        pythons: rival -> Python of the environment that has it.
        samples: effort -> number of calibration samples, fewer where the data has fewer.
        timeout: seconds after which one file is given up.
    """

    def __init__(
        self,
        shared: SharedModels,
        workdir: Path,
        pythons: Mapping[str, str],
        samples: Mapping[str, int],
        timeout: float,
    ) -> None:
        self._shared, self._workdir, self._pythons = shared, workdir, pythons
        self._samples, self._timeout = samples, timeout

    def ways(self, efforts: list[str], tools: list[str]) -> list[Way]:
        """What there is to compare; tools that nobody gave a Python for are left out."""
        known = {"qwrap": EFFORTS, "onnxruntime": ("plain",)}
        known |= dict.fromkeys(self._pythons, ("default", "high"))
        return [
            Way(tool, effort)
            for tool, possible in known.items()
            for effort in possible
            if (tool in tools or tool in self._pythons)
            and (effort in efforts or tool == "onnxruntime")
        ]

    @staticmethod
    def has(way: Way, setting: str) -> bool:
        """Whether a tool has the types of a setting."""
        bits = SETTINGS[setting].weight, SETTINGS[setting].activation
        return way.tool not in RIVALS or bits == (8, 8) or RIVALS[way.tool][1]

    def make(self, model: str, setting: str, way: Way) -> Cell:
        """Quantize ``model`` and measure all but latency."""
        samples = self._folder(model, way.effort)
        cell = Cell(
            model=model,
            setting=setting,
            tool=way.tool,
            effort=way.effort,
            samples=len(SampleFolder(samples)),
            file=FileResult(method=way.label),
        )
        if way.tool == "onnxruntime":
            self._incumbent(cell, samples)
        else:
            self._ordered(cell, samples)
        if cell.file.exists and not cell.coded:
            cell.coded = coded_values(cell.file.file) / float_values(self._shared.path(model))
        return cell

    def _folder(self, model: str, effort: str) -> Path:
        count = self._samples[effort]
        folder = self._workdir / "samples" / f"{model}-{count}"
        SampleFolder.write(folder, self._shared.stream_calibration(model, count))
        return folder

    def _ordered(self, cell: Cell, samples: Path) -> None:
        """Fill in what a process of its own makes, qwrap's or a rival's."""
        setting, folder = SETTINGS[cell.setting], self._workdir / cell.setting
        folder.mkdir(parents=True, exist_ok=True)
        order = Order(
            source=self._shared.path(cell.model).resolve(),
            target=folder / f"{cell.model}.{cell.tool}.{cell.effort}.onnx",
            samples=samples,
            weight=setting.weight,
            activation=setting.activation,
            effort=cell.effort,
        )
        order.target.unlink(missing_ok=True)  # what an earlier run made is not this one's
        report = self._carry_out(cell.tool, order)
        cell.version, cell.notes = report.version, report.notes
        file = cell.file
        file.seconds, file.processor = report.seconds, report.processor
        file.peak, file.error = report.peak, report.error
        if not file.error:
            file.file = str(order.target)
            judge(self._shared, cell.model, file)

    def _carry_out(self, tool: str, order: Order) -> Report:
        if tool == "qwrap":
            command, variables = [sys.executable, "-m", "qwrap_order"], own_environment()
        else:
            command, variables = [self._pythons[tool], "-m", RIVALS[tool][0]], foreign_environment()
        return carry_out(command, order, self._timeout, variables)

    def _incumbent(self, cell: Cell, samples: Path) -> None:
        """Fill in the best of what ``quantize_static`` makes; seconds and peak are of that one."""
        setting, folder = SETTINGS[cell.setting], self._workdir / cell.setting
        folder.mkdir(parents=True, exist_ok=True)
        types = _TYPES[setting.activation][0], _TYPES[setting.weight][1]
        source, data = self._shared.path(cell.model), list(SampleFolder(samples))
        attempts = []
        for preparation in incumbent.PREPARATIONS:
            for method in incumbent.METHODS:
                attempt = incumbent.attempt(source, folder, data, method, preparation, types)
                if attempt.exists:
                    judge(self._shared, cell.model, attempt)
                attempts.append(attempt)
        cell.version = onnxruntime.__version__
        done = [attempt for attempt in attempts if attempt.metric]
        cell.file = max(done, key=_worth) if done else attempts[0]
        cell.notes = [f"{cell.file.method}, {cell.file.preparation}"]


def _worth(file: FileResult) -> tuple[float, int]:
    name, value = next(iter(file.metric.items()))
    return (-value if lower_is_better(name) else value, -file.size)
