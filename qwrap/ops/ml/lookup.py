"""Finding values of any kind among known ones, all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwrap.ops.ml.domain import Tables, Text


@dataclass(frozen=True)
class Numbers:
    """Known numbers.

    Attributes:
        values: the numbers ascending, NaN left out.
        places: where each stands in the list given.
        nan: where NaN stands there; the length of the list if nowhere.
    """

    values: Tensor
    places: Tensor
    nan: int


@dataclass(frozen=True)
class Keys:
    """Known values, each with its place in a list.

    Attributes:
        count: the length of the list.
        words: word -> place, for text.
        numbers: for numbers.
    """

    count: int
    words: dict[str, int]
    numbers: Tables[Numbers] | None

    def find(self, x: Tensor | Text) -> Any:
        """Return the place of each element, ``count`` if unknown: a tensor, for text an array."""
        if not isinstance(x, Tensor):
            found = [self.words.get(word, self.count) for word in x.flat]
            return np.array(found, np.int64).reshape(x.shape)
        assert self.numbers is not None
        known = self.numbers.on(x.device)
        if not len(known.values):
            place = torch.full(x.shape, self.count, device=x.device)
        else:
            at = torch.searchsorted(known.values, x.contiguous()).clamp(max=len(known.values) - 1)
            place = torch.where(known.values[at] == x, known.places[at], self.count)
        return torch.where(x.isnan(), known.nan, place) if x.is_floating_point() else place


def keys_of(
    values: Sequence[str] | Text | Tensor, first_counts: bool = False, nan_matches: bool = True
) -> Keys:
    """Return the places of ``values``.

    Args:
        values: text, or a tensor.
        first_counts: of equal ones the first counts, else the last.
        nan_matches: a NaN among them matches NaN.
    """
    listed = values.flatten().tolist() if isinstance(values, Tensor) else list(map(str, values))
    numbered = list(enumerate(listed))
    if first_counts:
        numbered.reverse()
    places = {value: place for place, value in numbered if value == value}
    if not isinstance(values, Tensor):
        return Keys(len(listed), places, None)
    nans = [place for place, value in numbered if value != value] if nan_matches else []
    ordered = sorted(places)
    numbers = Numbers(
        values=torch.tensor(ordered, dtype=values.dtype),
        places=torch.tensor([places[value] for value in ordered], dtype=torch.int64),
        nan=nans[-1] if nans else len(listed),
    )
    return Keys(len(listed), {}, Tables(numbers))
