"""Ensembles of decision trees that give numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwrap.errors import ModelError, UnsupportedOpError
from qwrap.ops.ml.domain import DOMAIN, Tables, rows
from qwrap.ops.ml.forest import AGGREGATES, Forest
from qwrap.ops.ml.scores import check_transform, transform
from qwrap.ops.ml.tree_attributes import floats, forest_by_ids, forest_by_index
from qwrap.ops.registry import op

# onnxruntime counts LOGISTIC before SOFTMAX; the text of TreeEnsemble-5 has it the other way round.
TRANSFORM_NUMBERS = ("NONE", "LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO", "PROBIT")


@dataclass(frozen=True)
class Regression:
    """Trees whose leaves add up to numbers.

    Attributes:
        trees: the forest.
        aggregate: one of ``AGGREGATES``.
        post_transform: what becomes of the sums.
        base: what is added to each target, or None.
    """

    trees: Tables[Forest]
    aggregate: str
    post_transform: str
    base: Tensor | None

    def predict(self, X: Tensor) -> Tensor:
        """Return ``[rows, targets]``."""
        forest = self.trees.on(X.device)
        scores, there = forest.scores(forest.leaves(rows(X)), self.aggregate)
        if forest.target_count == 1:
            scores = torch.where(there, scores, 0.0)
        if self.base is not None:
            scores = scores + self.base.to(scores.device)
        if forest.target_count > 1:  # of several, one that no leaf adds to stays without its base
            scores = torch.where(there, scores, 0.0)
        return transform(scores, self.post_transform)


def _aggregate(name: str) -> str:
    if name not in AGGREGATES:
        raise UnsupportedOpError(f"aggregate_function={name!r} is none of {list(AGGREGATES)}")
    return name


def regression(
    *,
    aggregate_function: str = "SUM",
    base_values: Sequence[float] | None = None,
    base_values_as_tensor: Tensor | None = None,
    n_targets: int = 0,
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
    target_ids: Sequence[int] | None = None,
    target_nodeids: Sequence[int] | None = None,
    target_treeids: Sequence[int] = (),
    target_weights: Sequence[float] | None = None,
    target_weights_as_tensor: Tensor | None = None,
) -> Regression:
    """Return the trees of TreeEnsembleRegressor.

    Raises:
        ModelError: the attributes do not fit each other.
        UnsupportedOpError: an unknown mode, aggregate or transform.
    """
    forest = forest_by_ids(
        tree_ids=nodes_treeids,
        node_ids=nodes_nodeids,
        features=nodes_featureids,
        modes=nodes_modes,
        values=floats(nodes_values, nodes_values_as_tensor),
        true_ids=nodes_truenodeids,
        false_ids=nodes_falsenodeids,
        missing=nodes_missing_value_tracks_true,
        leaf_trees=target_treeids,
        leaf_nodes=target_nodeids,
        targets=target_ids,
        weights=floats(target_weights, target_weights_as_tensor),
        target_count=n_targets,
    )
    base = floats(base_values, base_values_as_tensor)
    if len(base) not in (0, n_targets):
        raise ModelError(f"{len(base)} base_values of {n_targets} targets")
    return Regression(
        Tables(forest),
        _aggregate(aggregate_function),
        check_transform(post_transform),
        base if len(base) else None,
    )


@op(
    "TreeEnsembleRegressor",
    since=(1, 3, 5),
    domain=DOMAIN,
    ignored=("nodes_hitrates", "nodes_hitrates_as_tensor"),
    prepare=regression,
)
def tree_ensemble_regressor(X: Tensor, *, prepared: Regression) -> Tensor:
    """Return ``[rows, targets]`` as float32."""
    return prepared.predict(X).float()


def ensemble(
    *,
    aggregate_function: int = 1,
    leaf_targetids: Sequence[int] = (),
    leaf_weights: Tensor | None = None,
    membership_values: Tensor | None = None,
    n_targets: int = 0,
    nodes_falseleafs: Sequence[int] = (),
    nodes_falsenodeids: Sequence[int] = (),
    nodes_featureids: Sequence[int] = (),
    nodes_missing_value_tracks_true: Sequence[int] | None = None,
    nodes_modes: Tensor | None = None,
    nodes_splits: Tensor | None = None,
    nodes_trueleafs: Sequence[int] = (),
    nodes_truenodeids: Sequence[int] = (),
    post_transform: int = 0,
    tree_roots: Sequence[int] = (),
) -> Regression:
    """Return the trees of TreeEnsemble.

    Raises:
        ModelError: the attributes do not fit each other.
        UnsupportedOpError: an unknown mode, aggregate or transform.
    """
    if leaf_weights is None or nodes_modes is None or nodes_splits is None:
        raise ModelError("TreeEnsemble needs leaf_weights, nodes_modes and nodes_splits")
    if not 0 <= post_transform < len(TRANSFORM_NUMBERS) or not 0 <= aggregate_function < len(
        AGGREGATES
    ):
        raise UnsupportedOpError(
            f"post_transform={post_transform}, aggregate_function={aggregate_function}"
        )
    forest = forest_by_index(
        features=nodes_featureids,
        modes=nodes_modes,
        splits=nodes_splits,
        true=(nodes_truenodeids, nodes_trueleafs),
        false=(nodes_falsenodeids, nodes_falseleafs),
        missing=nodes_missing_value_tracks_true,
        membership=membership_values,
        roots=tree_roots,
        targets=leaf_targetids,
        weights=leaf_weights,
        target_count=n_targets,
    )
    name = TRANSFORM_NUMBERS[post_transform]
    return Regression(Tables(forest), AGGREGATES[aggregate_function], name, None)


@op(
    "TreeEnsemble",
    since=(5,),
    domain=DOMAIN,
    ignored=("nodes_hitrates",),
    prepare=ensemble,
)
def tree_ensemble(X: Tensor, *, prepared: Regression) -> Tensor:
    """Return ``[rows, targets]`` in the type of ``X``."""
    return prepared.predict(X).to(X.dtype)
