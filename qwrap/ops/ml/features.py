"""Features: selection, scaling, encoding. Results are float32 unless said otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.errors import InputError, ModelError
from qwrap.ops.limits import one_of
from qwrap.ops.ml.domain import DOMAIN, Text
from qwrap.ops.ml.lookup import Keys, keys_of
from qwrap.ops.registry import op


@op("ArrayFeatureExtractor", since=(1,), domain=DOMAIN)
def array_feature_extractor(X: Tensor | Text, Y: Tensor) -> Tensor | Text:
    """Select columns of the last axis, keeping the type; one axis becomes one row."""
    source = X.reshape(1, -1) if X.ndim == 1 else X
    index = Y.flatten()
    return source[..., index] if isinstance(source, Tensor) else source[..., index.cpu().numpy()]


@op("Binarizer", since=(1,), domain=DOMAIN)
def binarizer(X: Tensor, *, threshold: float = 0.0) -> Tensor:
    """Return 1 above the threshold, else 0, in the type of ``X``."""
    return (threshold < X).to(X.dtype)


@op("FeatureVectorizer", since=(1,), domain=DOMAIN)
def feature_vectorizer(*X: Tensor, inputdimensions: Sequence[int] | None = None) -> Tensor:
    """Join the features of all inputs, each cut or filled with zeros to its given width."""
    parts = [x.float().reshape(1, -1) if x.ndim == 1 else x.float().flatten(1) for x in X]
    widths = inputdimensions or [part.shape[1] for part in parts]
    if len(widths) != len(parts):
        raise ModelError(f"FeatureVectorizer: {len(widths)} inputdimensions, {len(parts)} inputs")
    pairs = zip(parts, widths, strict=True)
    return torch.cat([F.pad(part, (0, width - part.shape[1])) for part, width in pairs], 1)


@op("Imputer", since=(1,), domain=DOMAIN)
def imputer(
    X: Tensor,
    *,
    imputed_value_floats: Sequence[float] | None = None,
    imputed_value_int64s: Sequence[int] | None = None,
    replaced_value_float: float = 0.0,
    replaced_value_int64: int = 0,
) -> Tensor:
    """Replace one value, NaN for example, by one for each feature, or one for all."""
    floats = X.is_floating_point()
    given = imputed_value_floats if floats else imputed_value_int64s
    if not given:
        raise ModelError(f"Imputer: no imputed values for {X.dtype}")
    features = X.shape[-1] if X.ndim else 1
    values = torch.tensor(given if len(given) == features else given[:1], device=X.device)
    if floats and math.isnan(replaced_value_float):
        replaced = X.isnan()
    else:
        replaced = torch.eq(X, replaced_value_float if floats else replaced_value_int64)
    return torch.where(replaced, values.to(X.dtype), X)


@op("Normalizer", since=(1,), domain=DOMAIN, allowed={"norm": one_of("MAX", "L1", "L2")})
def normalizer(X: Tensor, *, norm: str = "MAX") -> Tensor:
    """Divide each row by its largest element, or by its norm; by nothing where that is zero."""
    x = X.float()
    if norm == "MAX":
        size = x.amax(-1, keepdim=True)
    elif norm == "L1":
        size = x.abs().sum(-1, keepdim=True)
    else:
        squares = x.square().sum(-1, keepdim=True)
        return x / torch.where(squares == 0, 1.0, squares).sqrt()
    return x / torch.where(size == 0, 1.0, size)


@op("Scaler", since=(1,), domain=DOMAIN)
def scaler(
    X: Tensor, *, offset: Sequence[float] | None = None, scale: Sequence[float] | None = None
) -> Tensor:
    """Return ``(X - offset) * scale``, one pair for each feature or one for all."""
    x = X.float()
    if offset:
        x = x - torch.tensor(offset, device=X.device)
    return x * torch.tensor(scale, device=X.device) if scale else x


def categories(
    *,
    cats_int64s: Sequence[int] | None = None,
    cats_strings: Sequence[str] | None = None,
    zeros: int = 1,
) -> tuple[Keys, bool]:
    """Return the categories of OneHotEncoder, and whether others are allowed.

    Raises:
        ModelError: there are none.
    """
    if not cats_int64s and not cats_strings:
        raise ModelError("OneHotEncoder: neither cats_int64s nor cats_strings")
    return keys_of(cats_strings or torch.tensor(cats_int64s)), bool(zeros)


@op("OneHotEncoder", since=(1,), domain=DOMAIN, prepare=categories)
def one_hot_encoder(
    X: Tensor | Text, *, prepared: tuple[Keys, bool], device: torch.device | None = None
) -> Tensor:
    """Add an axis with 1 at the place of the category.

    Raises:
        InputError: an element is no category, and ``zeros`` is 0.
    """
    keys, allows_others = prepared
    place = keys.find(X.long() if isinstance(X, Tensor) else X)
    index: Any = torch.from_numpy(place).to(device) if isinstance(place, np.ndarray) else place
    if not allows_others and bool((index == keys.count).any()):
        raise InputError("OneHotEncoder: an element is none of the categories, and zeros=0")
    return F.one_hot(index, keys.count + 1)[..., :-1].float()
