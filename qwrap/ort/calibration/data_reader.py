"""Where calibration data comes from."""

from __future__ import annotations

import abc
from typing import Any


class UnsizedError(NotImplementedError, TypeError):
    """A reader does not say how many batches it has; ``list`` needs a ``TypeError`` for that."""


class CalibrationDataReader(metaclass=abc.ABCMeta):
    """Gives batches one by one; whatever has a callable ``get_next`` counts as a subclass."""

    @classmethod
    def __subclasshook__(cls, subclass: type) -> bool:
        return callable(getattr(subclass, "get_next", None)) or NotImplemented

    @abc.abstractmethod
    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch, graph input name -> array, or None after the last one."""
        raise NotImplementedError

    def __iter__(self) -> CalibrationDataReader:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = self.get_next()
        if batch is None:
            raise StopIteration
        return batch

    def __len__(self) -> int:
        """Return the number of batches; readers that are read stride by stride need it."""
        raise UnsizedError(f"{type(self).__name__} does not say how many batches it has")

    def set_range(self, start_index: int, end_index: int) -> None:
        """Let the next batches be those from ``start_index`` up to, not with, ``end_index``."""
        raise NotImplementedError
