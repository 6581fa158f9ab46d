"""Which nodes a target's integer kernels can take at all, and how values travel between them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import onnx_ir as ir

from qwrap.graph.index import bodies
from qwrap.graph.nodes import STANDARD
from qwrap.model.attributes import attributes_of
from qwrap.model.layout import Layout
from qwrap.model.points import UsePoint
from qwrap.ops.traits import PASS_THROUGH, QUANTIZED, WEIGHTED
from qwrap.quant.bounds import bounds_of
from qwrap.quant.placement.forms import REALS
from qwrap.quant.placement.target import Target

NO_KERNEL = "no integer kernel"
NOT_REAL = "not of a float type that can be quantized at this opset"
QUANTIZED_ALREADY = "is quantized already"
BOTH_COMPUTED = "both operands are activations: quantizing them costs more than the kernel saves"
_CASTS = ("Cast", "CastLike")
CLAMPED = ("Add", "Conv", "Gemm", "MatMul", "Mul")  # kernels whose output clamp absorbs a Relu
# So neither the pool nor what reads it may be quantized.
DILATED = "onnxruntime would fuse the dilated AveragePool into a kernel that refuses it"


class Eligibility:
    """Static facts about the nodes of one graph for one target; it decides nothing.

    Attributes:
        nodes: all nodes that run.
        barred: node key -> why it has to stay float, whatever it is.
        reals: types of the tensors that can be quantized.
        may_absorb: whether the types of a node and of the activation behind it, which cuts at the
            bounds given, let the one's clamp stand for the other.
    """

    def __init__(
        self,
        layout: Layout,
        target: Target,
        barred: Mapping[str, str],
        reals: Collection[ir.DataType] = REALS,
        *,
        may_absorb: Callable[[ir.Node, ir.Node, tuple[float, float]], bool] = lambda *_: True,
    ) -> None:
        self.layout, self.target = layout, target
        self.graph, self.values = layout.graph, layout.values
        self.nodes = [node for node, _ in layout.placed()]
        self.barred, self.reals, self.may_absorb = barred, reals, may_absorb

    def obstacle(self, node: ir.Node) -> str | None:
        """Return why ``node`` cannot run in an integer kernel, None if it can."""
        if self._is_barred(node):
            return self.barred[self.graph.node_key(node)]
        if node.domain not in STANDARD:
            return NO_KERNEL
        if is_dilated_pool(node) or any(is_dilated_pool(v.producer()) for v in self.operands(node)):
            return DILATED
        if node.op_type in self.target.matrix:
            return self._matrix_obstacle(node)
        if node.op_type not in self.target.elementwise:
            return NO_KERNEL
        values = list(self.data_inputs(node))
        if not values or not all(self.is_real(v) for v in (*values, *node.outputs)):
            return NOT_REAL
        return None

    def _matrix_obstacle(self, node: ir.Node) -> str | None:
        x, weight = node.inputs[0], node.inputs[1]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if x is None or weight is None or not self.is_real(x):
            return NOT_REAL
        if not self.is_stored(weight):
            return self._weight_obstacle(node, x, weight)
        if self.is_stored(x):
            return "both inputs are constants"
        if bias is not None and not self.is_stored(bias):
            return "its bias is computed at run time"
        return self._gemm_obstacle(node, bias) if node.op_type == "Gemm" else None

    def _weight_obstacle(self, node: ir.Node, x: ir.Value, weight: ir.Value) -> str | None:
        producer = weight.producer()
        if producer is not None and producer.op_type == "DequantizeLinear":
            return "its weight is quantized already"
        if not self.target.is_cpu and node.op_type == "MatMul" and self.is_real(weight):
            return None  # of two activations
        computed = self.values.is_computed(x)
        return BOTH_COMPUTED if computed else "its weight is computed at run time"

    def _gemm_obstacle(self, node: ir.Node, bias: ir.Value | None) -> str | None:
        attributes = attributes_of(node)
        if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
            return "no integer kernel with alpha or beta other than 1"
        if bias is not None and self.graph.type_of(bias).rank != 1:
            return "no integer kernel with a bias that is not a vector"
        return None

    def data_inputs(self, node: ir.Node) -> Iterator[ir.Value]:
        """Yield the computed inputs that an integer kernel reads as codes."""
        yield from (v for _, v in self.operand_inputs(node) if not self.is_stored(v))

    def operands(self, node: ir.Node) -> Iterator[ir.Value]:
        """Yield the inputs that an integer kernel reads as codes, constants included."""
        yield from (value for _, value in self.operand_inputs(node))

    def operand_inputs(self, node: ir.Node) -> Iterator[tuple[int, ir.Value]]:
        """Yield the same with their indices; of what has no kernel, all that a pair can be on."""
        inputs = [(i, v) for i, v in enumerate(node.inputs) if v is not None]
        kind = node.op_type
        if kind in self.target.matrix:
            yield from (item for item in inputs if item[0] < 2)
        elif kind in ("AveragePool", "Softmax"):
            yield from (item for item in inputs if item[0] == 0)
        elif kind in self.target.elementwise:
            yield from (item for item in inputs if kind != "Where" or item[0] > 0)
        else:
            key = self.graph.node_key(node)
            yield from (
                (i, v)
                for i, v in inputs
                if self.is_real(v) and UsePoint(key, i) in self.layout.points
            )

    def pairs_obstacle(self, node: ir.Node) -> str | None:
        """Return why there can be no pairs around ``node``, None if there can."""
        if self._is_barred(node):
            return self.barred[self.graph.node_key(node)]
        if QUANTIZED.fullmatch(node.op_type):
            return QUANTIZED_ALREADY
        if any(True for _ in bodies(node)):
            return "runs other nodes"
        if is_dilated_pool(node) or any(is_dilated_pool(v.producer()) for v in node.inputs if v):
            return DILATED
        computes = any(True for _ in self.data_inputs(node)) and node.op_type not in _CASTS
        return None if computes and any(self.is_real(v) for v in node.outputs) else NOT_REAL

    def moved_input(self, node: ir.Node) -> ir.Value | None:
        """Return the input whose values ``node`` only moves, None if it computes."""
        value = node.inputs[0] if node.inputs else None
        if value is None or node.op_type not in self.target.moving or not self.is_real(value):
            return None
        if self._is_barred(node):
            return None
        if not PASS_THROUGH[node.op_type].holds(attributes_of(node)):
            return None
        if node.op_type == "MaxPool" and len([v for v in node.outputs if v.name]) > 1:
            return None
        return value

    def absorbed_by(self, node: ir.Node) -> ir.Node | None:
        """Return the producer whose output clamp can replace activation ``node``, if any."""
        value = node.inputs[0] if node.inputs else None
        producer = None if value is None else value.producer()
        if node.op_type not in self.target.absorbed or value is None or producer is None:
            return None
        if len(value.consumers()) > 1 or value.is_graph_output() or self._is_barred(node):
            return None
        bounds = bounds_of(self.values, node)
        if bounds is None or not bounds[0] <= 0 <= bounds[1]:  # as every grid does
            return None
        if producer.op_type not in CLAMPED or not self.may_absorb(producer, node, bounds):
            return None
        return producer

    def bias_add(self, node: ir.Node) -> ir.Node | None:
        """Return the Add of a constant vector behind a MatMul of known shape, if there is one."""
        value = node.outputs[0]
        shape = self.graph.type_of(value).shape
        users = value.consumers()
        if node.op_type != "MatMul" or len(users) != 1 or users[0].op_type != "Add" or not shape:
            return None
        others = [v for v in users[0].inputs if v is not None and v is not value]
        if len(others) != 1 or not self.is_stored(others[0]):
            return None
        vector = self.graph.type_of(others[0]).shape == (shape[-1],)
        return users[0] if vector and all(isinstance(s, int) for s in shape) else None

    def is_lookup(self, node: ir.Node) -> bool:
        """Whether ``node`` fetches rows of a table that is worth storing as codes."""
        table = node.inputs[0] if node.op_type in self.target.lookup else None
        if table is None or not self.is_stored(table) or not self.is_real(table):
            return False
        if self._is_barred(node):
            return False
        return self.values.stored[self.graph.key(table)].size >= self.target.least_table

    def _is_barred(self, node: ir.Node) -> bool:
        return self.graph.node_key(node) in self.barred

    def is_stored(self, value: ir.Value) -> bool:
        """Whether a value is a constant of the model."""
        return self.graph.key(value) in self.values.stored

    def is_real(self, value: ir.Value) -> bool:
        """Whether a value is known to be of a float type that can be quantized."""
        known = self.graph.type_of(value)
        return known.kind == "tensor" and known.dtype in self.reals

    def weight_axis(self, node: ir.Node, *, stacked: bool = False) -> int | None:
        """Return the axis of a matrix operator's weight that may have a scale per index.

        Args:
            node: has the weight.
            stacked: whether matrices in a stack may have one too, for which there is no kernel.
        """
        rank = self._weight_rank(node)
        if rank is None or rank < 2 or (node.op_type == "MatMul" and rank != 2 and not stacked):
            return None  # the kernel takes one scale for a stack of matrices
        return WEIGHTED[node.op_type].axis(attributes_of(node)) % rank

    def block_axis(self, node: ir.Node) -> int | None:
        """Return the axis of a matrix operator's weight that products are summed over."""
        rank = self._weight_rank(node)
        if rank is None or rank < 1:
            return None
        return 0 if rank == 1 else WEIGHTED[node.op_type].block_axis(attributes_of(node)) % rank

    def _weight_rank(self, node: ir.Node) -> int | None:
        weight = node.inputs[WEIGHTED[node.op_type].weight]
        return None if weight is None else self.graph.type_of(weight).rank

    def size_of(self, value: ir.Value) -> tuple[int, ...]:
        """Return the shape of a constant of the model."""
        return tuple(self.values.stored[self.graph.key(value)].shape.numpy())


def is_dilated_pool(node: ir.Node | None) -> bool:
    """Whether a node is an AveragePool with dilations."""
    return node is not None and node.op_type == "AveragePool" and "dilations" in node.attributes
