"""How each tensor of a graph is quantized: the user's wishes, filled in for tensor and node."""

from __future__ import annotations

import math
from dataclasses import replace

import onnx_ir as ir

from qwrap.config import QConfig, QuantSpec
from qwrap.dtypes import INT8, UINT8
from qwrap.errors import ConfigError
from qwrap.model.attributes import attributes_of
from qwrap.ops.traits import OUTPUT_RANGES, WEIGHTED
from qwrap.quant.bounds import operator_qparams
from qwrap.quant.placement.eligibility import Eligibility
from qwrap.quant.placement.forms import scaled_as
from qwrap.quant.placement.outer import EIGHT_BITS, at_8_bits
from qwrap.quant.placement.regions import Types
from qwrap.quant.placement.tensor_overrides import Named

LARGEST_ACCUMULATOR = 24  # bits of both operands; codes of a bias beyond would overflow int32


def is_fusable(spec: QuantSpec) -> bool:
    """Whether onnxruntime has integer kernels for tensors of ``spec``: 8 bits, no blocks."""
    eight = spec.dtype.is_integer and spec.dtype.is_standard and spec.dtype.bits == EIGHT_BITS
    return eight and spec.block_size is None and spec.scale_type == "float32"


def is_fusable_weight(spec: QuantSpec) -> bool:
    """The same for weights, which may be of fewer bits that 8 carry: int5 … int7."""
    carried = spec.dtype.is_integer and spec.dtype.onnx_type in (INT8.onnx_type, UINT8.onnx_type)
    return carried and spec.block_size is None and spec.scale_type == "float32"


