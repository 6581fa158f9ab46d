"""Ensembles of decision trees that vote for classes.

Scores and labels are those of onnxruntime; ONNX leaves open what one score says about two classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwrap.errors import ModelError, UnsupportedOpError
from qwrap.ops.ml.domain import DOMAIN, Tables, class_labels, pick, rows
from qwrap.ops.ml.forest import Forest
from qwrap.ops.ml.scores import both_classes, check_transform, transform
from qwrap.ops.ml.tree_attributes import floats, forest_by_ids
from qwrap.ops.registry import op


@dataclass(frozen=True)
class Classification:
    """Trees whose leaves vote for classes.

    Attributes:
        trees: the forest.
        post_transform: what becomes of the scores.
        base: what is added to the scores, none, one or one for each class.
        labels: of the classes.
        one_column: of two classes the leaves vote for one only, so their votes tell both.
        all_positive: no vote is negative, so the votes are probabilities.
    """

    trees: Tables[Forest]
    post_transform: str
    base: Sequence[float]
    labels: Any
    one_column: bool
    all_positive: bool


def classification(
    *,
    base_values: Sequence[float] | None = None,
    base_values_as_tensor: Tensor | None = None,
    class_ids: Sequence[int] | None = None,
    class_nodeids: Sequence[int] | None = None,
    class_treeids: Sequence[int] = (),
    class_weights: Sequence[float] | None = None,
    class_weights_as_tensor: Tensor | None = None,
    classlabels_int64s: Sequence[int] | None = None,
    classlabels_strings: Sequence[str] | None = None,
    nodes_falsenodeids: Sequence[int] | None = None,
    nodes_featureids: Sequence[int] | None = None,
    nodes_missing_value_tracks_true: Sequence[int] | None = None,
    nodes_modes: Sequence[str] | None = None,
    nodes_nodeids: Sequence[int] | None = None,
    nodes_treeids: Sequence[int] = (),
    nodes_truenodeids: Sequence[int] | None = None,
    nodes_values: Sequence[float] | None = None,
    nodes_values_as_tensor: Tensor | None = None,
    post_transform: str = "NONE",
) -> Classification:
    """Return the trees of TreeEnsembleClassifier.

    Raises:
        ModelError: the attributes do not fit each other.
        UnsupportedOpError: an unknown mode or transform.
    """
    labels = class_labels(classlabels_int64s, classlabels_strings)
    weights = floats(class_weights, class_weights_as_tensor)
    forest = forest_by_ids(
        tree_ids=nodes_treeids,
        node_ids=nodes_nodeids,
        features=nodes_featureids,
        modes=nodes_modes,
        values=floats(nodes_values, nodes_values_as_tensor),
        true_ids=nodes_truenodeids,
        false_ids=nodes_falsenodeids,
        missing=nodes_missing_value_tracks_true,
        leaf_trees=class_treeids,
        leaf_nodes=class_nodeids,
        targets=class_ids,
        weights=weights,
        target_count=len(labels),
    )
    base = floats(base_values, base_values_as_tensor).tolist()
    if post_transform == "PROBIT" and len(labels) == 2 and 1 not in (class_ids or ()):
        raise UnsupportedOpError("PROBIT of the one score of two classes")
    if len(base) not in ((0, 1, 2) if len(labels) <= 2 else (0, len(labels))):
        raise ModelError(f"{len(base)} base_values of {len(labels)} classes")
    return Classification(
        trees=Tables(forest),
        post_transform=check_transform(post_transform),
        base=base,
        labels=labels,
        one_column=len(labels) == 2 and len(set(class_ids or ())) == 1,
        all_positive=bool((weights >= 0).all()),
    )


@op(
    "TreeEnsembleClassifier",
    since=(1, 3, 5),
    domain=DOMAIN,
    ignored=("nodes_hitrates", "nodes_hitrates_as_tensor"),
    prepare=classification,
)
def tree_ensemble_classifier(X: Tensor, *, prepared: Classification) -> tuple[Any, Tensor]:
    """Return the label of each row, and the scores ``[rows, classes]`` as float32."""
    forest = prepared.trees.on(X.device)
    votes, there = forest.scores(forest.leaves(rows(X)), "SUM")
    if len(prepared.labels) > 2:
        label, scores = _many_classes(votes, there, prepared)
        return pick(prepared.labels, label), scores.float()
    labels = prepared.labels
    if isinstance(labels, Tensor) and not prepared.one_column:
        labels = torch.tensor([0, 1])  # onnxruntime does not look at the labels here
    decide = _two_classes if len(prepared.labels) == 2 else _one_class
    positive, scores = decide(votes, there, prepared)
    return pick(labels, positive.long()), scores.float()


def _many_classes(votes: Tensor, there: Tensor, trees: Classification) -> tuple[Tensor, Tensor]:
    """Return the best class of each row, and the scores."""
    votes = torch.where(there, votes, 0.0)
    if trees.base:
        votes = votes + torch.tensor(trees.base, device=votes.device)
        there = torch.ones_like(there)
    best = torch.where(there, votes, -torch.inf).argmax(1)
    return best, transform(votes, trees.post_transform)


def _two_classes(votes: Tensor, there: Tensor, trees: Classification) -> tuple[Tensor, Tensor]:
    """Return whether the second class wins, and the scores of both.

    Where no leaf votes for the second class, the votes for the first are its score. Two base
    values shift the score of the second class alone; one shifts that of the first.
    """
    has_second = there[:, 1]
    first, second = votes.unbind(1)
    if len(trees.base) == 2:
        second = torch.where(has_second, first + trees.base[1], 0.0)
        first = torch.where(has_second, -second, first + trees.base[0])
    elif trees.base:
        first = first + trees.base[0]
    score = torch.where(has_second, second, first)
    is_probability = trees.one_column and trees.all_positive
    positive = score > (0.5 if is_probability else 0.0)
    both = torch.where(there, torch.stack((first, second), 1), 0.0)
    both = transform(both, trees.post_transform)
    if len(trees.base) == 2:
        return positive, both
    pair = both_classes(first, trees.post_transform, as_probability=is_probability)
    return positive, torch.where(has_second[:, None], both, pair)


def _one_class(votes: Tensor, _: Tensor, trees: Classification) -> tuple[Tensor, Tensor]:
    votes = votes + trees.base[0] if trees.base else votes
    return votes[:, 0] > 0, transform(votes, trees.post_transform)
