"""From the attributes of the tree operators to a forest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qwrap.errors import ModelError
from qwrap.ops.ml.forest import LEAF, MEMBER, MODES, Forest, Ints, Nodes, grow, mode_indices


def _ints(values: Sequence[int] | None, count: int, name: str) -> Ints:
    if values is None or len(values) != count:
        raise ModelError(f"{name} has {len(values or ())} values; {count} are needed")
    return np.array(values, np.int64)


def floats(values: Sequence[float] | None, tensor: Tensor | None) -> Tensor:
    """Return the values of two attributes of which one is used."""
    return torch.tensor(values or [], dtype=torch.float32) if tensor is None else tensor.flatten()


def forest_by_ids(
    *,
    tree_ids: Sequence[int],
    node_ids: Sequence[int] | None,
    features: Sequence[int] | None,
    modes: Sequence[str] | None,
    values: Tensor,
    true_ids: Sequence[int] | None,
    false_ids: Sequence[int] | None,
    missing: Sequence[int] | None,
    leaf_trees: Sequence[int],
    leaf_nodes: Sequence[int] | None,
    targets: Sequence[int] | None,
    weights: Tensor,
    target_count: int,
) -> Forest:
    """Return the forest of nodes that are named by tree and number, as until revision 3.

    Raises:
        ModelError: attributes differ in length, or name a node that is not there.
        UnsupportedOpError: an unknown mode.
    """
    count = len(tree_ids)
    trees, ids = _ints(tree_ids, count, "nodes_treeids"), _ints(node_ids, count, "nodes_nodeids")
    place = {pair: i for i, pair in enumerate(zip(trees.tolist(), ids.tolist(), strict=True))}
    if not count or len(place) != count or modes is None or len(modes) != count:
        raise ModelError(f"{len(place)} different nodes and {len(modes or ())} modes of {count}")
    kinds = mode_indices(modes)
    if len(values) != count or len(weights) != len(leaf_trees):
        raise ModelError(f"{len(values)} values of {count} nodes, {len(weights)} weights")

    def places(of: Ints, numbers: Ints, kept: Ints) -> Ints:
        pairs = zip(of.tolist(), numbers.tolist(), kept.tolist(), strict=True)
        try:
            return np.array([place[tree, n] if keep else 0 for tree, n, keep in pairs], np.int64)
        except KeyError as error:
            raise ModelError(f"tree and node {error} are not there") from error

    inner = (kinds != LEAF).astype(np.int64)
    own = _ints(leaf_trees, len(leaf_trees), "treeids of weights")
    nodes = Nodes(
        modes=kinds,
        features=_ints(features, count, "nodes_featureids") * inner,
        values=values,
        true=places(trees, _ints(true_ids, count, "nodes_truenodeids"), inner),
        false=places(trees, _ints(false_ids, count, "nodes_falsenodeids"), inner),
        missing=_ints(missing, count, "nodes_missing_value_tracks_true")
        if missing
        else np.zeros(count, np.int64),
        roots=np.flatnonzero(np.diff(trees, prepend=trees[0] - 1)),
        members={},
    )
    leaves = places(own, _ints(leaf_nodes, len(own), "nodeids of weights"), np.ones_like(own))
    return grow(nodes, leaves, _ints(targets, len(own), "ids of weights"), weights, target_count)


def forest_by_index(
    *,
    features: Sequence[int],
    modes: Tensor,
    splits: Tensor,
    true: tuple[Sequence[int], Sequence[int]],
    false: tuple[Sequence[int], Sequence[int]],
    missing: Sequence[int] | None,
    membership: Tensor | None,
    roots: Sequence[int],
    targets: Sequence[int],
    weights: Tensor,
    target_count: int,
) -> Forest:
    """Return the forest of TreeEnsemble-5: leaves apart from the nodes, both found by index.

    Args:
        features: of each inner node.
        modes: of each inner node.
        splits: of each inner node.
        true: of each inner node the index of the next node or leaf, and whether it is a leaf.
        false: likewise.
        missing: 1 where NaN takes the true branch.
        membership: the members of all tests, NaN after those of each.
        roots: inner nodes.
        targets: of each leaf.
        weights: of each leaf.
        target_count: how many targets there are.

    Raises:
        ModelError: attributes differ in length, or an index is out of range.
    """
    count, leaf_count = len(features), len(weights)
    kinds = np.asarray(modes.flatten().numpy(), np.int64)
    if len(kinds) != count or len(splits) != count or (kinds > MEMBER).any():
        raise ModelError(f"{len(kinds)} modes {MODES[:-1]}, {len(splits)} splits, {count} nodes")
    nodes = Nodes(
        modes=np.concatenate((kinds, np.full(leaf_count, LEAF))),
        features=np.concatenate((_ints(features, count, "features"), np.zeros(leaf_count, int))),
        values=torch.cat((splits.flatten(), splits.new_zeros(leaf_count))),
        true=_next(*true, count, leaf_count),
        false=_next(*false, count, leaf_count),
        missing=np.zeros(count + leaf_count, np.int64),
        roots=_ints(roots, len(roots), "tree_roots"),
        members=_members(kinds, membership),
    )
    if missing:
        nodes.missing[:count] = _ints(missing, count, "nodes_missing_value_tracks_true")
    if not len(nodes.roots) or not 0 <= nodes.roots.min() <= nodes.roots.max() < count:
        raise ModelError(f"tree_roots {list(roots)} of {count} nodes")
    leaves = np.arange(count, count + leaf_count)
    ids = _ints(targets, leaf_count, "leaf_targetids")
    return grow(nodes, leaves, ids, weights.flatten(), target_count)


def _next(index: Sequence[int], is_leaf: Sequence[int], count: int, leaf_count: int) -> Ints:
    """Return the next nodes where leaves come after the inner nodes."""
    at, leaf = _ints(index, count, "node ids"), _ints(is_leaf, count, "leaf flags") != 0
    if (at < 0).any() or (at >= np.where(leaf, leaf_count, count)).any():
        raise ModelError("the id of a node or leaf is out of range")
    return np.concatenate((np.where(leaf, at + count, at), np.zeros(leaf_count, np.int64)))


def _members(kinds: Ints, membership: Tensor | None) -> dict[int, Sequence[float]]:
    tests = np.flatnonzero(kinds == MEMBER).tolist()
    listed = [] if membership is None else membership.flatten().tolist()
    ends = [i for i, value in enumerate(listed) if value != value]
    if len(ends) < len(tests) - 1 or (tests and not listed):
        raise ModelError(f"membership_values end {len(ends)} sets; {len(tests)} nodes have one")
    starts = [0, *(end + 1 for end in ends)]
    stops = [*ends, len(listed)]
    return {test: listed[starts[i] : stops[i]] for i, test in enumerate(tests)}
