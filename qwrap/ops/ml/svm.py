"""Support vector machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.errors import ModelError, UnsupportedOpError
from qwrap.ops.ml.coupling import coupled_probabilities
from qwrap.ops.ml.domain import DOMAIN, Tables, Text, class_labels, pick, rows
from qwrap.ops.ml.scores import both_classes, check_transform, transform
from qwrap.ops.registry import op

KERNELS = ("LINEAR", "POLY", "RBF", "SIGMOID")


@dataclass(frozen=True)
class Svm:
    """A support vector machine.

    Attributes:
        vectors: support vectors ``[vectors, features]``; None: ``weight`` acts on the features.
        weight: what sums up the kernels, ``[scores, vectors]``.
        bias: ``[scores]``, or of one score.
        kernel: one of ``KERNELS``.
        gamma: factor of the kernel.
        coef0: summand of the kernel.
        degree: power of the kernel.
        post_transform: what becomes of the scores.
        labels: of the classes; None for regression.
        pairs: the two classes that each score tells apart, ``[scores, 2]``, or None.
        sigmoid: slope and offset that make probabilities of scores, ``[2, scores]``, or None.
        one_class: regression says only on which side a row is.
        all_positive: no coefficient is negative.
    """

    vectors: Tensor | None
    weight: Tensor
    bias: Tensor
    kernel: str
    gamma: float
    coef0: float
    degree: float
    post_transform: str
    labels: Tensor | Text | None = None
    pairs: Tensor | None = None
    sigmoid: Tensor | None = None
    one_class: bool = False
    all_positive: bool = False

    def scores(self, x: Tensor) -> Tensor:
        """Return ``[rows, scores]``."""
        return F.linear(x if self.vectors is None else self._kernels(x, self.vectors), self.weight)

    def _kernels(self, x: Tensor, vectors: Tensor) -> Tensor:
        if self.kernel == "RBF":
            distance = torch.cdist(x, vectors, compute_mode="donot_use_mm_for_euclid_dist")
            return (-self.gamma * distance.square()).exp()
        product = F.linear(x, vectors)
        if self.kernel == "LINEAR":
            return product
        product = self.gamma * product + self.coef0
        return product.tanh() if self.kernel == "SIGMOID" else product.pow(self.degree)


def _kernel(kernel_type: str, params: Sequence[float], post_transform: str) -> dict[str, Any]:
    if kernel_type not in KERNELS:
        raise UnsupportedOpError(f"kernel_type={kernel_type!r} is none of {list(KERNELS)}")
    gamma, coef0, degree = params[:3] if params else (0.0, 0.0, 0.0)
    return {
        "kernel": kernel_type,
        "gamma": gamma,
        "coef0": coef0,
        "degree": degree,
        "post_transform": check_transform(post_transform),
    }


def regression(
    *,
    coefficients: Sequence[float] = (),
    kernel_params: Sequence[float] = (),
    kernel_type: str = "LINEAR",
    n_supports: int = 0,
    one_class: int = 0,
    post_transform: str = "NONE",
    rho: Sequence[float] = (),
    support_vectors: Sequence[float] = (),
) -> Tables[Svm]:
    """Return the machine of SVMRegressor.

    Raises:
        ModelError: coefficients, vectors and rho do not fit each other.
        UnsupportedOpError: an unknown kernel or transform.
    """
    if not coefficients or not rho or (n_supports and len(coefficients) != n_supports):
        raise ModelError(f"{len(coefficients)} coefficients, {n_supports} supports, {len(rho)} rho")
    vectors = torch.tensor(support_vectors).reshape(n_supports, -1) if n_supports else None
    kernel = _kernel(kernel_type, kernel_params, post_transform)
    return Tables(
        Svm(
            vectors=vectors,
            weight=torch.tensor(coefficients)[None],
            bias=torch.tensor(rho[:1]),
            one_class=bool(one_class),
            **kernel,
        )
    )


@op("SVMRegressor", since=(1,), domain=DOMAIN, prepare=regression)
def svm_regressor(X: Tensor, *, prepared: Tables[Svm]) -> Tensor:
    """Return ``[rows, 1]``; onnxruntime applies no transform, nor does this."""
    machine = prepared.on(X.device)
    y = machine.scores(rows(X.float())) + machine.bias
    return torch.where(y > 0, 1.0, -1.0) if machine.one_class else y


def classification(
    *,
    classlabels_ints: Sequence[int] | None = None,
    classlabels_strings: Sequence[str] | None = None,
    coefficients: Sequence[float] = (),
    kernel_params: Sequence[float] = (),
    kernel_type: str = "LINEAR",
    post_transform: str = "NONE",
    prob_a: Sequence[float] = (),
    prob_b: Sequence[float] = (),
    rho: Sequence[float] = (),
    support_vectors: Sequence[float] = (),
    vectors_per_class: Sequence[int] = (),
) -> Tables[Svm]:
    """Return the machine of SVMClassifier.

    Raises:
        ModelError: the attributes do not fit each other.
        UnsupportedOpError: an unknown kernel or transform.
    """
    labels = class_labels(classlabels_ints, classlabels_strings)
    kernel = _kernel(kernel_type, kernel_params, post_transform)
    count, total = len(labels), sum(vectors_per_class)
    all_positive = all(c >= 0 for c in coefficients)
    if not total:  # one linear score for each class
        if not rho or not coefficients or len(coefficients) % count:
            raise ModelError(f"{len(coefficients)} coefficients, {count} classes, {len(rho)} rho")
        weight = torch.tensor(coefficients).reshape(count, -1)
        bias = torch.tensor(rho[:1])
        svm = Svm(None, weight, bias, labels=labels, all_positive=all_positive, **kernel)
        return Tables(svm)
    pairs = list(combinations(range(count), 2))
    fits = len(vectors_per_class) == count and len(coefficients) == (count - 1) * total
    if not fits or len(rho) < len(pairs) or len(prob_a) != len(prob_b) or count < 2:
        raise ModelError("classes, vectors, coefficients, rho and probabilities do not fit")
    if post_transform == "PROBIT" and count == 2 and not prob_a:
        raise UnsupportedOpError("PROBIT of the one score of two classes")
    svm = Svm(
        vectors=torch.tensor(support_vectors).reshape(total, -1),
        weight=_pair_weights(torch.tensor(coefficients).reshape(-1, total), vectors_per_class),
        bias=torch.tensor(rho[: len(pairs)]),
        labels=labels,
        pairs=torch.tensor(pairs),
        sigmoid=torch.tensor([prob_a, prob_b])[:, : len(pairs)] if prob_a else None,
        **kernel,
    )
    return Tables(svm)


def _pair_weights(coefficients: Tensor, counts: Sequence[int]) -> Tensor:
    """Return ``[pairs, vectors]`` from libsvm's coefficients ``[classes - 1, vectors]``.

    A vector of one class has one coefficient for each other class, in the order of the classes.
    """
    parts = coefficients.split(list(counts), 1)  # type: ignore[no-untyped-call]
    result = []
    for i, j in combinations(range(len(counts)), 2):
        zeros = [torch.zeros(count) for count in counts]
        zeros[i], zeros[j] = parts[i][j - 1], parts[j][i]
        result.append(torch.cat(zeros))
    return torch.stack(result)


@op("SVMClassifier", since=(1,), domain=DOMAIN, prepare=classification)
def svm_classifier(X: Tensor, *, prepared: Tables[Svm]) -> tuple[Any, Tensor]:
    """Return the label of each row, and its scores: of classes, or of pairs of classes."""
    machine = prepared.on(X.device)
    assert machine.labels is not None
    scores = machine.scores(rows(X.float())) + machine.bias
    if machine.pairs is None:
        return pick(machine.labels, _best(scores, machine)), transform(
            scores, machine.post_transform
        )
    chosen = pick(machine.labels, _most_votes(scores, machine.pairs, len(machine.labels)))
    name = machine.post_transform
    if machine.sigmoid is not None:
        a, b = machine.sigmoid
        wins = (-(scores * a + b)).sigmoid().clamp(1e-7, 1 - 1e-7)
        probabilities = coupled_probabilities(wins, machine.pairs, len(machine.labels))
        return chosen, transform(probabilities, name)
    if len(machine.pairs) > 1:
        return chosen, transform(scores, name)
    return chosen, both_classes(scores[:, 0], name, as_probability=name != "NONE")


def _best(scores: Tensor, machine: Svm) -> Tensor:
    """Return the class with the highest score; of two, the second is the positive one."""
    top, best = scores.max(1)
    if scores.shape[1] != 2:
        return best
    return torch.where(top >= 0.5 if machine.all_positive else top > 0, 1, best)


def _most_votes(scores: Tensor, pairs: Tensor, classes: int) -> Tensor:
    winners = torch.where(scores > 0, pairs[:, 0], pairs[:, 1])
    return F.one_hot(winners, classes).sum(1).argmax(1)
