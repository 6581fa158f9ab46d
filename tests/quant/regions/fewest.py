"""The least number of conversions, by trying all types of whatever only moves values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

import onnx_ir as ir

import qwrap
from qwrap.dtypes import quant_type
from qwrap.quant.placement.regions import Types

SKIPPED = {"Where": (0,), "Clip": (1, 2), "Resize": (1, 2, 3)}
IMPOSSIBLE = 10**6


def computed_floats(model: qwrap.WrappedModel, key: str) -> Iterator[int]:
    """Yield the indices of a node's inputs that are float tensors made while the model runs."""
    node = model.graph.nodes[key]
    for index, value in enumerate(node.inputs):
        if value is None or index in SKIPPED.get(node.op_type, ()):
            continue
        if model.layout.values.is_computed(value) and model.graph.type_of(value).is_float:
            yield index


def bits(kind: str) -> int:
    return quant_type(kind).bits


class Fewest:
    """Brute force over the types of nodes that move values and were not given one."""

    def __init__(self, model: qwrap.WrappedModel, config: qwrap.QConfig) -> None:
        self.model, self.plan, self.graph = model, model.plan, model.graph
        self.kinds = {k: n.dtype for k, n in self.plan.nodes.items() if n.dtype}
        wishes = Types(model.layout, config)
        self.free = [
            key
            for key, node in self.plan.nodes.items()
            if (node.role == "moves" and node.dtype and (key, 0) not in self.plan.constants)
            and not wishes.is_chosen(self.graph.nodes[key])
        ]
        self.options = sorted(set(self.kinds.values()))

    def count(self) -> int:
        """Return the least number, where no value loses bits on its way that a reader asks for."""
        choices = product(self.options, repeat=len(self.free))
        return min(
            self._count({**self.kinds, **dict(zip(self.free, choice, strict=True))})
            for choice in choices
        )

    def _count(self, kinds: Mapping[str, str]) -> int:
        total = 0
        for key in self.plan.tensors:
            value = self.graph.values[key]
            maker = value.producer()
            written = None if maker is None else kinds.get(self.graph.node_key(maker))
            bases = [written] if written else self.options
            total += min((self._converted(value, base, kinds) for base in bases), default=0)
        return total

    def _converted(self, value: ir.Value, base: str, kinds: Mapping[str, str]) -> int:
        readers = list(self._readers(value))
        for key in readers:
            enough = min(bits(base), self._widest_behind(key)) if key in self.free else 0
            if bits(kinds[key]) < enough:
                return IMPOSSIBLE
        return len({kinds[key] for key in readers} - {base})

    def _widest_behind(self, key: str) -> int:
        """Return the most bits that is asked for of what a free node moves."""
        outputs = [v for v in self.graph.nodes[key].outputs if v.name]
        readers = [k for output in outputs for k in self._readers(output)]
        return max(
            (self._widest_behind(k) if k in self.free else bits(self.kinds[k]) for k in readers),
            default=0,
        )

    def _readers(self, value: ir.Value) -> Iterator[str]:
        for use in value.uses():
            key = self.graph.node_key(use.node)
            if key not in self.kinds or self.plan.nodes[key].role == "absorbed":
                continue
            if use.idx in set(computed_floats(self.model, key)):
                yield key
