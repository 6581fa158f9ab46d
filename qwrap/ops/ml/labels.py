"""Encoding of labels: tables from text or numbers to text or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwrap.errors import ModelError
from qwrap.ops.ml.domain import DOMAIN, Text
from qwrap.ops.ml.lookup import Keys, keys_of
from qwrap.ops.registry import op


@dataclass(frozen=True)
class Encoding:
    """A table of labels.

    Attributes:
        keys: what is known.
        values: what each key becomes, then what all else becomes.
    """

    keys: Keys
    values: Tensor | Text

    def encode(self, x: Tensor | Text, device: torch.device | None) -> Any:
        """Return what each element becomes; new tensors go to ``device`` if ``x`` has none."""
        place = self.keys.find(x)
        if isinstance(self.values, Tensor):
            at = torch.from_numpy(place).to(device) if isinstance(place, np.ndarray) else place
            return self.values.to(at.device)[at]
        return np.asarray(
            self.values[place.cpu().numpy() if isinstance(place, Tensor) else place], dtype=object
        )


def encoding(keys: Keys, values: Any, default: Any) -> Encoding:
    """Return the table.

    Args:
        keys: what is known.
        values: text, or a tensor.
        default: of the kind of ``values``.

    Raises:
        ModelError: there are not as many keys as values.
    """
    if keys.count != len(values):
        raise ModelError(f"{keys.count} keys and {len(values)} values")
    if isinstance(values, Tensor):
        last = torch.as_tensor(default, dtype=values.dtype).reshape(1)
        return Encoding(keys, torch.cat((values.flatten(), last)))
    if isinstance(default, np.ndarray):
        default = default.item()
    return Encoding(keys, np.array([*values, default], dtype=object))


def classes(
    *,
    classes_strings: Sequence[str] = (),
    default_int64: int = -1,
    default_string: str = "_Unused",
) -> tuple[Encoding, Encoding]:
    """Return the tables of LabelEncoder-1 from text to its place, and back."""
    places = torch.arange(len(classes_strings))
    return (
        encoding(keys_of(classes_strings), places, default_int64),
        encoding(keys_of(places), classes_strings, default_string),
    )


def category_pairs(
    *,
    cats_int64s: Sequence[int] = (),
    cats_strings: Sequence[str] = (),
    default_int64: int = -1,
    default_string: str = "_Unused",
) -> tuple[Encoding, Encoding]:
    """Return the tables of CategoryMapper from text to numbers, and back."""
    numbers = torch.tensor(cats_int64s, dtype=torch.int64)
    return (
        encoding(keys_of(cats_strings), numbers, default_int64),
        encoding(keys_of(numbers), cats_strings, default_string),
    )


@op("LabelEncoder", since=(1,), domain=DOMAIN, prepare=classes)
def label_encoder_by_place(
    X: Tensor | Text,
    *,
    prepared: tuple[Encoding, Encoding],
    device: torch.device | None = None,
) -> Tensor | Text:
    """Turn text into its place in a list, or places into text."""
    return both_ways(X, prepared, device)


@op("CategoryMapper", since=(1,), domain=DOMAIN, prepare=category_pairs)
def category_mapper(
    X: Tensor | Text,
    *,
    prepared: tuple[Encoding, Encoding],
    device: torch.device | None = None,
) -> Tensor | Text:
    """Turn text into numbers, or numbers into text."""
    return both_ways(X, prepared, device)


def both_ways(
    x: Tensor | Text, tables: tuple[Encoding, Encoding], device: torch.device | None
) -> Tensor | Text:
    """Encode text by the first table, numbers by the second."""
    result: Tensor | Text = tables[isinstance(x, Tensor)].encode(x, device)
    return result


def typed_tables(
    *,
    default_float: float = -0.0,
    default_int64: int = -1,
    default_string: str = "_Unused",
    default_tensor: Tensor | Text | None = None,
    keys_floats: Sequence[float] | None = None,
    keys_int64s: Sequence[int] | None = None,
    keys_strings: Sequence[str] | None = None,
    keys_tensor: Tensor | Text | None = None,
    values_floats: Sequence[float] | None = None,
    values_int64s: Sequence[int] | None = None,
    values_strings: Sequence[str] | None = None,
    values_tensor: Tensor | Text | None = None,
    nan_matches: bool = True,
) -> Encoding:
    """Return the table of LabelEncoder from whichever attributes hold it.

    Of equal keys the first counts, as in onnxruntime; the text of LabelEncoder-4 says the last.

    Raises:
        ModelError: there are no keys or no values, or not as many of both.
    """
    given = _only("keys", keys_floats, keys_int64s, keys_strings, keys_tensor)
    keys = keys_of(given, first_counts=True, nan_matches=nan_matches)
    values = _only("values", values_floats, values_int64s, values_strings, values_tensor)
    if default_tensor is not None:
        return encoding(keys, values, default_tensor)
    if not isinstance(values, Tensor):
        return encoding(keys, values, default_string)
    is_float = values.is_floating_point()
    return encoding(keys, values, default_float if is_float else default_int64)


def _only(
    name: str,
    floats: Sequence[float] | None,
    ints: Sequence[int] | None,
    strings: Sequence[str] | None,
    tensor: Tensor | Text | None,
) -> Any:
    if tensor is not None:
        return tensor
    if strings is not None:
        return strings
    if ints is None and floats is None:
        raise ModelError(f"LabelEncoder: no {name}")
    if ints is not None:
        return torch.tensor(ints, dtype=torch.int64)
    return torch.tensor(floats, dtype=torch.float32)


@op("LabelEncoder", since=(2,), domain=DOMAIN, prepare=partial(typed_tables, nan_matches=False))
@op("LabelEncoder", since=(4,), domain=DOMAIN, prepare=typed_tables)
def label_encoder(
    X: Tensor | Text, *, prepared: Encoding, device: torch.device | None = None
) -> Tensor | Text:
    """Replace each known element by its value, all others by the default."""
    result: Tensor | Text = prepared.encode(X, device)
    return result