class Specs:
    """The ``QuantSpec`` of every tensor that ``config`` has quantized in one graph.

    What is asked of a node holds for all that it reads and writes.

    Attributes:
        wide_layers: matrix operators whose weight has 8 bits, whatever ``config`` says.
        wide_values: keys of the tensors, constants included, of which the same holds.
        named: what the user said of tensors by name, which precedes all else.
    """

    def __init__(self, facts: Eligibility, config: QConfig, types: Types, named: Named) -> None:
        """Check what can be told without the graph.

        Raises:
            ConfigError: activations are asked for in blocks, or with a scale per index.
        """
        self.facts, self.graph, self.config, self.types = facts, facts.graph, config, types
        self.named = named
        self.wide_layers: set[ir.Node] = set()
        self.wide_values: set[str] = set()
        for spec in config.activation_specs:
            if spec.axis is not None or spec.block_size is not None:
                raise ConfigError(
                    f"activation={spec.dtype} with axis={spec.axis}, block_size={spec.block_size}: "
                    "activations are quantized per tensor; leave both out (weights can have them)"
                )

    def slow(self) -> str | None:
        """Return why onnxruntime has no integer kernels for what is asked of the whole model.

        None if it has; what another target has not is refused.
        """
        if not self.facts.target.is_cpu:
            return None
        for what, spec, has_kernels in (
            ("activations", self.config.activation_spec, is_fusable),
            ("weights", self.config.weight_spec(None, 0), is_fusable_weight),
        ):
            if spec is not None and not has_kernels(spec):
                blocks = "" if spec.block_size is None else f" in blocks of {spec.block_size}"
                return f"onnxruntime has no integer kernels for {what} of {spec.dtype}{blocks}"
        return None

    def activation(self, value: ir.Value, spec: QuantSpec) -> QuantSpec:
        """Return how a tensor is quantized, given what is asked of a node around it."""
        return self._scaled(self._widened(value, spec), value)

    def operand(self, node: ir.Node, value: ir.Value) -> QuantSpec:
        """Return how ``node`` gets an input: a computed one, or a constant beside such."""
        said = self.named.read(node, value)
        if said is not None:
            return self._scaled(said, value)
        usual = self.activation(value, self.of(node))
        return self._scaled(self.named.constant(value, usual, weight=False), value)

    def of(self, node: ir.Node) -> QuantSpec:
        """Return what is asked of the inputs and outputs of a quantized node."""
        spec = self.types.of(node)
        assert spec is not None
        return spec

    def _widened(self, value: ir.Value, spec: QuantSpec) -> QuantSpec:
        wide = self.graph.key(value) in self.wide_values and value not in self.named
        return at_8_bits(spec) if wide else spec

    def fixed(self, node: ir.Node | None, spec: QuantSpec) -> tuple[float, int] | None:
        """Return the scale and zero point that the kernel of ``node`` gives its output."""
        if node is None or node.op_type not in self.facts.target.dictated:
            return None
        qparams = operator_qparams(*OUTPUT_RANGES[node.op_type], spec)
        return float(qparams.scale), int(qparams.zero_point)

    def weight(self, node: ir.Node) -> QuantSpec:
        """Return how the weight of a matrix operator is quantized.

        Where the axis that is summed over is shorter than a block there is one scale per output
        channel: blocks would be cut off to fewer weights, such as one in a depthwise convolution.
        """
        weight = node.inputs[WEIGHTED[node.op_type].weight]
        assert weight is not None
        axis = self.facts.weight_axis(node, stacked=not self.has_kernel(node))
        if not self.facts.target.has_channels(node.op_type):
            axis = None
        spec = self._asked_of_weight(node, axis)
        if spec.block_size is not None and spec.axis is not None:
            size = self.facts.size_of(weight)[spec.axis]
            if size < spec.block_size and axis is not None:
                spec = replace(spec, axis=axis, block_size=None)
        return self._scaled(self.named.constant(weight, spec, weight=True), weight)

    def has_kernel(self, node: ir.Node) -> bool:
        """Whether the target has an integer kernel for input and weight of a matrix operator."""
        x = node.inputs[0]
        spec = self.types.of(node)
        weight = node.inputs[1]
        if spec is None or x is None or weight is None:
            return False
        if self.types.keeps_weight(node) and weight not in self.named:
            return False
        stored = self.named.constant(weight, self._asked_of_weight(node, None), weight=True)
        read, target = self.named.read(node, x) or self._widened(x, spec), self.facts.target
        if not target.is_cpu:
            return target.supports(node.op_type, str(read.dtype), str(stored.dtype))
        return is_fusable(read) and is_fusable_weight(stored)

    def has_types(self, node: ir.Node) -> bool:
        """Whether the target has integer kernels for the types that are asked of a node."""
        spec = self.types.of(node)
        if node.op_type in self.facts.target.matrix:
            return self.has_kernel(node)
        if spec is None:
            return False
        specs = [self.named.base(node.outputs[0]) or spec]
        specs += [self.named.read(node, v) or spec for v in self.facts.data_inputs(node)]
        if len({s.dtype for s in specs}) > 1:
            return False
        if not self.facts.target.is_cpu:
            return self.facts.target.supports(node.op_type, str(specs[0].dtype))
        return all(map(is_fusable, specs))

    def _asked_of_weight(self, node: ir.Node, axis: int | None) -> QuantSpec:
        spec = self.types.weight_of(node, axis, self.facts.block_axis(node))
        return at_8_bits(spec) if node in self.wide_layers else spec

    def table(self, node: ir.Node) -> QuantSpec:
        """Return how the constant table is quantized that ``node`` fetches rows of."""
        table = node.inputs[0]
        assert table is not None
        asked = self.types.of(node)
        if asked is not None:
            return self.operand(node, table)
        spec = self.types.weight_of(node, None)
        if not is_fusable(spec):  # few bits want a scale for each row, or each block of a row
            spec = self.types.weight_of(node, 0, len(self.facts.size_of(table)) - 1)
        return self._scaled(self.named.constant(table, spec, weight=True), table)

    def constant(self, value: ir.Value) -> QuantSpec:
        """Return how a named constant is quantized that no quantized node reads."""
        usual = self.config.weight_spec(None, 0)
        return self._scaled(self.named.constant(value, usual, weight=True), value)

    def is_worth_it(self, value: ir.Value, spec: QuantSpec) -> bool:
        """Whether codes and scales of a constant take less space than its floats.

        What has no codes is not quantized for space at all.
        """
        if spec.dtype.function is not None:
            return True
        shape = self.facts.size_of(value)
        scales = 1
        if spec.axis is not None:
            scales = shape[spec.axis]
            if spec.block_size is not None:
                scales = math.prod(shape) // max(shape[spec.axis], 1)
                scales *= -(-shape[spec.axis] // spec.block_size)
        size = {"float32": 32, "float16": 16, "bfloat16": 16}.get(spec.scale_type, 8)
        dtype = self.graph.type_of(value).dtype
        width = 8 * dtype.itemsize if dtype is not None else 32
        return spec.dtype.bits * math.prod(shape) + size * scales < width * math.prod(shape)

    def bias_as_codes(self, node: ir.Node, activation: QuantSpec, weight: QuantSpec) -> bool:
        """Whether the bias of ``node`` is stored as int32 at the scale of the accumulator.

        Else it stays float: a product of floats, or of scales that change within a sum, has no
        accumulator of codes; that of 16-bit codes would overflow; scales of 16 bits cannot hold the
        product of two; and in a ConvTranspose the groups share scales, which biases do not.

        Args:
            node: has the bias.
            activation: how it reads its input, converted or not.
            weight: how its weight is quantized.
        """
        x = node.inputs[0]
        assert x is not None
        bits = activation.dtype.bits + weight.dtype.bits
        plain = activation.dtype.is_standard and activation.dtype.is_integer
        plain = plain and weight.dtype.is_integer
        if node.op_type == "ConvTranspose" and weight.axis is not None:
            plain = plain and attributes_of(node).get("group", 1) == 1
        is_float32 = self.graph.type_of(x).dtype == ir.DataType.FLOAT
        return plain and is_float32 and weight.block_size is None and bits <= LARGEST_ACCUMULATOR

    def _scaled(self, spec: QuantSpec, value: ir.Value) -> QuantSpec:
        dtype = self.graph.type_of(value).dtype
        return spec if dtype is None else scaled_as(spec, dtype)
