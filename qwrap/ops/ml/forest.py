"""Decision trees as tables, walked level by level: all rows and all trees at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwrap.errors import ModelError, UnsupportedOpError

MODES = (
    *("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ"),
    *("BRANCH_MEMBER", "LEAF"),
)
LEAF = MODES.index("LEAF")
MEMBER = MODES.index("BRANCH_MEMBER")
# Whether a node of each mode takes its true branch if the feature is less, equal, greater, NaN.
BRANCHES = (
    *((1, 1, 0, 0), (1, 0, 0, 0), (0, 1, 1, 0), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 1, 1)),
    *((0, 0, 0, 0), (0, 0, 0, 0)),
)

AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Nodes:
    """All nodes of all trees, leaves too.

    Attributes:
        modes: index into ``MODES``.
        features: which feature is compared.
        values: what with.
        true: the next node if the comparison holds; a leaf has itself.
        false: the next node if not.
        missing: 1 where NaN takes the true branch.
        roots: the first node of each tree.
        members: node -> the values of a test for membership.
    """

    modes: Ints
    features: Ints
    values: Tensor
    true: Ints
    false: Ints
    missing: Ints
    roots: Ints
    members: dict[int, Sequence[float]]


@dataclass(frozen=True)
class Forest:
    """Trees to walk.

    Attributes:
        features: ``[nodes]``.
        values: ``[nodes]``.
        taken: node and relation (less, equal, greater, NaN) -> the next node, ``[nodes * 4]``.
        roots: ``[trees]``.
        depth: how many steps lead to the lowest leaf.
        members: the values of each test for membership, filled with NaN, ``[tests, values]``.
        member_tests: node -> its test, the last without values; None: no node has one.
        targets: the targets that a leaf adds to, ``[nodes, width]``, filled with ``target_count``.
        weights: what it adds, ``[nodes, width]``.
        target_count: how many targets there are.
    """

    features: Tensor
    values: Tensor
    taken: Tensor
    roots: Tensor
    depth: int
    members: Tensor
    member_tests: Tensor | None
    targets: Tensor
    weights: Tensor
    target_count: int

    def leaves(self, X: Tensor) -> Tensor:
        """Return the leaf that each row reaches in each tree, ``[rows, trees]``."""
        node = self.roots.expand(len(X), -1)
        for _ in range(self.depth):
            x, value = X.gather(1, self.features[node]), self.values[node]
            relation = (x >= value).long() + (x > value) + 3 * x.isnan()
            if self.member_tests is not None:
                is_member = (x[..., None] == self.members[self.member_tests[node]]).any(-1)
                relation = torch.where(is_member, 1, relation)
            node = self.taken[4 * node + relation]
        return node

    def scores(self, leaves: Tensor, aggregate: str) -> tuple[Tensor, Tensor]:
        """Return ``[rows, targets]``: what the leaves give, and whether any gives anything."""
        targets = self.targets[leaves].flatten(1)
        weights = self.weights[leaves].flatten(1)
        empty = weights.new_zeros(len(leaves), self.target_count + 1)
        there = empty.scatter_add(1, targets, torch.ones_like(weights))[:, :-1] > 0
        if aggregate in ("SUM", "AVERAGE"):
            scores = empty.scatter_add(1, targets, weights)
            scores = scores / len(self.roots) if aggregate == "AVERAGE" else scores
        else:
            how = "amin" if aggregate == "MIN" else "amax"
            scores = empty.scatter_reduce(1, targets, weights, how, include_self=False)
        return scores[:, :-1], there


def grow(
    nodes: Nodes,
    leaves: Ints,
    targets: Ints,
    weights: Tensor,
    target_count: int,
) -> Forest:
    """Return the trees to walk.

    Args:
        nodes: all nodes.
        leaves: the node of each weight.
        targets: the target of each weight.
        weights: what the leaves give.
        target_count: how many targets there are.

    Raises:
        ModelError: the trees have a loop, or a target is out of range.
    """
    if len(targets) and not 0 <= targets.min() <= targets.max() < target_count:
        raise ModelError(f"target or class ids outside [0, {target_count})")
    taken = np.array(BRANCHES)[nodes.modes]
    taken[:, 3] |= nodes.missing
    taken[nodes.modes == MEMBER, 1] = 1
    following = np.where(taken == 1, nodes.true[:, None], nodes.false[:, None])
    following[nodes.modes == LEAF] = np.flatnonzero(nodes.modes == LEAF)[:, None]
    table, filled = _per_leaf(len(nodes.modes), leaves, targets, weights, target_count)
    members, tests = _membership(nodes)
    is_test = torch.from_numpy(nodes.modes == MEMBER)
    return Forest(
        features=torch.from_numpy(nodes.features),
        values=nodes.values.masked_fill(is_test, torch.nan),  # equals nothing but a member
        taken=torch.from_numpy(following.flatten()),
        roots=torch.from_numpy(nodes.roots),
        depth=_depth(nodes),
        members=members,
        member_tests=tests,
        targets=table,
        weights=filled,
        target_count=target_count,
    )


def mode_indices(names: Sequence[str]) -> Ints:
    """Return the index of each mode in ``MODES``.

    Raises:
        UnsupportedOpError: an unknown mode.
    """
    unknown = sorted(set(names) - set(MODES))
    if unknown:
        raise UnsupportedOpError(f"nodes_modes {unknown} are none of {list(MODES)}")
    index = {name: i for i, name in enumerate(MODES)}
    return np.array([index[name] for name in names], np.int64)


def _depth(nodes: Nodes) -> int:
    level, depth = np.unique(nodes.roots), 0
    while True:
        level = level[nodes.modes[level] != LEAF]
        if not len(level):
            return depth
        depth += 1
        if depth > len(nodes.modes):
            raise ModelError("the trees have a loop")
        level = np.unique(np.concatenate((nodes.true[level], nodes.false[level])))


def _per_leaf(
    count: int, leaves: Ints, targets: Ints, weights: Tensor, target_count: int
) -> tuple[Tensor, Tensor]:
    """Return targets and weights as ``[nodes, most of one leaf]``."""
    order = np.argsort(leaves, kind="stable")
    ordered = leaves[order]
    place = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    width = int(place.max(initial=0)) + 1
    table = np.full((count, width), target_count, np.int64)
    table[ordered, place] = targets[order]
    filled = weights.new_zeros(count, width)
    filled[torch.from_numpy(ordered), torch.from_numpy(place)] = weights[torch.from_numpy(order)]
    return torch.from_numpy(table), filled


def _membership(nodes: Nodes) -> tuple[Tensor, Tensor | None]:
    if not nodes.members:
        return nodes.values.new_zeros(0, 0), None
    width = max(map(len, nodes.members.values()))
    table = np.full((len(nodes.members) + 1, max(width, 1)), np.nan)
    tests = np.full(len(nodes.modes), len(nodes.members))
    for test, (node, values) in enumerate(nodes.members.items()):
        table[test, : len(values)] = values
        tests[node] = test
    return torch.from_numpy(table).to(nodes.values.dtype), torch.from_numpy(tests)
