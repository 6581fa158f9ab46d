"""Decides where quantization sits: the only module that does."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import onnx_ir as ir

from qwrap.config import QConfig
from qwrap.errors import ConfigError
from qwrap.model.layout import Layout
from qwrap.quant.bounds import bounds_of
from qwrap.quant.plan import BiasPlan, ConstantPlan, NodePlan, QuantPlan, TensorPlan
from qwrap.quant.target import ORT_CPU, Target

NO_KERNEL = "no integer kernel"
BOTH_COMPUTED = "both operands are activations: quantizing them costs more than the kernel saves"
NARROW = "so few output channels that converting the input costs more than the kernel saves"
ALONE = "no quantized neighbour on both sides: quantizing it alone would be slower than float"


def place(
    layout: Layout,
    config: QConfig,
    target: Target = ORT_CPU,
    without: Mapping[str, str] | None = None,
) -> QuantPlan:
    """Return the plan for one graph: which tensors and constants are quantized, and which are not.

    Matrix operators are quantized wherever ``target`` has a kernel. Any other operator is only if
    it carries between them: an input comes from an integer kernel and the output goes to one.
    What merely moves values follows; activations that the output's range makes redundant are
    absorbed. The rest stays float, with the reason.

    Args:
        layout: the graph.
        config: types, granularity and exclusions.
        target: which kernels there are.
        without: node key -> reason why it has to stay float.

    Raises:
        ConfigError: a selector of ``config.excluded`` fits no node.
    """
    placement = _Placement(layout, config, target, without or {})
    placement.decide()
    return placement.plan()


class _Placement:
    def __init__(
        self, layout: Layout, config: QConfig, target: Target, without: Mapping[str, str]
    ) -> None:
        self.layout, self.config, self.target = layout, config, target
        self.without = without
        self.graph, self.values = layout.graph, layout.values
        self.nodes = [node for node, _ in layout.placed()]
        self.reasons: dict[ir.Node, str] = {}
        self.excluded = self._excluded()
        self.integer: dict[ir.Node, None] = {}

    # --- which nodes -----------------------------------------------------------------------------

    def decide(self) -> None:
        for node in self.nodes:
            reason = self.without.get(self.graph.node_key(node)) or self._obstacle(node)
            reason = "excluded" if node in self.excluded else reason
            if reason is None:
                self.integer[node] = None
            else:
                self.reasons[node] = reason
        changed = True
        while changed:  # dropping one node may leave its neighbours alone
            alone = [n for n in self.integer if not self._carries(n)]
            changed = bool(alone)
            for node in alone:
                del self.integer[node]
                self.reasons[node] = NARROW if node.op_type in self.target.matrix else ALONE

    def _excluded(self) -> set[ir.Node]:
        found: set[ir.Node] = set()
        for selector in self.config.excluded:
            hits = {
                node
                for node in self.nodes
                if node.op_type == selector or fnmatchcase(self.graph.node_key(node), selector)
            }
            if not hits:
                raise ConfigError(f"exclude {selector!r}: no node has such a name or operator type")
            found |= hits
        return found

    def _obstacle(self, node: ir.Node) -> str | None:
        """Return why a node cannot run in an integer kernel, None if it can."""
        if node.op_type in self.target.matrix:
            return self._matrix_obstacle(node)
        if node.op_type not in self.target.elementwise:
            return NO_KERNEL
        if node.op_type == "AveragePool" and "dilations" in node.attributes:
            return "onnxruntime fuses a dilated AveragePool into a kernel that refuses it"
        values = [v for v in self._data_inputs(node) if not self._is_stored(v)]
        if not values or not all(self._is_float32(v) for v in (*values, *node.outputs)):
            return "not float32 activations"
        return None

    def _matrix_obstacle(self, node: ir.Node) -> str | None:
        x, weight = node.inputs[0], node.inputs[1]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if x is None or weight is None or not self._is_float32(x):
            return "not float32"
        if not self._is_stored(weight):
            return BOTH_COMPUTED if self._is_computed(x) else "its weight is computed at run time"
        if self._is_stored(x):
            return "both inputs are constants"
        if bias is not None and not self._is_stored(bias):
            return "its bias is computed at run time"
        if node.op_type == "Gemm":
            scaled = [a.value for n, a in node.attributes.items() if n in ("alpha", "beta")]
            if any(value != 1.0 for value in scaled):
                return "no integer kernel with alpha or beta other than 1"
            if bias is not None and self._rank(bias) != 1:
                return "no integer kernel with a bias that is not a vector"
        return None

    def _is_narrow(self, node: ir.Node) -> bool:
        """Whether converting the input of a matrix product costs more than the kernel saves."""
        columns = self._columns(node)
        few = columns is not None and columns < self.target.least_columns
        return node.op_type != "Conv" and few

    def _columns(self, node: ir.Node) -> int | None:
        """Return how many output channels share the input of a matrix operator."""
        total = 0
        x = node.inputs[0]
        assert x is not None
        for user in x.consumers():
            weight = user.inputs[1] if len(user.inputs) > 1 else None
            if user.op_type == node.op_type and user.inputs[0] is x and weight is not None:
                shape = self.graph.type_of(weight).shape
                size = shape[weight_axis(user, len(shape))] if shape else None
                if not isinstance(size, int):
                    return None
                total += size
        return total

    def _carries(self, node: ir.Node) -> bool:
        if node.op_type in self.target.matrix:
            return not self._is_narrow(node) or self._from_integer(node.inputs[0])
        inputs = [v for v in self._data_inputs(node) if not self._is_stored(v)]
        return any(self._from_integer(v) for v in inputs) and self._to_integer(node.outputs[0])

    # --- how values travel -----------------------------------------------------------------------

    def _from_integer(self, value: ir.Value | None) -> bool:
        """Whether the value comes out of an integer kernel, perhaps moved since."""
        node = None if value is None else value.producer()
        if node is None:
            return False
        if node in self.integer or self._absorbs(node):
            return True
        data = self._moved_input(node)
        return data is not None and self._from_integer(data)

    def _to_integer(self, value: ir.Value) -> bool:
        """Whether an integer kernel reads the value, perhaps moved before."""
        for user in value.consumers():
            if user in self.integer and any(v is value for v in self._data_inputs(user)):
                return True
            moved = self._moved_input(user) is value or self._absorbs(user)
            if moved and any(self._to_integer(v) for v in user.outputs):
                return True
        return False

    def _absorbs(self, node: ir.Node) -> bool:
        """Whether ``node`` is an activation that its producer's output clamp replaces."""
        value = node.inputs[0] if node.inputs else None
        producer = None if value is None else value.producer()
        return (
            node.op_type in self.target.absorbed
            and node not in self.excluded
            and producer in self.integer
            and value is not None
            and len(value.consumers()) == 1
            and not value.is_graph_output()
            and producer is not None
            and producer.op_type in ("Conv", "Gemm", "MatMul", "Add", "Mul")
            and self._constant_bounds(node)
        )

    def _constant_bounds(self, node: ir.Node) -> bool:
        bounds = bounds_of(self.values, node)
        return bounds is not None and bounds[0] <= 0 <= bounds[1]  # every grid holds 0

    def _moved_input(self, node: ir.Node) -> ir.Value | None:
        """Return the input whose values ``node`` only moves, None if it computes."""
        if node in self.excluded:
            return None
        moves = node.op_type in self.target.moving and self._moves_exactly(node)
        if not moves and not self._is_zero_pad(node):
            return None
        value = node.inputs[0]
        return value if value is not None and self._is_float32(value) else None

    def _moves_exactly(self, node: ir.Node) -> bool:
        if node.op_type == "Resize":
            mode = node.attributes.get("mode")
            return mode is None or mode.as_string() == "nearest"
        if node.op_type == "MaxPool":
            return len([v for v in node.outputs if v.name]) == 1
        return True

    def _is_zero_pad(self, node: ir.Node) -> bool:
        """Whether ``node`` pads with zeros for matrix operators alone, which take that over."""
        if node.op_type not in self.target.folded:
            return False
        mode = node.attributes.get("mode")
        if mode is not None and mode.as_string() != "constant":
            return False
        fill = node.inputs[2] if len(node.inputs) > 2 else None
        number = None if fill is None else self.values.small_constant(fill)
        users = node.outputs[0].consumers()
        return (fill is None or (number is not None and not number.any())) and all(
            u.op_type == "Conv" and u in self.integer for u in users
        )

    def _data_inputs(self, node: ir.Node) -> list[ir.Value]:
        """Return the inputs that an integer kernel reads as codes, constants included."""
        if node.op_type in self.target.matrix:
            count = 2
        elif node.op_type == "Where":
            return [v for v in node.inputs[1:] if v is not None]
        else:
            count = 1 if node.op_type in ("Softmax", "AveragePool") else len(node.inputs)
        return [v for v in node.inputs[:count] if v is not None]

    # --- what is known of a value ----------------------------------------------------------------

    def _is_stored(self, value: ir.Value) -> bool:
        return self.graph.key(value) in self.values.stored

    def _is_computed(self, value: ir.Value) -> bool:
        return self.values.is_computed(value)

    def _is_float32(self, value: ir.Value) -> bool:
        return self.graph.type_of(value).dtype == ir.DataType.FLOAT

    def _rank(self, value: ir.Value) -> int | None:
        return self.graph.type_of(value).rank

    # --- the plan --------------------------------------------------------------------------------

    def plan(self) -> QuantPlan:
        plan = QuantPlan()
        for node in self.integer:
            for value in self._data_inputs(node):
                if not self._is_stored(value):
                    self._add_tensor(plan, value)
            self._add_output(plan, node)
        for node in self.integer:
            self._add_constants(plan, node)
        for node in self.nodes:
            if self._is_lookup(node):
                self._add_lookup(plan, node)
        for node in self.nodes:
            plan.nodes[self.graph.node_key(node)] = self._node_plan(plan, node)
        return plan

    def _add_tensor(self, plan: QuantPlan, value: ir.Value) -> str:
        """Quantize ``value``; return the key of the tensor whose scale it has."""
        key = self.graph.key(value)
        if key in plan.tensors:
            return plan.tensors[key].source
        node = value.producer()
        if node is not None and self._is_zero_pad(node):
            assert node.inputs[0] is not None
            return self._add_tensor(plan, node.inputs[0])
        moved = None if node is None else self._moved_input(node)
        if moved is not None and self._from_integer(moved):
            source, fixed = self._add_tensor(plan, moved), None
        else:
            source, fixed = key, self.target.fixed.get(node.op_type if node else "")
        plan.tensors[key] = TensorPlan(spec=self.config.activation_spec, source=source, fixed=fixed)
        if node is not None and node.op_type == "Split" and source != key:
            for other in node.outputs:  # the kernel wants all of them quantized alike
                self._add_tensor(plan, other)
        return source

    def _add_output(self, plan: QuantPlan, node: ir.Node) -> None:
        value = node.outputs[0]
        users = value.consumers()
        if len(users) == 1 and self._absorbs(users[0]):
            value = users[0].outputs[0]
        if node.op_type not in self.target.float_output or self._to_integer(value):
            self._add_tensor(plan, value)

    def _add_constants(self, plan: QuantPlan, node: ir.Node) -> None:
        node_key = self.graph.node_key(node)
        for index, value in enumerate(node.inputs):
            if value is None or not self._is_stored(value):
                continue
            key = self.graph.key(value)
            if node.op_type not in self.target.matrix:
                if any(v is value for v in self._data_inputs(node)):
                    spec = self.config.activation_spec
                    plan.constants[node_key, index] = ConstantPlan(value=key, spec=spec)
            elif index == 1:
                rank = self._rank(value)
                axis = weight_axis(node, rank) if rank in (2, 3, 4, 5) else None
                if node.op_type == "MatMul" and rank != 2:
                    axis = None
                plan.constants[node_key, 1] = ConstantPlan(
                    value=key, spec=self.config.weight_spec(axis)
                )
            elif index == 2:
                x = node.inputs[0]
                assert x is not None
                source = self._add_tensor(plan, x)
                plan.biases[node_key, 2] = BiasPlan(
                    value=key, activation=source, weight=(node_key, 1)
                )

    def _is_lookup(self, node: ir.Node) -> bool:
        """Whether ``node`` fetches rows of a table that is worth storing as codes."""
        table = node.inputs[0] if node.op_type in self.target.lookup else None
        excluded = node in self.excluded or self.graph.node_key(node) in self.without
        if table is None or excluded or not self._is_stored(table):
            return False
        size = self.values.stored[self.graph.key(table)].size
        return self._is_float32(table) and size >= self.target.least_table

    def _add_lookup(self, plan: QuantPlan, node: ir.Node) -> None:
        key, output = self.graph.node_key(node), self.graph.key(node.outputs[0])
        spec = self.config.activation_spec
        table = node.inputs[0]
        assert table is not None
        plan.constants[key, 0] = ConstantPlan(value=self.graph.key(table), spec=spec)
        plan.tensors[output] = TensorPlan(spec=spec, source=output, table=(key, 0))

    def _node_plan(self, plan: QuantPlan, node: ir.Node) -> NodePlan:
        if node in self.integer:
            return NodePlan(node.op_type, "integer")
        if self._absorbs(node):
            return NodePlan(node.op_type, "absorbed")
        if self._is_lookup(node):
            return NodePlan(node.op_type, "moves")
        outputs = {self.graph.key(v) for v in node.outputs if v.name}
        moved = self._moved_input(node)
        moves = moved is not None and self._from_integer(moved)
        if moves and (self._is_zero_pad(node) or outputs & set(plan.tensors)):
            return NodePlan(node.op_type, "moves")
        if not any(self.graph.type_of(v).is_float for v in node.outputs):
            return NodePlan(node.op_type, "float", "not floating point")
        return NodePlan(node.op_type, "float", self.reasons.get(node, NO_KERNEL))


def weight_axis(node: ir.Node, rank: int | None) -> int:
    """Return the axis of a weight that runs over output channels."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        trans = node.attributes.get("transB")
        return 0 if trans is not None and trans.as_int() else 1
    return (rank or 2) - 1
