"""ai.onnx.ml: ensembles of random trees against onnxruntime."""

from collections import defaultdict
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import qwrap
from qwrap import ops
from qwrap.errors import ModelError, UnsupportedOpError

DOMAIN = "ai.onnx.ml"
MODES = ["BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ"]
FEATURES = 3
# Sums of some ten votes, in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
rng = np.random.default_rng(8)


@pytest.fixture
def check_ml(check):
    return partial(check, domain=DOMAIN, **CLOSE)


def rows(dtype: Any = np.float32, has_nan: bool = False) -> np.ndarray:
    x = rng.integers(-3, 4, (25, FEATURES)).astype(dtype)
    if has_nan:
        x[rng.random(x.shape) < 0.2] = np.nan
    return x


def random_trees(count: int, depth: int) -> tuple[dict[str, list[Any]], list[tuple[int, int]]]:
    """Nodes that compare with whole numbers, so that all relations occur, and the leaves."""
    nodes: dict[str, list[Any]] = defaultdict(list)
    leaves = []

    def add(tree: int, depth: int) -> int:
        place = len(nodes["nodes_treeids"])
        own = nodes["nodes_treeids"].count(tree)
        is_leaf = depth == 0 or rng.random() < 0.2
        nodes["nodes_treeids"].append(tree)
        nodes["nodes_nodeids"].append(own)
        nodes["nodes_featureids"].append(int(rng.integers(FEATURES)))
        nodes["nodes_modes"].append("LEAF" if is_leaf else str(rng.choice(MODES)))
        nodes["nodes_values"].append(float(rng.integers(-2, 3)))
        nodes["nodes_missing_value_tracks_true"].append(int(rng.integers(2)))
        nodes["nodes_truenodeids"].append(0)
        nodes["nodes_falsenodeids"].append(0)
        if is_leaf:
            leaves.append((tree, own))
        else:
            nodes["nodes_truenodeids"][place] = add(tree, depth - 1)
            nodes["nodes_falsenodeids"][place] = add(tree, depth - 1)
        return own

    for tree in range(count):
        add(tree, depth)
    return dict(nodes), leaves


def votes(leaves: list[tuple[int, int]], targets: list[int], prefix: str, low: float) -> Any:
    chosen = [(*leaf, target) for leaf in leaves for target in targets]
    weights = rng.uniform(low, 0.2, len(chosen)).astype(np.float32)
    return {
        f"{prefix}_treeids": [tree for tree, _, _ in chosen],
        f"{prefix}_nodeids": [node for _, node, _ in chosen],
        f"{prefix}_ids": [target for _, _, target in chosen],
        f"{prefix}_weights": weights.tolist(),
    }


@pytest.mark.parametrize("aggregate", ["SUM", "AVERAGE", "MIN", "MAX"])
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("depth", [0, 1, 4])
def test_regression_equals_onnxruntime(check_ml, aggregate, targets, depth) -> None:
    check = check_ml
    nodes, leaves = random_trees(7, depth)
    attributes = nodes | votes(leaves, list(range(targets)), "target", -0.2)
    attributes |= {"n_targets": targets, "aggregate_function": aggregate}
    check("TreeEnsembleRegressor", 1, [rows()], attributes)
    check("TreeEnsembleRegressor", 3, [rows(has_nan=True)], attributes)
    check("TreeEnsembleRegressor", 1, [rows(np.float64)], attributes)
    based = attributes | {"base_values": [0.5, -0.5, 2.0][:targets]}
    check("TreeEnsembleRegressor", 1, [rows()], based)
    del attributes["nodes_missing_value_tracks_true"]
    check("TreeEnsembleRegressor", 1, [rows(has_nan=True)], attributes)


@pytest.mark.parametrize("post_transform", ["SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT"])
@pytest.mark.parametrize("targets", [1, 3])
def test_transformed_regression_equals_onnxruntime(check_ml, targets, post_transform) -> None:
    nodes, leaves = random_trees(4, 3)
    attributes = nodes | votes(leaves, list(range(targets)), "target", 0.01)
    attributes |= {"n_targets": targets, "post_transform": post_transform}
    check_ml("TreeEnsembleRegressor", 1, [rows()], attributes)


