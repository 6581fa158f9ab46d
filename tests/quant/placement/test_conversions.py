"""The types of tensors: no other choice needs fewer conversions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import onnx_ir as ir
from hypothesis import given
from hypothesis import strategies as st

import qwrap
from qwrap.config import QuantSpec
from qwrap.dtypes import quant_type
from qwrap.quant.placement.conversions import Chosen, Tree, choose_types

KINDS = ("uint8", "int8", "uint16", "uint4")


def spec_of(kind: str) -> QuantSpec:
    return QuantSpec(dtype=kind, symmetric=False)


@dataclass
class Plain:
    """A tensor: the types of its readers, and (asked type or None, outputs) of what moves it."""

    readers: list[str]
    movers: list[tuple[str | None, list[Plain]]] = field(default_factory=list)


kinds = st.sampled_from(KINDS)
leaves = st.builds(Plain, st.lists(kinds, min_size=1, max_size=3))
plains = st.recursive(
    leaves,
    lambda inner: st.builds(
        Plain,
        st.lists(kinds, max_size=2),
        st.lists(
            st.tuples(st.none() | kinds, st.lists(inner, min_size=1, max_size=2)),
            min_size=1,
            max_size=2,
        ),
    ),
    max_leaves=4,
)


def tree_of(plain: Plain) -> Tree:
    tree = Tree(ir.Value(name="t"))
    for kind in plain.readers:
        tree.readers.append(((ir.Node("", "Sigmoid", [tree.value]), 0), spec_of(kind)))
    for asked, outputs in plain.movers:
        use = ir.Node("", "Split", [tree.value]), 0
        spec = None if asked is None else spec_of(asked)
        tree.movers.append((use, spec, [tree_of(output) for output in outputs]))
    return tree


def movers(plain: Plain) -> Iterator[tuple[str | None, list[Plain]]]:
    for mover in plain.movers:
        yield mover
        for output in mover[1]:
            yield from movers(output)


def bits(kind: str) -> int:
    return quant_type(kind).bits


def widest(plain: Plain) -> int:
    """The most bits that is asked for of a tensor, or of what it is moved to."""
    asked = [bits(kind) for kind in plain.readers]
    for kind, outputs in plain.movers:
        asked += [bits(kind)] if kind else map(widest, outputs)
    return max(asked, default=0)


def conversions(plain: Plain, base: str, types: Iterator[str]) -> float:
    """How many conversions there are, with the type of each mover next in ``types``."""
    read, below = set(plain.readers), 0.0
    for asked, outputs in plain.movers:
        kind = next(types)
        read.add(kind)
        if not asked and bits(kind) < min(bits(base), max(map(widest, outputs))):
            below += math.inf  # a reader asks for what would be lost
        below += sum(conversions(output, kind, types) for output in outputs)
    return len(read - {base}) + below


def fewest(plain: Plain, written: str | None) -> float:
    options = [[asked] if asked else KINDS for asked, _ in movers(plain)]
    bases = [written] if written else KINDS
    return min(
        conversions(plain, base, iter(types)) for base in bases for types in product(*options)
    )


def count(chosen: Chosen) -> int:
    return sum(len(found) for found in chosen.converted.values())


@given(plain=plains, written=st.none() | kinds)
def test_no_choice_of_types_needs_fewer_conversions(plain: Plain, written: str | None) -> None:
    chosen = choose_types([(tree_of(plain), written and spec_of(written))])
    assert count(chosen) == fewest(plain, written)


@given(plain=plains, written=st.none() | kinds)
def test_every_reader_gets_the_type_that_it_asks_for(plain: Plain, written: str | None) -> None:
    tree = tree_of(plain)
    chosen = choose_types([(tree, written and spec_of(written))])
    waiting = [tree]
    while waiting:
        found = waiting.pop()
        base = chosen.bases[found.value].dtype
        for (node, index), spec in found.readers:
            assert (chosen.received(found.value, node, index) or base) == spec.dtype
        for (node, index), spec, outputs in found.movers:
            kind = chosen.received(found.value, node, index) or base
            assert spec is None or kind == spec.dtype
            assert all(chosen.bases[output.value].dtype == kind for output in outputs)
            waiting += outputs


def test_what_float_nodes_write_has_the_widest_type_that_is_asked_for() -> None:
    tree = tree_of(Plain(["uint8", "uint16", "uint8"]))
    chosen = choose_types([(tree, None)])
    assert str(chosen.bases[tree.value].dtype) == "uint16"
    ((kind, (_, uses)),) = chosen.converted[tree.value].items()
    assert (str(kind), len(uses)) == ("uint8", 2)


def test_values_are_moved_in_fewer_bits_where_conversions_are_as_many() -> None:
    inner = Plain(["uint8"])
    tree = tree_of(Plain([], [(None, [inner])]))
    chosen = choose_types([(tree, spec_of("uint16"))])
    output = tree.movers[0][2][0].value
    assert str(chosen.bases[output].dtype) == "uint8"
    assert count(chosen) == 1


def test_a_tensor_is_converted_once_for_all_that_read_the_type() -> None:
    chosen = choose_types([(tree_of(Plain(["int8"] * 3)), spec_of("uint8"))])
    assert count(chosen) == 1


def test_nothing_is_moved_in_fewer_bits_than_its_readers_ask_for(small: Any) -> None:
    nodes = (
        "a = Conv<pads=[1,1,1,1]>(x, w1) y = Conv(a, w2) m = MaxPool<kernel_shape=[2,2]>(a) "
        "z = Conv(m, w3)"
    )
    weights = {"w1": (6, 3, 3, 3), "w2": (4, 6, 3, 3), "w3": (4, 6, 3, 3)}
    model = qwrap.load(small.build(nodes, weights, outputs="float[N,4,6,6] y, float[N,4,5,5] z"))
    config = qwrap.QConfig(scope="all")
    config.set("/y", activation="int4")
    config.set("/z", activation="uint16")
    plan = qwrap.prepare(model, config)
    kinds = {key: str(tensor.spec.dtype) for key, tensor in plan.tensors.items()}
    assert kinds["m"] in ("uint8", "uint16")  # through int4 it would cost as many conversions


def test_what_float_nodes_move_is_not_converted_for_them(small: Any) -> None:
    nodes = "a = Conv(x, w) t = Transpose<perm=[0,1,3,2]>(x) y = Conv(t, w)"
    model = qwrap.load(
        small.build(nodes, {"w": (3, 3, 1, 1)}, outputs="float[N,3,8,8] a, float[N,3,8,8] y")
    )
    config = qwrap.QConfig(scope="kernels")
    config.set("/y", activation="uint16")
    plan = qwrap.prepare(model, config)
    assert plan.nodes["/t"].role == "float"
    assert not plan.tensors["x"].conversions
    assert plan.tensors["t"].source == "t"


def test_what_was_moved_from_a_conversion_is_converted_again(small: Any, quantized: Any) -> None:
    nodes = (
        "a = Conv(x, w) m = Transpose<perm=[0,1,3,2]>(a) y = Conv(m, w) z = Conv(m, w) "
        "u = Conv(a, w)"
    )
    source = small.build(
        nodes,
        {"w": (3, 3, 1, 1)},
        outputs="float[N,3,8,8] y, float[N,3,8,8] z, float[N,3,8,8] u",
    )
    config = qwrap.QConfig(scope="kernels")
    config.set(["/m", "/y"], activation="uint16")
    config.set("/z", activation="uint4")
    made = quantized(source, config=config)
    plan = made.model.plan
    assert plan.tensors["m"].source == "a_convert"
    assert {str(c.spec.dtype) for _, c in plan.conversions()} == {"uint16", "uint4"}
    assert made.verify().specification.worst_step <= 1
    narrow = made.model.tap(plan.point_of("m_convert"))
    wide = made.model.tap(plan.point_of("a_convert"))
    # 4 bits of the same range, or of what calibration saw within it
    assert float(narrow.scale) * 15 <= float(wide.scale) * 65535 * (1 + 1e-6)
