"""Text: tensors of strings are numpy arrays of objects."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwrap.errors import InputError, UnsupportedOpError
from qwrap.ops.registry import op
from qwrap.ops.text.re2 import compile_re2

Text = npt.NDArray[Any]


@op("StringConcat", since=(20,))
def string_concat(X: Text, Y: Text) -> Text:
    """Join the elements of ``X`` and ``Y`` in pairs; shapes broadcast."""
    return np.asarray(np.add(X, Y), dtype=object)


@op("StringSplit", since=(20,))
def string_split(
    X: Text, *, delimiter: str = "", maxsplit: int | None = None, device: torch.device | None = None
) -> tuple[Text, Tensor]:
    """Split each element at ``delimiter``; return the parts, padded with "", and their counts.

    As in onnxruntime an empty element has no parts, and without a delimiter only blanks separate.
    """
    limit = -1 if maxsplit is None else maxsplit
    parts = [_split(text, delimiter, limit) for text in X.flat]
    counts = np.array([len(own) for own in parts], np.int64)
    width = int(counts.max(initial=0))
    padded = np.full((len(parts), width), "", dtype=object)
    for row, own in zip(padded, parts, strict=True):
        row[: len(own)] = own
    return padded.reshape(*X.shape, width), torch.from_numpy(counts.reshape(X.shape)).to(device)


def _split(text: str, delimiter: str, limit: int) -> list[str]:
    if delimiter:
        return text.split(delimiter, limit) if text else []
    text = text.strip(" ")
    if not text or limit == 0:
        return [text] if text else []
    return re.split(" +", text, maxsplit=max(limit, 0))


@op(
    "RegexFullMatch",
    since=(20,),
    prepare=lambda *, pattern="": compile_re2(pattern),
)
def regex_full_match(
    X: Text, *, prepared: re.Pattern[str], device: torch.device | None = None
) -> Tensor:
    """Tell which elements match a pattern of RE2 from end to end."""
    found = [prepared.fullmatch(text) is not None for text in X.flat]
    return torch.tensor(found, dtype=torch.bool, device=device).reshape(X.shape)


@dataclass(frozen=True, slots=True)
class Normalization:
    """What StringNormalizer does to a word.

    Attributes:
        stopwords: words to leave out, in the case in which words are compared.
        change: what becomes of the words that stay.
        compare: makes of a word what is looked up among the stop words.
    """

    stopwords: frozenset[str]
    change: Callable[[str], str]
    compare: Callable[[str], str]


def _same(text: str) -> str:
    return text


def _lower(text: str) -> str:
    """Lower each character that has one lower-case counterpart, as the C library does."""
    return "".join(low if len(low := c.lower()) == 1 else c for c in text)


def _upper(text: str) -> str:
    return "".join(high if len(high := c.upper()) == 1 else c for c in text)


CASES = {"NONE": _same, "LOWER": _lower, "UPPER": _upper}


def normalization(
    *,
    case_change_action: str = "NONE",
    is_case_sensitive: int = 0,
    locale: str = "",
    stopwords: Sequence[str] = (),
) -> Normalization:
    """Return what the attributes of StringNormalizer say.

    Raises:
        UnsupportedOpError: an unknown case, or a locale with its own rules for "i".
    """
    if case_change_action not in CASES:
        raise UnsupportedOpError(
            f"case_change_action={case_change_action!r} is none of {list(CASES)}"
        )
    if locale.lower().startswith(("tr", "az")):
        raise UnsupportedOpError(f"locale={locale!r} changes case by rules of its own")
    change = CASES[case_change_action]
    compare = _same if is_case_sensitive else _upper if change is _upper else _lower
    return Normalization(frozenset(map(compare, stopwords)), change, compare)


@op("StringNormalizer", since=(10,), prepare=normalization)
def string_normalizer(X: Text, *, prepared: Normalization) -> Text:
    """Drop stop words and change case; one empty word stays if nothing else does.

    Raises:
        InputError: ``X`` is neither ``[words]`` nor ``[1, words]``.
    """
    if X.ndim not in (1, 2) or (X.ndim == 2 and X.shape[0] != 1):
        raise InputError(f"StringNormalizer: shape {list(X.shape)} is neither [C] nor [1, C]")
    kept = [w for w in X.flat if prepared.compare(w) not in prepared.stopwords]
    words = np.array([prepared.change(w) for w in kept] or [""], dtype=object)
    return words.reshape((1,) * (X.ndim - 1) + (-1,))