@pytest.mark.parametrize("aggregate", ["SUM", "MIN", "MAX"])
def test_targets_without_votes_equal_onnxruntime(check_ml, aggregate) -> None:
    nodes, leaves = random_trees(2, 2)
    attributes = nodes | votes(leaves, [1], "target", -0.2)
    attributes |= {"n_targets": 3, "aggregate_function": aggregate, "base_values": [0.5, 1.0, 2.0]}
    check_ml("TreeEnsembleRegressor", 1, [rows()], attributes)


def test_double_thresholds_are_compared_as_doubles(check_ml) -> None:
    nodes, leaves = random_trees(3, 3)
    attributes = nodes | votes(leaves, [0], "target", -0.2) | {"n_targets": 1}
    values = np.array(attributes.pop("nodes_values")) + 1e-12
    weights = np.array(attributes.pop("target_weights"))
    attributes |= {"nodes_values_as_tensor": values, "target_weights_as_tensor": weights}
    check_ml("TreeEnsembleRegressor", 3, [rows(np.float64) + 1e-12], attributes)


@pytest.mark.parametrize("post_transform", ["NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO"])
@pytest.mark.parametrize("low", [-0.2, 0.0])
@pytest.mark.parametrize("voted", [[0], [1], [0, 1], [0, 1, 2]])
@pytest.mark.parametrize("kind", ["int64s", "strings"])
def test_classes_equal_onnxruntime(check_ml, voted, low, post_transform, kind) -> None:
    check = check_ml
    count = max(2, len(voted))
    labels = [10, 13, 16] if kind == "int64s" else ["a", "b", "c"]
    nodes, leaves = random_trees(5, 3)
    attributes = nodes | votes(leaves, voted, "class", low) | {"post_transform": post_transform}
    attributes[f"classlabels_{kind}"] = labels[:count]
    for base in ([], [0.3, 0.4, 0.1][:count], *([] if count > 2 or voted == [0, 1] else [[0.3]])):
        given = attributes | ({"base_values": base} if base else {})
        check("TreeEnsembleClassifier", 3, [rows(has_nan=True)], given, outputs=2)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.int64])
def test_classes_of_other_types_equal_onnxruntime(check_ml, dtype) -> None:
    nodes, leaves = random_trees(5, 3)
    attributes = nodes | votes(leaves, [0, 1, 2], "class", 0.0)
    attributes["classlabels_strings"] = ["a", "b", "c"]
    check_ml("TreeEnsembleClassifier", 1, [rows(dtype)], attributes, outputs=2)


@pytest.mark.parametrize("base", [[], [0.1]])
def test_one_class_equals_onnxruntime(check_ml, base) -> None:
    nodes, leaves = random_trees(5, 3)
    attributes = nodes | votes(leaves, [0], "class", -0.2) | {"classlabels_int64s": [5]}
    attributes |= {"base_values": base} if base else {}
    check_ml("TreeEnsembleClassifier", 1, [rows()], attributes, outputs=2)


