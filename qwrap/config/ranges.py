"""What is said of the range of a tensor, or of all: how it is chosen, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qwrap.errors import ConfigError

Method = Literal["minmax", "ema", "percentile", "mse", "l1", "cosine", "entropy", "distribution"]
METHODS = get_args(Method)
Choice = Literal[Method, "auto"]
Training = Literal["fixed", "follow", "lsq", "lsq+", "pact", "tqt"]
TRAININGS = get_args(Training)
WEIGHT_METHODS = ("minmax", "mse")


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeOverride:
    """What the user says of a tensor's range: what it is, how it is chosen, how it is trained.

    None leaves it open.

    Attributes:
        low: smallest value to represent, in real units.
        high: largest value to represent.
        scale: the scale itself, one for the tensor.
        zero_point: the zero point that goes with ``scale``.
        method: how the range is chosen, for this tensor.
        percentile: as in ``QConfig``, for this tensor.
        training: as in ``QConfig``, for this tensor.
    """

    low: float | None = None
    high: float | None = None
    scale: float | None = None
    zero_point: int | None = None
    method: Choice | None = None
    percentile: float | None = None
    training: Training | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ConfigError(f"low={self.low}, high={self.high}: give both or neither")
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise ConfigError(f"low={self.low} is above high={self.high}")
        if self.scale is None and self.zero_point is not None:
            raise ConfigError(f"zero_point={self.zero_point} needs a scale")
        if self.scale is not None and not (self.scale > 0 and self.low is None):
            raise ConfigError(f"scale={self.scale} has to be above 0, and without low and high")
        check_method(self.method, self.percentile)
        check_training(self.training)


def check_training(training: str | None) -> None:
    """Refuse an unknown way to train a scale."""
    if training not in (None, *TRAININGS):
        raise ConfigError(f"training={training!r}: choose one of {TRAININGS}")


def check_method(method: str | None, percentile: float | None) -> None:
    """Refuse an unknown way to choose a range."""
    if method not in (None, "auto", *METHODS):
        raise ConfigError(f"method={method!r}: choose one of {(*METHODS, 'auto')}")
    if percentile is not None and not 50 < percentile <= 100:
        raise ConfigError(f"percentile={percentile}: expected more than 50, up to 100")
