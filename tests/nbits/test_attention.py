"""Queries and keys are told from what else a layer makes, by what becomes of them."""

from __future__ import annotations

from typing import Any

import pytest

from qwrap.graph.constants import Constants
from qwrap.graph.index import walk_nodes
from qwrap.graph.load import read_model
from qwrap.nbits.attention import makes_scores

WEIGHTS = {**dict.fromkeys("qkvo", (16, 16)), "b": (16,), "split": (3,)}
TRANSFORMER = """
    qm = MatMul(x, q) qb = Add(qm, b) qt = Mul(qb, b)
    km = MatMul(x, k) kt = Transpose<perm=[0,2,1]>(km)
    vm = MatMul(x, v)
    scores = MatMul(qt, kt) masked = Add(scores, m) weights = Softmax(masked)
    mixed = MatMul(weights, vm) y = MatMul(mixed, o)
"""


@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        (TRANSFORMER, {"/qm", "/km"}),
        ("h = MatMul(x, q) y = Softmax(h)", set()),
        ("a = MatMul(x, q) c = MatMul(x, k) y = MatMul(a, c)", set()),
        (
            "a = MatMul(x, q) c = MatMul(x, k) d = MatMul(x, v) "
            "y = com.microsoft.MultiHeadAttention<num_heads=2>(a, c, d)",
            {"/a", "/c"},
        ),
    ],
)
def test_projections_that_are_compared(small: Any, nodes: str, found: set[str]) -> None:
    inputs = "float[1,16,16] x" + (", float[1,1,16] m" if " m)" in nodes else "")
    weights = {name: shape for name, shape in WEIGHTS.items() if f" {name})" in nodes}
    source = small.build(nodes, weights, inputs, "float[1,16,16] y", opset=17)
    source.opset_import.add(domain="com.microsoft", version=1)
    model = read_model(source)
    constants = Constants(model)
    names = {n.name for n in walk_nodes(model.graph) if makes_scores(constants, n)}
    assert names & {"/qm", "/km", "/vm", "/y", "/h", "/a", "/c", "/d"} == found