def random_ensemble(depth: int, targets: int, dtype: Any) -> dict[str, Any]:
    """Attributes of TreeEnsemble, tests for membership included."""
    nodes: dict[str, list[Any]] = defaultdict(list)
    leaves: dict[str, list[Any]] = defaultdict(list)
    members: list[float] = []

    def add(depth: int) -> int:
        place, mode = len(nodes["nodes_modes"]), int(rng.integers(7))
        nodes["nodes_modes"].append(mode)
        nodes["nodes_featureids"].append(int(rng.integers(FEATURES)))
        nodes["nodes_splits"].append(float(rng.integers(-2, 3)))
        nodes["nodes_missing_value_tracks_true"].append(int(rng.integers(2)))
        if mode == 6:
            members.extend((*rng.choice(7, int(rng.integers(1, 5)), replace=False) - 3.0, np.nan))
        for side in ("true", "false"):
            nodes[f"nodes_{side}leafs"].append(int(depth == 0 or rng.random() < 0.2))
            nodes[f"nodes_{side}nodeids"].append(0)
        for side in ("true", "false"):
            if nodes[f"nodes_{side}leafs"][place]:
                nodes[f"nodes_{side}nodeids"][place] = len(leaves["weights"])
                leaves["weights"].append(rng.uniform(-1, 1))
                leaves["targets"].append(int(rng.integers(targets)))
            else:
                nodes[f"nodes_{side}nodeids"][place] = add(depth - 1)
        return place

    roots = [add(depth) for _ in range(3)]
    attributes: dict[str, Any] = dict(nodes)
    attributes["nodes_modes"] = np.array(nodes["nodes_modes"], np.uint8)
    attributes["nodes_splits"] = np.array(nodes["nodes_splits"], dtype)
    attributes |= {"leaf_weights": np.array(leaves["weights"], dtype), "tree_roots": roots}
    attributes |= {"leaf_targetids": leaves["targets"], "n_targets": targets}
    return attributes | ({"membership_values": np.array(members, dtype)} if members else {})


@pytest.mark.parametrize("aggregate", [0, 1, 2, 3])
@pytest.mark.parametrize("depth", [0, 2, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ensembles_equal_onnxruntime(check_ml, aggregate, depth, dtype) -> None:
    check = check_ml
    attributes = random_ensemble(depth, 2, dtype) | {"aggregate_function": aggregate}
    check("TreeEnsemble", 5, [rows(dtype)], attributes)
    check("TreeEnsemble", 5, [rows(dtype, has_nan=True)], attributes)


@pytest.mark.parametrize("post_transform", [1, 2, 3])
def test_transformed_ensembles_equal_onnxruntime(check_ml, post_transform) -> None:
    attributes = random_ensemble(3, 3, np.float32) | {"post_transform": post_transform}
    check_ml("TreeEnsemble", 5, [rows()], attributes)


STUMP: dict[str, Any] = {
    "nodes_treeids": [0, 0, 0],
    "nodes_nodeids": [0, 1, 2],
    "nodes_featureids": [0, 0, 0],
    "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"],
    "nodes_values": [0.0, 0.0, 0.0],
    "nodes_truenodeids": [1, 0, 0],
    "nodes_falsenodeids": [2, 0, 0],
    "target_treeids": [0, 0],
    "target_nodeids": [1, 2],
    "target_ids": [0, 0],
    "target_weights": [1.0, 2.0],
    "n_targets": 1,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"nodes_truenodeids": [0, 0, 0]}, ModelError, "loop"),
        ({"nodes_truenodeids": [7, 0, 0]}, ModelError, r"\(0, 7\) are not there"),
        ({"nodes_featureids": [0]}, ModelError, "nodes_featureids has 1 values; 3"),
        ({"target_ids": [0, 1]}, ModelError, r"outside \[0, 1\)"),
        ({"nodes_modes": ["BRANCH_NEAR", "LEAF", "LEAF"]}, UnsupportedOpError, "BRANCH_NEAR"),
        ({"aggregate_function": "MEDIAN"}, UnsupportedOpError, "'MEDIAN' is none of"),
        ({"base_values": [1.0, 2.0]}, ModelError, "2 base_values"),
    ],
)
def test_trees_that_do_not_fit_are_refused(change, error, message) -> None:
    operator = ops.find(DOMAIN, "TreeEnsembleRegressor", 3)
    assert operator is not None
    with pytest.raises(error, match=message):
        operator.bind(STUMP | change)


def test_a_loaded_ensemble_copies_and_compiles_into_one_graph() -> None:
    import copy

    from onnx import TensorProto, helper

    node = helper.make_node("TreeEnsembleRegressor", ["x"], ["y"], domain=DOMAIN, **STUMP)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
    )
    imports = [helper.make_opsetid(DOMAIN, 3), helper.make_opsetid("", 17)]
    model = copy.deepcopy(qwrap.load(helper.make_model(graph, opset_imports=imports)))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert compiled(torch.tensor([[-1.0], [1.0]])).tolist() == [[1.0], [2.0]]
