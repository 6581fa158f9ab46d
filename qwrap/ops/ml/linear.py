"""Linear models; what onnxruntime computes where ONNX is silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.errors import ModelError, UnsupportedOpError
from qwrap.ops.ml.domain import DOMAIN, Tables, Text, class_labels, pick, rows
from qwrap.ops.ml.scores import both_classes, check_transform, transform
from qwrap.ops.registry import op


@dataclass(frozen=True)
class Linear:
    """A linear model.

    Attributes:
        weight: ``[targets, features]``.
        bias: ``[targets]``, or None.
        post_transform: what becomes of the scores.
        labels: of the classes; None for regression.
    """

    weight: Tensor
    bias: Tensor | None
    post_transform: str
    labels: Tensor | Text | None = None


def _linear(
    coefficients: Sequence[float], intercepts: Sequence[float], targets: int, **others: Any
) -> Tables[Linear]:
    if not targets or not coefficients or len(coefficients) % targets:
        raise ModelError(f"{len(coefficients)} coefficients do not divide into {targets} targets")
    weight = torch.tensor(coefficients).reshape(targets, -1)
    bias = torch.tensor(intercepts) if len(intercepts) == targets else None
    check_transform(others["post_transform"])
    return Tables(Linear(weight, bias, **others))


def regression(
    *,
    coefficients: Sequence[float] = (),
    intercepts: Sequence[float] = (),
    post_transform: str = "NONE",
    targets: int = 1,
) -> Tables[Linear]:
    """Return the model of LinearRegressor.

    Raises:
        ModelError: the coefficients do not fit the targets.
        UnsupportedOpError: an unknown transform.
    """
    return _linear(coefficients, intercepts, targets, post_transform=post_transform)


def classification(
    *,
    classlabels_ints: Sequence[int] | None = None,
    classlabels_strings: Sequence[str] | None = None,
    coefficients: Sequence[float] = (),
    intercepts: Sequence[float] = (),
    post_transform: str = "NONE",
) -> Tables[Linear]:
    """Return the model of LinearClassifier.

    Raises:
        ModelError: the coefficients do not fit the classes.
        UnsupportedOpError: an unknown transform.
    """
    labels = class_labels(classlabels_ints, classlabels_strings)
    targets = len(intercepts) or len(labels)
    if targets > 1 and targets != len(labels):
        raise ModelError(f"{targets} intercepts and {len(labels)} class labels")
    if post_transform == "PROBIT" and targets == 1 and len(labels) == 2:
        raise UnsupportedOpError("PROBIT of the one score of two classes")
    return _linear(coefficients, intercepts, targets, post_transform=post_transform, labels=labels)


@op("LinearRegressor", since=(1,), domain=DOMAIN, prepare=regression)
def linear_regressor(X: Tensor, *, prepared: Tables[Linear]) -> Tensor:
    """Return ``[rows, targets]``."""
    model = prepared.on(X.device)
    return transform(F.linear(rows(X.float()), model.weight, model.bias), model.post_transform)


@op(
    "LinearClassifier",
    since=(1,),
    domain=DOMAIN,
    ignored=("multi_class",),  # the coefficients say it
    prepare=classification,
)
def linear_classifier(X: Tensor, *, prepared: Tables[Linear]) -> tuple[Any, Tensor]:
    """Return the label of each row, and the scores ``[rows, classes]``."""
    model = prepared.on(X.device)
    assert model.labels is not None
    scores = F.linear(rows(X.float()), model.weight, model.bias)
    if scores.shape[1] > 1:
        return pick(model.labels, scores.argmax(1)), transform(scores, model.post_transform)
    positive = (scores[:, 0] > 0).long()
    if len(model.labels) != 2:  # the one label says nothing; onnxruntime gives 1 and 0
        names = torch.tensor([0, 1])
        chosen = names if isinstance(model.labels, Tensor) else class_labels(None, ["0", "1"])
        return pick(chosen, positive), transform(scores, model.post_transform)
    pairs = both_classes(scores[:, 0], model.post_transform, as_probability=True)
    return pick(model.labels, positive), pairs
