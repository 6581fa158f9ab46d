"""The caches of a decoder: which graph inputs and outputs they are, and how they are laid out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from qwrap.errors import ConfigError, ModelError
from qwrap.graph.index import FLOATS, OnnxGraph, ValueType
from qwrap.graph.nodes import domain_of
from qwrap.kv_cache.grids import Grids
from qwrap.kv_cache.layout import Layout
from qwrap.kv_cache.names import Role, is_past, is_present, role, slot
from qwrap.kv_cache.route import JOINS, Route, origins, trace

MICROSOFT = "com.microsoft"
LEAST_RANK = 3  # sequences, tokens, channels
REALS = tuple(dtype for dtype in FLOATS if dtype != ir.DataType.DOUBLE)

# Operators that take a past and make a present: index of the input -> of the output.
OPERATORS: Mapping[tuple[str, str], Mapping[int, int]] = {
    ("", "Attention"): {4: 1, 5: 2},
    (MICROSOFT, "Attention"): {4: 1},
    (MICROSOFT, "DecoderMaskedMultiHeadAttention"): {5: 1, 6: 2},
    (MICROSOFT, "DecoderMaskedSelfAttention"): {4: 1},
    (MICROSOFT, "GroupQueryAttention"): {3: 1, 4: 2},
    (MICROSOFT, "MultiHeadAttention"): {6: 1, 7: 2},
}

_ROLES_OF: Mapping[int, Role] = {1: "key", 2: "value"}
"""By the output of an operator that keeps them apart."""
FIVE = 5
Asked = str | tuple[str | None, str | None]


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """One cache: what comes in and what goes out.

    Attributes:
        past: graph input; None if the graph only makes the cache.
        present: graph output; None if the graph only reads it.
        role: whether it holds keys or values, if that is known.
        type: of the past if there is one.
        layout: its axes.
        route: how it gets from the one to the other as it is, if it does.
        operator: the node that takes the past and makes the present, if one does.
    """

    past: ir.Value | None
    present: ir.Value | None
    role: Role
    type: ValueType
    layout: Layout
    route: Route | None = None
    operator: ir.Node | None = None

    @property
    def name(self) -> str:
        """What to call it in messages."""
        value = self.past or self.present
        assert value is not None
        return value.name or ""

    @property
    def values(self) -> list[ir.Value]:
        """The graph inputs and outputs that it is."""
        return [v for v in (self.past, self.present) if v is not None]


def find_caches(graph: OnnxGraph, grids: Grids, asked: Sequence[Asked] | None) -> list[Pair]:
    """Return the caches of a decoder, in the order of its inputs.

    Pairs are found by the way from input to output where values are only moved, by operators that
    take a past and make a present, and by names; what is left of inputs and outputs that are named
    as caches are those that the graph only reads or only makes.

    Args:
        graph: of the decoder.
        grids: of it.
        asked: names of inputs and outputs, None for one that is missing; or patterns for the names
            of either, of which only those are taken that fit. None: all.

    Raises:
        ConfigError: a name is not that of such an input or output, or nothing fits a pattern.
        ModelError: there are no caches.
    """
    ends = _Ends(graph)
    pairs = [
        _pair(graph, grids, ends.input(each[0]), ends.output(each[1]))
        for each in asked or ()
        if isinstance(each, tuple)
    ]
    patterns = [each for each in asked or () if isinstance(each, str)]
    if asked is None or patterns:
        known = {value for pair in pairs for value in pair.values}
        found = [p for p in _all(graph, grids, ends) if not known & set(p.values)]
        pairs += found if asked is None else _fitting(found, patterns)
    if not pairs:
        raise ModelError(
            "found no cache: no float graph input of rank 3 or more is named past… or cache…, or "
            "reaches an output by operators that only move it; the inputs are "
            f"{ends.described(graph.inputs)}, the outputs {ends.described(graph.outputs)}; name "
            'them: caches=[("input", "output"), …]'
        )
    return pairs


def other_caches(graph: OnnxGraph, grids: Grids, pairs: Sequence[Pair]) -> list[Pair]:
    """Return the caches that are not among ``pairs``."""
    known = {value for pair in pairs for value in pair.values}
    return [pair for pair in _all(graph, grids, _Ends(graph)) if not known & set(pair.values)]


def _fitting(pairs: Iterable[Pair], patterns: Sequence[str]) -> list[Pair]:
    pairs = list(pairs)

    def fits(pair: Pair, pattern: str) -> bool:
        return any(fnmatchcase(value.name or "", pattern) for value in pair.values)

    for pattern in patterns:
        if not any(fits(pair, pattern) for pair in pairs):
            names = [pair.name for pair in pairs]
            raise ConfigError(f"caches: nothing fits {pattern!r}; found {names}")
    return [pair for pair in pairs if any(fits(pair, pattern) for pattern in patterns)]


class _Ends:
    """The graph inputs and outputs that could be caches."""

    def __init__(self, graph: OnnxGraph) -> None:
        self._graph = graph
        self.inputs = [v for v in graph.inputs if self._is_candidate(v)]
        self.outputs = [v for v in graph.outputs if self._is_candidate(v)]

    def _is_candidate(self, value: ir.Value) -> bool:
        kind = self._graph.type_of(value)
        rank = kind.rank
        return (
            kind.dtype in REALS and kind.kind == "tensor" and (rank is None or rank >= LEAST_RANK)
        )

    def input(self, name: str | None) -> ir.Value | None:
        """Return the graph input of that name."""
        return None if name is None else _named(name, self.inputs, "input")

    def output(self, name: str | None) -> ir.Value | None:
        """Return the graph output of that name."""
        return None if name is None else _named(name, self.outputs, "output")

    def described(self, values: Iterable[ir.Value]) -> str:
        """Return names and types for a message."""
        return ", ".join(f"{v.name} {_text(self._graph.type_of(v))}" for v in values)


def _text(kind: ValueType) -> str:
    dtype = "?" if kind.dtype is None else kind.dtype.name.lower()
    return dtype if kind.shape is None else f"{dtype}{list(kind.shape)}"


def _named(name: str, values: Sequence[ir.Value], what: str) -> ir.Value:
    known = {value.name or "": value for value in values}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"caches: no float graph {what} of rank {LEAST_RANK} or more is called {name!r}; "
            + (f"{near[0]!r}?" if near else f"there are {list(known)}")
        )
    return known[name]


# --- pairing -------------------------------------------------------------------------------------


def _all(graph: OnnxGraph, grids: Grids, ends: _Ends) -> list[Pair]:
    outputs = {**_by_name(ends), **_by_way(ends), **_by_operator(ends)}
    taken = set(outputs.values())
    if len(taken) < len(outputs):
        names = [f"{past.name} -> {present.name}" for past, present in outputs.items()]
        raise ModelError(f"two caches seem to end in one output: {names}; say which: caches=[…]")
    pairs = [
        _pair(graph, grids, past, outputs.get(past))
        for past in ends.inputs
        if past in outputs or is_past(past.name or "")
    ]
    alone = [v for v in ends.outputs if v not in taken and is_present(v.name or "")]
    return pairs + [_pair(graph, grids, None, value) for value in alone]


def _by_operator(ends: _Ends) -> dict[ir.Value, ir.Value]:
    outputs = set(ends.outputs)
    return {
        past: present
        for past in ends.inputs
        for node, index in past.uses()
        if (present := _made(node, index)) in outputs and present is not None
    }


def _made(node: ir.Node, index: int) -> ir.Value | None:
    output = OPERATORS.get(_type(node), {}).get(index)
    return None if output is None or output >= len(node.outputs) else node.outputs[output]


def _type(node: ir.Node) -> tuple[str, str]:
    return domain_of(node.domain), node.op_type


def _by_way(ends: _Ends) -> dict[ir.Value, ir.Value]:
    inputs, found = set(ends.inputs), dict[ir.Value, ir.Value]()
    for present in ends.outputs:
        pasts = origins(present) & inputs
        if len(pasts) != 1:
            continue
        past = pasts.pop()
        route = trace(past, present)
        if route is not None and route.joins:
            found[past] = present
    return found


def _by_name(ends: _Ends) -> dict[ir.Value, ir.Value]:
    pasts = _slots(v for v in ends.inputs if is_past(v.name or ""))
    presents = _slots(v for v in ends.outputs if is_present(v.name or ""))
    return {
        values[0]: presents[key][0]
        for key, values in pasts.items()
        if len(values) == 1 and len(presents.get(key, ())) == 1
    }


def _slots(values: Iterable[ir.Value]) -> dict[tuple[str, ...], list[ir.Value]]:
    found: dict[tuple[str, ...], list[ir.Value]] = {}
    for value in values:
        found.setdefault(slot(value.name or ""), []).append(value)
    return found


def _pair(graph: OnnxGraph, grids: Grids, past: ir.Value | None, present: ir.Value | None) -> Pair:
    ends = [v for v in (past, present) if v is not None]
    kind = graph.type_of(ends[0])
    if kind.shape is None:
        raise ModelError(f"cache {ends[0].name!r}: its rank is not known; declare its shape")
    operator, index = _operator(past, present)
    apart = operator is not None and len(OPERATORS[_type(operator)]) > 1
    meant = _ROLES_OF.get(index, "") if apart else ""
    named: Iterable[Role] = (role(v.name or "") for v in ends)
    route = None if past is None or present is None else trace(past, present)
    layout = _layout(kind.shape, past, route, grids)
    return Pair(
        past, present, meant or next(filter(None, named), ""), kind, layout, route, operator
    )


def _operator(past: ir.Value | None, present: ir.Value | None) -> tuple[ir.Node | None, int]:
    """Return the node that takes ``past`` and makes ``present``, and at which output."""
    for node, index in () if past is None else past.uses():
        if present is not None and _made(node, index) is present:
            return node, node.outputs.index(present)
    return None, 0


def _layout(
    shape: Sequence[int | str | None],
    past: ir.Value | None,
    route: Route | None,
    grids: Grids,
) -> Layout:
    """Tell the axes of a cache apart.

    Tokens lie along the axis on which something is joined; else along the last whose size is not
    fixed, but for the first such one; else along the last but one. Of the others, the first whose
    size is not fixed is that of the sequences, else the first one.
    """
    rank = len(shape)
    joined = []
    if route is not None and past is not None:
        stops = {a: grids.where_stopped(route, past, a, rank) for a in range(rank)}
        joined = [a for a, node in stops.items() if node is not None and node.op_type in JOINS]
    free = [a for a, n in enumerate(shape) if not isinstance(n, int)]
    usual = free[-1] if len(free) > 1 else rank - 2
    time = joined[0] if len(joined) == 1 else usual
    sequences = [a for a in free if a != time]
    first = 0 if rank < FIVE else 1  # keys and values of one layer come before the sequences
    return Layout(rank, next(iter(sequences), first if time != first else first + 1), time)
