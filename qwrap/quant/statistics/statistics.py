"""What calibration saw, as a plain value: to be saved, merged with others, and used again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwrap.errors import ConfigError, NotCalibratedError, StatisticsError
from qwrap.graph.save import check_target
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.observe.observers import HistogramObserver, Observer
from qwrap.quant.prepare import config_of, decisions_of, observers, stubs
from qwrap.quant.statistics.file import Content, read, write
from qwrap.quant.statistics.fingerprint import Fingerprint
from qwrap.quant.statistics.tensor import TensorStatistics

AGAIN = "calibrate the model as it is prepared now"
SHOWN = 3  # names in a message


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """What calibration saw of every observed tensor, and in which model.

    Enough to choose every scale again by another method, without data; only method "auto", which
    looks at what the consumers of a tensor compute, needs a model that saw data itself.

    Attributes:
        batches: how many were run through the model.
        fingerprint: of the model, as prepared, with the weights that it had.
        tensors: name -> what was seen of it, also of those that calibration returned to float.
    """

    batches: int
    fingerprint: Fingerprint
    tensors: Mapping[str, TensorStatistics]

    @classmethod
    def of(cls, model: WrappedModel) -> Statistics:
        """Return what the observers of ``model`` saw, in the last calibration or in this one.

        They are bound to the model as it is now, so take them before its weights change: training
        and rounding make another model of it.

        Raises:
            ConfigError: the model is not prepared.
            NotCalibratedError: no data ran through it.
        """
        tensors = seen(model)
        if not any(tensor.batches for tensor in tensors.values()):
            raise NotCalibratedError("no data ran through the model; run qwrap.calibrate() first")
        batches = decisions_of(model).batches
        return cls(batches=batches, fingerprint=Fingerprint.of(model), tensors=tensors)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, or a JSON file if the name ends in ``.json``.

        Both hold the same, bit by bit. The file is there as a whole or not at all.

        Raises:
            ExportError: the folder does not exist or cannot be written to.
        """
        check_target(path)
        write(Path(path), Content(self.batches, self.fingerprint, dict(self.tensors)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what ``save`` wrote, in either form; nothing in the file is executed.

        Raises:
            StatisticsError: the file cannot be read, is damaged, of another kind, or was written
                by a later version.
        """
        content = read(Path(path))
        return cls(
            batches=content.batches, fingerprint=content.fingerprint, tensors=content.tensors
        )

    def merge(self, *others: Statistics) -> Statistics:
        """Return what one model saw of all the data that these saw parts of.

        Counts, ranges and histograms are exactly those of one calibration on all data, in whatever
        order and groups they are merged; moving averages are averaged, each with the number of its
        batches, up to float32 rounding.

        Raises:
            StatisticsError: they were observed in different models, or not of the same tensors.
        """
        for other in others:
            difference = self.fingerprint.difference(other.fingerprint)
            if difference:
                raise StatisticsError(f"cannot merge statistics of two models: {difference}")
            odd = sorted(self.tensors.keys() ^ other.tensors.keys())
            if odd:
                raise StatisticsError(f"cannot merge: {_listed(odd)} in one of the two only")
        return Statistics(
            batches=self.batches + sum(other.batches for other in others),
            fingerprint=self.fingerprint,
            tensors={
                name: _merged(name, [tensor, *(other.tensors[name] for other in others)])
                for name, tensor in self.tensors.items()
            },
        )

    def check(self, model: WrappedModel) -> None:
        """Refuse a model that these were not observed in.

        A model may observe fewer tensors, as it does with more nodes excluded, but no others.

        Raises:
            ConfigError: the model is not prepared.
            StatisticsError: it is another one, by graph or by weights; the message says in what.
                Or it observes tensors that these do not know, or along another axis.
        """
        difference = Fingerprint.of(model).difference(self.fingerprint)
        if difference:
            raise StatisticsError(f"the statistics are of another model: {difference}; {AGAIN}")
        unknown = sorted(self.tensors.keys() - model.graph.values.keys())
        if unknown:
            raise StatisticsError(f"the statistics are damaged: {_listed(unknown)} in no graph")
        watched = observers(model)
        missing = [name for name in watched if name not in self.tensors]
        if missing:
            raise StatisticsError(
                f"{_listed(missing)} here and not in the statistics, which another configuration "
                f"made; {AGAIN}"
            )
        for name, observer in watched.items():
            _check_tensor(name, self.tensors[name], observer)

    def summary(self) -> str:
        """Return a table of what was seen, tensors with values that are not finite first."""
        worst = sorted(self.tensors, key=lambda name: self.tensors[name].nonfinite == 0)
        lines = _aligned([HEAD, *(_row(name, self.tensors[name]) for name in worst)])
        bad = sum(tensor.nonfinite > 0 for tensor in self.tensors.values())
        batches = f"{self.batches} batch{'' if self.batches == 1 else 'es'}"
        title = f"{len(self.tensors)} tensors in {batches}"
        return "\n".join([f"{title}, {bad} with values that are not finite", *lines])

    def __str__(self) -> str:
        return self.summary()


def seen(model: WrappedModel) -> dict[str, TensorStatistics]:
    """Return what every observer of a prepared model saw until now, by tensor.

    Raises:
        ConfigError: the model is not prepared.
    """
    return {name: TensorStatistics.of(found) for name, found in observers(model).items()}


def restore(model: WrappedModel, statistics: Statistics, *, is_fresh: bool = False) -> None:
    """Let the observers of a model have seen what ``statistics`` holds, in place.

    Args:
        model: prepared, with nothing returned to float yet.
        statistics: those that ``Statistics.check`` found to be of this model.
        is_fresh: let them have seen nothing instead, but be able to take this in.
    """
    for _, stub in stubs(model):
        if stub.observer is not None:
            tensor = statistics.tensors[stub.name]
            made = tensor.fresh_observer if is_fresh else tensor.observer
            stub.observer = made(stub.name, config_of(model).ema).to(stub.scale.device)
    decisions_of(model).batches = 0 if is_fresh else statistics.batches


def _check_tensor(name: str, tensor: TensorStatistics, observer: Observer) -> None:
    """Refuse what does not answer what ``observer`` is there for."""
    if tensor.axis != observer.axis:
        raise StatisticsError(
            f"tensor {name!r}: the statistics have one range {_per(tensor.axis)}, and here it "
            f"needs one {_per(observer.axis)}; {AGAIN}"
        )
    if isinstance(observer, HistogramObserver) and tensor.bins is None:
        raise StatisticsError(
            f"tensor {name!r}: the statistics have no histogram, for they were made with method "
            "'minmax' or 'ema'; choose one of these, or calibrate with data"
        )


def _per(axis: int | None) -> str:
    return "for the tensor" if axis is None else f"per channel of axis {axis}"


def _merged(name: str, parts: Iterable[TensorStatistics]) -> TensorStatistics:
    first, *others = (part.observer(name, 1.0) for part in parts)
    try:
        for other in others:
            first.merge(other)
    except ConfigError as error:
        raise StatisticsError(str(error)) from error
    return TensorStatistics.of(first)


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:SHOWN])) + (", …" if len(names) > SHOWN else "")
    return f"tensor {shown} is" if len(names) == 1 else f"tensors {shown} ({len(names)}) are"


# --- the table -----------------------------------------------------------------------------------

HEAD = ("tensor", "values", "masked", "not finite", "low", "high")


def _row(name: str, tensor: TensorStatistics) -> tuple[str, ...]:
    known = tensor.low.isfinite()
    ends = [tensor.low[known].min(), tensor.high[known].max()] if known.any() else []
    texts = [f"{float(end):.6g}" for end in ends] or ["-", "-"]
    channels = "" if tensor.axis is None else f" ({len(tensor.low)} channels)"
    return name + channels, str(tensor.count), str(tensor.masked), str(tensor.nonfinite), *texts


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Return rows as lines, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]))) for row in rows
    ]
