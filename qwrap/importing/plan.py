"""The plan that a quantized file stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import onnx_ir as ir
import torch

from qwrap.config import QuantSpec
from qwrap.dtypes import INT8, UINT8, QuantType, integer_type
from qwrap.graph.nodes import STANDARD
from qwrap.importing.stripped import Stored, Stripped, Tap
from qwrap.model.layout import Layout
from qwrap.numerics import QParams
from qwrap.ops.traits import OUTPUT_RANGES, WEIGHTED
from qwrap.quant.bounds import bounds_of, operator_qparams
from qwrap.quant.placement.eligibility import NO_KERNEL, Eligibility
from qwrap.quant.placement.specs import is_fusable, is_fusable_weight
from qwrap.quant.placement.target import ORT_CPU
from qwrap.quant.plan import (
    BiasPlan,
    ConstantPlan,
    Conversion,
    NodePlan,
    QuantPlan,
    Role,
    TensorPlan,
)

UNQUANTIZED = "the file does not quantize all of its inputs and outputs"
MIXED = "onnxruntime has int8 and uint8 around it, and no kernel for both"
FLOAT_BIAS = "its bias is float"
UNMOVED = "stands among float nodes"
KEPT = "its clamp is not that of the codes behind it"
HALF_RANGE = 64  # largest code of int8 weights with a bit to spare


class FilePlan:
    """Derives the plan of one graph from what was stripped from it.

    Attributes:
        plan: the result.
        keys: tap -> key of its tensor or conversion.
    """

    def __init__(self, layout: Layout, stripped: Stripped, notes: Iterable[str]) -> None:
        self.layout, self.graph, self.stripped = layout, layout.graph, stripped
        self.facts = Eligibility(layout, ORT_CPU, {})
        self.plan = QuantPlan(notes=list(notes))
        self.power_of_two = _all_powers_of_two(stripped)
        self.keys = {tap: self.graph.key(value) for value, tap in stripped.taps.items()}
        self._add_constants()
        self._name_conversions()
        self._add_tensors()
        self._add_biases()
        self.without_kernel: set[str] = set()
        self._add_nodes()
        self._tell_pairs()

    # --- tensors ---------------------------------------------------------------------------------

    def _add_constants(self) -> None:
        first: dict[Stored, tuple[str, int]] = {}
        for (node, index), stored in self.stripped.constants.items():
            point = self.graph.node_key(node), index
            spec = self._spec(_weight_spec(stored))
            self.plan.constants[point] = ConstantPlan(
                value=self.graph.key(stored.value), spec=spec, shared=first.get(stored)
            )
            first.setdefault(stored, point)

    def _name_conversions(self) -> None:
        """Give each conversion a key, as ``place`` does: with its type where there are several."""
        alike = Counter(tap.value for tap in self.stripped.conversions)
        taken = {*self.graph.values}
        for tap in self.stripped.conversions:
            key = f"{self.graph.key(tap.value)}_convert"
            if alike[tap.value] > 1:
                key = f"{key}_{tap.reading.spec.dtype}"
            while key in taken:
                key += "_"
            taken.add(key)
            self.keys[tap] = key

    def _add_tensors(self) -> None:
        for value, tap in (*self.stripped.taps.items(), *self.stripped.moved.items()):
            key, producer = self.graph.key(value), value.producer()
            if key in self.plan.tensors:
                continue
            is_base = self.stripped.taps.get(tap.value) is tap
            self.plan.tensors[key] = TensorPlan(
                spec=self._spec(tap.reading.spec),
                source=self.keys[tap],
                shape=tuple(tap.reading.qparams.scale.shape),
                fixed=_dictated(tap) if is_base else None,
                table=self._table(producer, tap) if is_base and tap.value is value else None,
                conversions=self._conversions(value),
            )

    def _conversions(self, value: ir.Value) -> tuple[Conversion, ...]:
        return tuple(
            Conversion(
                key=self.keys[tap],
                spec=self._spec(tap.reading.spec),
                consumers=tuple((self.graph.node_key(n), i) for n, i in self.stripped.uses_of(tap)),
                outputs=tuple(sorted(tap.outputs)),
                shape=tuple(tap.reading.qparams.scale.shape),
            )
            for tap in self.stripped.conversions
            if tap.value is value
        )

    def _spec(self, spec: QuantSpec) -> QuantSpec:
        return replace(spec, power_of_two=True) if self.power_of_two else spec

    def _table(self, node: ir.Node | None, tap: Tap) -> tuple[str, int] | None:
        """Return where ``node`` reads the quantized table whose rows it fetches."""
        stored = None if node is None else self.stripped.constants.get((node, 0))
        if node is None or stored is None or node.op_type not in ORT_CPU.moving:
            return None
        return (self.graph.node_key(node), 0) if stored.reading.equals(tap.reading) else None

    def _add_biases(self) -> None:
        for (node, index), (stored, source, weight) in self.stripped.biases.items():
            self.plan.biases[self.graph.node_key(node), index] = BiasPlan(
                value=self.graph.key(stored.value),
                activation=self.keys[source],
                weight=(self.graph.node_key(weight[0]), weight[1]),
            )

    def _tell_pairs(self) -> None:
        """Say which nodes compute in float between pairs, if there are others with kernels."""
        integer = {key for key, node in self.plan.nodes.items() if node.role == "integer"}
        self.plan.fused = not integer or bool(integer - self.without_kernel)
        for key in integer & self.without_kernel if self.plan.fused else ():
            self.plan.nodes[key] = replace(self.plan.nodes[key], role="pairs")

    # --- nodes -----------------------------------------------------------------------------------

    def _add_nodes(self) -> None:
        for node in self.facts.nodes:
            self.plan.nodes[self.graph.node_key(node)] = self._layer(node)
        for node in self.facts.nodes:
            if node.op_type in ORT_CPU.absorbed:
                self.plan.nodes[self.graph.node_key(node)] = self._clamp(node)

    def _layer(self, node: ir.Node) -> NodePlan:
        kind = node.op_type
        reason = self.facts.obstacle(node)
        if reason is None and kind in ORT_CPU.matrix:
            return self._matrix(node)
        if reason is None:
            operands, written = [*self.facts.operand_inputs(node)], self._written(node)
            if all(self._has_codes(v) for _, v in operands) and written is not None:
                if self._agree(node, [i for i, _ in operands], written):
                    return self._quantized(node, "integer")
                return NodePlan(kind, "float", MIXED)
            return self._weighted(node) or NodePlan(kind, "float", UNQUANTIZED)
        moved = self.facts.moved_input(node)
        if moved is not None:
            follows = self._is_quantized(moved) or (self.graph.node_key(node), 0) in (
                self.plan.constants
            )
            if follows and self._is_quantized(node.outputs[0]):
                dtype = self.plan.tensors[self.graph.key(node.outputs[0])].spec.dtype
                return NodePlan(kind, "moves", dtype=str(dtype))
            reason = UNMOVED if reason == NO_KERNEL else reason
        return self._in_pairs(node) or self._weighted(node) or NodePlan(kind, "float", reason)

    def _matrix(self, node: ir.Node) -> NodePlan:
        key, x = self.graph.node_key(node), node.inputs[0]
        if (key, 1) not in self.plan.constants or x is None or not self._is_quantized(x):
            return self._weighted(node) or NodePlan(node.op_type, "float", UNQUANTIZED)
        bias = len(node.inputs) > 2 and node.inputs[2] is not None
        read = self.stripped.read_by(node, 0)
        has_kernel = read is not None and is_fusable(read.reading.spec)
        if bias and (key, 2) not in self.plan.biases and has_kernel:
            return NodePlan(node.op_type, "weights", FLOAT_BIAS)
        written = self._written(node)
        if written is not None and not self._agree(node, [0], written):
            return NodePlan(node.op_type, "weights", MIXED)
        if node.op_type in ORT_CPU.float_output or written is not None:
            return self._quantized(node, "integer")
        return NodePlan(node.op_type, "weights", UNQUANTIZED)

    def _in_pairs(self, node: ir.Node) -> NodePlan | None:
        """Return the plan of a node without a kernel that reads and writes nothing but codes."""
        if self.facts.moved_input(node) is not None or self.facts.pairs_obstacle(node) is not None:
            return None
        written = [v for v in node.outputs if v.name and self.facts.is_real(v)]
        values = [*self.facts.operands(node), *written]
        return self._quantized(node, "pairs") if all(map(self._has_codes, values)) else None

    def _quantized(self, node: ir.Node, role: Role) -> NodePlan:
        """Return the plan of a node with the type that it reads."""
        read = (self.stripped.read_by(node, i) for i, _ in self.facts.operand_inputs(node))
        tap = next(tap for tap in read if tap is not None)
        has_kernel = is_fusable(tap.reading.spec)
        weight = self.plan.constants.get((self.graph.node_key(node), 1))
        if weight is not None and node.op_type in ORT_CPU.matrix:
            has_kernel = has_kernel and is_fusable_weight(weight.spec)
        if not has_kernel:
            self.without_kernel.add(self.graph.node_key(node))
        return NodePlan(node.op_type, role, dtype=str(tap.reading.spec.dtype))

    def _weighted(self, node: ir.Node) -> NodePlan | None:
        """Return the plan of a node that computes in float from a quantized weight."""
        known = WEIGHTED.get(node.op_type) if node.domain in STANDARD else None
        if known is None or self.stripped.stored_use(node, known.weight) is None:
            return None
        return NodePlan(node.op_type, "weights")

    def _agree(self, node: ir.Node, inputs: Iterable[int], written: ir.Value) -> bool:
        """Whether onnxruntime has all of a node in one type when it looks for kernels.

        It makes uint8 of int8 first, but for what has several readers: these it gives a
        DequantizeLinear each, and takes only single ones together with their QuantizeLinear.
        """
        found = {self._seen(self.stripped.source_of(written), written)}
        for index in inputs:
            converted = self.stripped.converted.get((node, index))
            value = None if converted is not None else node.inputs[index]
            found.add(self._seen(self.stripped.read_by(node, index), value))
        return len(found - {None}) <= 1

    def _seen(self, tap: Tap | None, value: ir.Value | None) -> QuantType | None:
        """Return the type in which onnxruntime has a value, or a conversion; None of constants."""
        if tap is None:
            return None
        readers = tap.count
        if value is not None:
            readers = self.stripped.readers.get(value, len(value.uses()))
        dtype = tap.reading.spec.dtype
        return UINT8 if dtype is INT8 and readers == 1 else dtype

    def _is_quantized(self, value: ir.Value) -> bool:
        return self.graph.key(value) in self.plan.tensors

    def _has_codes(self, value: ir.Value) -> bool:
        if self._is_quantized(value):
            return True
        keys = [(self.graph.node_key(use.node), use.idx) for use in value.uses()]
        return any(key in self.plan.constants for key in keys)

    def _written(self, node: ir.Node) -> ir.Value | None:
        """Return the quantized value that the kernel of a node writes, None if it has none."""
        value = node.outputs[0]
        if self._is_quantized(value):
            return value
        users = value.consumers()
        if len(users) != 1 or self.facts.absorbed_by(users[0]) is not node:
            return None
        result = users[0].outputs[0]
        return result if self._is_quantized(result) and self._is_redundant(users[0]) else None

    def _clamp(self, node: ir.Node) -> NodePlan:
        producer = self.facts.absorbed_by(node)
        if producer is not None and not self._is_quantized(producer.outputs[0]):
            planned = self.plan.nodes[self.graph.node_key(producer)]
            quantized = self._is_quantized(node.outputs[0])
            if planned.role == "integer" and quantized and self._is_redundant(node):
                dtype = self.plan.tensors[self.graph.key(node.outputs[0])].spec.dtype
                return NodePlan(node.op_type, "absorbed", dtype=str(dtype))
            if quantized:
                return NodePlan(node.op_type, "float", KEPT)
        return self._in_pairs(node) or NodePlan(node.op_type, "float", NO_KERNEL)

    def _is_redundant(self, node: ir.Node) -> bool:
        """Whether the codes behind a Relu or Clip end where it does, as onnxruntime tells."""
        bounds = bounds_of(self.layout.values, node)
        tap = self.stripped.taps.get(node.outputs[0])
        if bounds is None or tap is None or tap.reading.spec.axis is not None:
            return False
        low, high = _ends(tap.reading.qparams, tap.reading.spec)
        return bounds[0] <= low and high <= bounds[1]


def _ends(qparams: QParams, spec: QuantSpec) -> tuple[float, float]:
    """Return the smallest and largest float32 that codes of one scale stand for."""
    codes = torch.tensor([spec.dtype.qmin, spec.dtype.qmax]) - qparams.zero_point
    low, high = (codes.to(torch.float32) * qparams.scale).tolist()
    return low, high


def _dictated(tap: Tap) -> tuple[float, int] | None:
    """Return the scale that the operator gives its output, if the file gives it the same."""
    node, spec = tap.value.producer(), tap.reading.spec
    if node is None or node.op_type not in ORT_CPU.dictated or not is_fusable(spec):
        return None
    qparams, found = operator_qparams(*OUTPUT_RANGES[node.op_type], spec), tap.reading.qparams
    mine = float(qparams.scale), int(qparams.zero_point)
    return mine if mine == (float(found.scale), int(found.zero_point)) else None


def _weight_spec(stored: Stored) -> QuantSpec:
    """Return the spec of a constant, with the ends that its codes keep to.

    A file does not say that a tool leaves out the smallest code of a symmetric type, that it uses
    half of the codes, for kernels that add in 16 bits, or that an integer of fewer bits is carried
    by a wider one. The largest code does, for whatever chooses a scale has it reach the end.
    """
    spec = stored.reading.spec
    symmetric = spec.symmetric and spec.dtype.signed and spec.dtype.is_integer
    if not symmetric or stored.ends is None:
        return spec
    lowest, largest = stored.ends[0], max(-stored.ends[0], stored.ends[1])
    if spec.dtype is INT8 and largest == HALF_RANGE:
        return replace(spec, reduce_range=True)
    narrow = lowest > spec.dtype.qmin
    bits = (int(largest) + 1).bit_length()
    if narrow and int(largest) + 1 == 2 ** (bits - 1) and 2 <= bits < spec.dtype.bits:
        smaller = integer_type(bits)
        if smaller.onnx_type == spec.dtype.onnx_type:
            return replace(spec, dtype=smaller, narrow_range=True)
    return replace(spec, narrow_range=narrow)


def _all_powers_of_two(stripped: Stripped) -> bool:
    """Whether every scale of a file is a power of two, as shifting hardware wants them."""
    readings = [tap.reading for tap in (*stripped.taps.values(), *stripped.conversions)]
    readings += [stored.reading for stored in stripped.constants.values()]
    fractions = [torch.frexp(reading.qparams.scale)[0] for reading in readings]
    return len(readings) > 1 and all(bool((fraction == 0.5).all()) for fraction in fractions)
