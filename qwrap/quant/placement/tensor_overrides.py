"""What is said of tensors by name, looked up in a graph: see ``qwrap.overrides``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace

import onnx_ir as ir

from qwrap.config import QConfig, QuantSpec, retyped
from qwrap.errors import ConfigError
from qwrap.model.layout import Layout
from qwrap.model.points import UsePoint, ValuePoint
from qwrap.overrides import KEEPS_OUTPUT, TensorOverride
from qwrap.quant.placement.eligibility import DILATED, Eligibility, is_dilated_pool
from qwrap.quant.placement.forms import REALS

_OF_SCALE = ("dtype", "symmetric", "low", "high")


class Named:
    """The tensors of one graph of which something was said.

    Attributes:
        activations: what was said of those that are computed, in the order of the graph.
        constants: the same for constants.
    """

    def __init__(self, layout: Layout, config: QConfig) -> None:
        """Look the names up.

        Raises:
            ConfigError: a name is that of no tensor or node, or what is said of it cannot be had.
        """
        self.layout, self.graph, self.config = layout, layout.graph, config
        self.activations: dict[ir.Value, TensorOverride] = {}
        self.constants: dict[ir.Value, TensorOverride] = {}
        said = {name: o for name, o in config.tensors.items() if o != TensorOverride()}
        for name in said:
            self._check_name(name)
        for name, value in self.graph.values.items():
            if name in said and name in layout.values.stored:
                self._check_constant(name, said[name])
                self.constants[value] = said[name]
            elif name in said:
                self._check_activation(name, value, said[name])
                self.activations[value] = said[name]

    def __bool__(self) -> bool:
        return bool(self.activations or self.constants)

    # --- what can be refused ---------------------------------------------------------------------

    def _check_name(self, name: str) -> None:
        value = self.graph.values.get(name)
        if value is None:
            raise ConfigError(
                f"overrides: the model has no tensor {name!r}, its normalizations folded; "
                f"{_nearest(name, self.graph.values)}"
            )
        if self.graph.type_of(value).dtype not in REALS:
            kind = self.graph.type_of(value).dtype
            what = "an unknown type" if kind is None else f"type {kind.name.lower()}"
            raise ConfigError(f"overrides: tensor {name!r} has {what}; only floats are quantized")

    def _check_constant(self, name: str, said: TensorOverride) -> None:
        if said.convert is not None:
            raise ConfigError(
                f"overrides of tensor {name!r}: 'convert' is not for constants, each reader of "
                "which can have codes of its own"
            )
        if said.axis is None:
            return
        shape = tuple(self.layout.values.stored[name].shape.numpy())
        if not -len(shape) <= said.axis < len(shape):
            raise ConfigError(
                f"overrides of tensor {name!r}: 'axis' {said.axis} is out of bounds for its rank "
                f"{len(shape)}"
            )
        numbers = (said.low, said.high, said.scale, said.zero_point)
        for count in {len(given) for given in numbers if given is not None}:
            if count not in (1, shape[said.axis]):
                raise ConfigError(
                    f"overrides of tensor {name!r}: {count} dictionaries, but {shape[said.axis]} "
                    f"channels along axis {said.axis}; give one for all, or one for each"
                )

    def _check_activation(self, name: str, value: ir.Value, said: TensorOverride) -> None:
        where = f"overrides of tensor {name!r}: "
        if said.axis is not None:
            raise ConfigError(f"{where}'axis' is for constants, and it is none: it has one scale")
        if said.reduce_range is not None:
            raise ConfigError(f"{where}'reduce_range' is for constants, and it is none")
        if ValuePoint(name) not in self.layout.points:
            raise ConfigError(f"{where}it steers shapes or control flow, and cannot be quantized")
        if any(map(is_dilated_pool, (value.producer(), *value.consumers()))):
            raise ConfigError(f"{where}it cannot be quantized: {DILATED}")
        if said.dtype is None and self.config.activation_spec is None:
            raise ConfigError(
                f"{where}no 'quant_type' is given, and activation=None leaves activations float"
            )
        if said.convert is not None and said.convert.receivers is not None:
            self._check_receivers(where, value, said.convert.receivers)

    def _check_receivers(self, where: str, value: ir.Value, names: frozenset[str]) -> None:
        readers = [self.graph.node_key(node) for node in self.readers(value)]
        listed = f"nodes {sorted(readers)} do" if readers else "no node does"
        for name in sorted(names - {KEEPS_OUTPUT, *readers}):
            if name in self.graph.nodes:
                raise ConfigError(
                    f"{where}node {name!r} of 'recv_nodes' does not read it; {listed}"
                )
            near = _nearest(name, readers or self.graph.nodes)
            raise ConfigError(f"{where}the model has no node {name!r} of 'recv_nodes'; {near}")
        if readers and not names - {KEEPS_OUTPUT}:
            raise ConfigError(
                f"{where}'recv_nodes' names no node, so that nothing gets the converted type; "
                f"leave it out for all that read the tensor: {listed}"
            )

    # --- activations -----------------------------------------------------------------------------

    def readers(self, value: ir.Value) -> list[ir.Node]:
        """Return the nodes that read what is in a tensor, not its shape alone."""
        found = [use.node for use in value.uses() if self.is_seen(use.node, use.idx)]
        return list(dict.fromkeys(found))

    def is_seen(self, node: ir.Node, index: int) -> bool:
        """Whether a node reads an input as a tensor."""
        return UsePoint(self.graph.node_key(node), index) in self.layout.points

    def is_pinned(self, value: ir.Value) -> bool:
        """Whether it is said who reads a tensor in which type."""
        said = self.activations.get(value)
        return said is not None and (said.dtype is not None or said.convert is not None)

    def base(self, value: ir.Value) -> QuantSpec | None:
        """Return how a tensor is quantized where it is written, None if that is not said."""
        said = self.activations.get(value)
        return None if said is None or said.dtype is None else self._spec(said)

    def converted(self, value: ir.Value) -> QuantSpec | None:
        """Return how those read a tensor that get it converted, None if nothing does."""
        said = self.activations.get(value)
        return None if said is None or said.convert is None else self._spec(said.convert)

    def _spec(self, said: TensorOverride) -> QuantSpec:
        usual = self.config.activation_spec or QuantSpec(symmetric=False)
        symmetric = usual.symmetric if said.symmetric is None else said.symmetric
        return retyped(usual, said.dtype or usual.dtype, symmetric=symmetric)

    def receives(self, node: ir.Node, value: ir.Value) -> bool:
        """Whether a node gets a tensor converted."""
        said = self.activations.get(value)
        if said is None or said.convert is None:
            return False
        names = said.convert.receivers
        return names is None or self.graph.node_key(node) in names

    def read(self, node: ir.Node, value: ir.Value) -> QuantSpec | None:
        """Return how a node reads a tensor, None if that is not said."""
        return self.converted(value) if self.receives(node, value) else self.base(value)

    def follows(self, facts: Eligibility, value: ir.Value) -> bool:
        """Whether a moved tensor has the scale of a named one, of floats, that it was moved from.

        So it is with onnxruntime's tool. Here what has a scale or another word of its own keeps to
        that.
        """
        node = value.producer()
        word = None if node is None else self._word(facts, node)
        if word is None:
            return False
        own = self.activations.get(value, TensorOverride())
        if own.scale is not None:
            return False
        said = ((getattr(own, name), getattr(word, name)) for name in _OF_SCALE)
        return all(mine in (None, theirs) for mine, theirs in said)

    def _word(self, facts: Eligibility, node: ir.Node) -> TensorOverride | None:
        """Return what was said of what a node moves, None if it moves nothing that was named."""
        moved = facts.moved_input(node)
        if moved is None:
            return None
        said, before = self.activations.get(moved), moved.producer()
        if said is None:
            return None if before is None else self._word(facts, before)
        return said.convert if self.receives(node, moved) else said

    def outputs(self, value: ir.Value) -> tuple[int, ...]:
        """Return the graph outputs that are a tensor converted: where all that read it get that."""
        said = self.activations.get(value)
        if said is None or said.convert is None:
            return ()
        keeps = KEEPS_OUTPUT in (said.convert.receivers or ())
        if keeps or not all(self.receives(node, value) for node in self.readers(value)):
            return ()
        return tuple(i for i, output in enumerate(self.graph.outputs) if output is value)

    def may_absorb(self, activation: ir.Node) -> bool:
        """Whether nothing keeps an activation function from going into the node before it.

        Then what it reads is never a tensor. It is one if it is converted, or anything is said of
        it that does not hold of the function's output too; and with onnxruntime's tool also if that
        output is converted, unless only what is named is quantized at all.
        """
        x, y = activation.inputs[0], activation.outputs[0]
        assert x is not None
        before, behind = self.activations.get(x), self.activations.get(y, TensorOverride())
        if before is None:
            return behind.convert is None or self.config.scope == "named"
        if behind.convert is not None:
            return False
        usual = self.config.activation_spec
        kind = behind.dtype or (None if usual is None else usual.dtype)
        return before in (TensorOverride(dtype=kind), TensorOverride(dtype=behind.dtype))

    # --- constants -------------------------------------------------------------------------------

    def constant(self, value: ir.Value, usual: QuantSpec, *, weight: bool) -> QuantSpec:
        """Return how a constant is quantized.

        Args:
            value: the constant.
            usual: how it would be if nothing was said.
            weight: whether it is a weight, and not an operand like any other.

        Raises:
            ConfigError: what is said cannot be had.
        """
        said = self.constants.get(value)
        if said is None:
            return usual
        dtype = said.dtype or usual.dtype
        axis = None
        if said.axis is not None:
            axis = said.axis % (self.graph.type_of(value).rank or 1)
        same = dtype == usual.dtype
        symmetric = said.symmetric
        if symmetric is None:
            by_type = dtype.signed if weight and not same else usual.symmetric
            symmetric = axis is not None or by_type
        spec = retyped(usual, dtype, symmetric=symmetric)
        narrow = usual.narrow_range if same else weight
        narrow = narrow and spec.symmetric and dtype.signed and dtype.is_integer
        spec = replace(spec, axis=axis, block_size=None, narrow_range=narrow)
        if said.reduce_range is not None:
            spec = replace(spec, reduce_range=said.reduce_range)
        return self._with_zero_points(value, spec, said)

    def _with_zero_points(
        self, value: ir.Value, spec: QuantSpec, said: TensorOverride
    ) -> QuantSpec:
        if said.zero_point is None:
            return spec
        kind, middle = spec.dtype, middle_of(spec)
        for zero_point in said.zero_point:
            low, high = (kind.qmin, kind.qmax) if kind.has_zero_point else (0, 0)
            if not low <= zero_point <= high:
                raise ConfigError(
                    f"overrides of tensor {self.graph.key(value)!r}: 'zero_point' {zero_point} "
                    f"lies outside of {kind}, {low:g} … {high:g}"
                )
        if any(zero_point != middle for zero_point in said.zero_point):
            return replace(spec, symmetric=False, narrow_range=False, restricted=False)
        return spec

    def __contains__(self, value: ir.Value | None) -> bool:
        return value in self.activations or value in self.constants


def middle_of(spec: QuantSpec) -> int:
    """Return the zero point of a symmetric type."""
    if not spec.dtype.has_zero_point or spec.dtype.signed:
        return 0
    return 1 << (spec.dtype.bits - 1)


def _nearest(name: str, names: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(names), 1, cutoff=0.0)
    return f"the nearest name is {nearest[0]!r}" if nearest else "it has none at all"
