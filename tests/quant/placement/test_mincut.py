"""The minimum cut against all splits of small networks."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from qwrap.quant.placement.mincut import NEVER, Network

costs = st.integers(0, 9)


@st.composite
def networks(draw):
    nodes = draw(st.lists(st.tuples(costs, costs), min_size=1, max_size=6))
    ends = st.integers(2, len(nodes) + 1)
    return nodes, draw(st.lists(st.tuples(ends, ends, costs), max_size=12))


def cost(chosen, nodes, edges):
    own = sum(a if i in chosen else b for i, (a, b) in enumerate(nodes, start=2))
    return own + sum(c for a, b, c in edges if a in chosen and b not in chosen)


@given(networks())
def test_no_split_is_cheaper(network) -> None:
    nodes, edges = network
    flow = Network()
    for pair in nodes:
        flow.add_node(*pair)
    for edge in edges:
        flow.add_edge(*edge)
    every = range(2, len(nodes) + 2)
    splits = itertools.chain.from_iterable(
        itertools.combinations(every, n) for n in range(len(nodes) + 1)
    )
    best = min(cost(set(split), nodes, edges) for split in splits)
    assert cost(flow.source_side(), nodes, edges) == best


def test_a_cost_of_never_is_never_paid() -> None:
    flow = Network()
    a, b = flow.add_node(0, 5), flow.add_node(4, 0)
    flow.add_edge(a, b, NEVER)
    assert flow.source_side() == {a, b}  # together at 4, as apart is forbidden and 5 is dearer
