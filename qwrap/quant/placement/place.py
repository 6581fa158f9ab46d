"""Decides where quantization sits: the only module that does."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import onnx_ir as ir

from qwrap.config import QConfig
from qwrap.errors import ConfigError
from qwrap.model.layout import Layout
from qwrap.ops.traits import QUANTIZED
from qwrap.quant.placement.cut import worth_it
from qwrap.quant.placement.eligibility import NO_KERNEL, QUANTIZED_ALREADY, Eligibility
from qwrap.quant.placement.opsets import carried_reals
from qwrap.quant.placement.outer import at_8_bits, outer_of
from qwrap.quant.placement.overrides import apply_overrides
from qwrap.quant.placement.specs import Specs, is_fusable
from qwrap.quant.placement.target import ORT_CPU, Target
from qwrap.quant.placement.trainable import choose_training
from qwrap.quant.placement.weights_only import place_weights
from qwrap.quant.plan import BiasPlan, ConstantPlan, NodePlan, QuantPlan, TensorPlan

TOO_DEAR = "an integer kernel would not pay for the conversions around it"
NO_CLAMP = "its input comes out of an integer kernel as floats"
UNMOVED = "stands among float nodes"
ALONE = "no quantized neighbour on both sides: quantizing it alone would be slower than float"


def place(
    layout: Layout,
    config: QConfig,
    target: Target = ORT_CPU,
    without: Mapping[str, str] | None = None,
) -> QuantPlan:
    """Return the plan for one graph: which tensors and constants are quantized, and which are not.

    Of the nodes that ``target`` has integer kernels for, those are quantized that make the whole
    fastest, conversions included. What merely moves values follows; activations that the output's
    range makes redundant are absorbed. The rest stays float, with the reason.

    Args:
        layout: the graph.
        config: types, granularity and exclusions.
        target: which kernels there are.
        without: node key -> reason why it has to stay float.

    Raises:
        ConfigError: a selector of ``config.excluded`` fits no node, or one of
            ``config.overrides`` no quantized tensor.
    """
    strict = without is None
    without = dict(without or {})
    reals = carried_reals(config, layout.graph.opset)
    spec = config.activation_spec
    facts = Eligibility(
        layout,
        target,
        {**without, **_excluded(layout, config)},
        reals,
        one_sided=spec is None or not (spec.symmetric and is_fusable(spec)),
    )
    specs = Specs(facts, config)
    if config.activation_spec is None:
        plan = place_weights(facts, specs)
    else:
        placement = _Placement(facts, specs)
        placement.decide()
        plan = placement.plan()
    apply_overrides(plan, layout, config, strict=strict)
    choose_training(plan, layout.graph, config)
    plan.without = without
    return plan


def _excluded(layout: Layout, config: QConfig) -> dict[str, str]:
    found: dict[str, str] = {}
    keys = [layout.graph.node_key(node) for node, _ in layout.placed()]
    for selector in config.excluded:
        hits = [
            k for k in keys if layout.graph.nodes[k].op_type == selector or fnmatchcase(k, selector)
        ]
        if not hits:
            raise ConfigError(f"exclude {selector!r}: no node has such a name or operator type")
        found |= dict.fromkeys(hits, "excluded")
    return found


class _Placement:
    def __init__(self, facts: Eligibility, specs: Specs) -> None:
        self.graph, self.config, self.target = facts.graph, specs.config, facts.target
        self.facts, self.specs = facts, specs
        self.slow = specs.slow()
        self.odd: str | None = None
        self.reasons: dict[ir.Node, str] = {}
        self.integer: dict[ir.Node, None] = {}

    # --- which nodes -----------------------------------------------------------------------------

    def decide(self) -> None:
        candidates = []
        for node in self.facts.nodes:
            reason = self.facts.obstacle(node)
            if reason is None:
                candidates.append(node)
            else:
                self.reasons[node] = reason
        self.integer = dict.fromkeys(candidates)
        self._drop_alone()
        self.odd = self._odd_type()
        self.slow = self.odd or self.slow
        if self.config.only_if_faster and self.slow is None:
            most = list(self.integer)
            self.integer = dict.fromkeys(worth_it(self.facts, candidates, most))
            self.reasons |= {n: TOO_DEAR for n in most if n not in self.integer}
            self._drop_alone()

    def _odd_type(self) -> str | None:
        """Return why there are no integer kernels for the types of the graph, None if there are."""
        values = [v for node in self.integer for v in self.facts.data_inputs(node)]
        types = {self.graph.type_of(v).dtype for v in values} - {ir.DataType.FLOAT, None}
        names = sorted(t.name.lower() for t in types if t is not None)
        kind = " and ".join(names)
        if not names:
            return None
        reason = f"onnxruntime has no integer kernels between tensors of {kind}"
        if ir.DataType.FLOAT16 in types:
            reason += (
                ", and its optimiser rounds biases to products of two such scales, unless the "
                "session option session.disable_quant_qdq is 1"
            )
        return reason

    def _drop_alone(self) -> None:
        while alone := [n for n in self.integer if not self._carries(n)]:
            for node in alone:  # dropping one may leave its neighbours alone
                del self.integer[node]
                self.reasons[node] = ALONE

    def _carries(self, node: ir.Node) -> bool:
        """Whether a node has its own reason to be quantized, or stands between such nodes."""
        if node.op_type in self.target.matrix:
            return True
        inputs = self.facts.data_inputs(node)
        return any(map(self._from_integer, inputs)) and self._to_integer(node.outputs[0])

    def _from_integer(self, value: ir.Value) -> bool:
        """Whether the value comes out of an integer kernel, perhaps moved since."""
        node = value.producer()
        if node is None:
            return False
        if node in self.integer or self.facts.absorbed_by(node) in self.integer:
            return True
        data = self.facts.moved_input(node)
        return data is not None and self._from_integer(data)

    def _to_integer(self, value: ir.Value) -> bool:
        """Whether an integer kernel reads the value, perhaps moved before."""
        for user in value.consumers():
            if user in self.integer and any(v is value for v in self.facts.operands(user)):
                return True
            goes_on = self.facts.moved_input(user) is value or (
                self.facts.absorbed_by(user) in self.integer
            )
            if goes_on and any(map(self._to_integer, user.outputs)):
                return True
        return False

    # --- the plan --------------------------------------------------------------------------------

    def plan(self) -> QuantPlan:
        plan = QuantPlan(fused=self.slow is None)
        if self.config.first_last_8bit:
            self._widen(plan)
        if self.slow is not None and self.integer:
            plan.notes.append(f"{self.slow}: it computes in float between the pairs")
        for node in self.integer:
            for value in self.facts.data_inputs(node):
                self._add_tensor(plan, value)
            self._add_output(plan, node)
        for node in self.integer:
            self._add_constants(plan, node)
            self._add_bias_behind(plan, node)
        for node in filter(self.facts.is_lookup, self.facts.nodes):
            self._add_lookup(plan, node)
        for node in self.facts.nodes:
            plan.nodes[self.graph.node_key(node)] = self._node_plan(plan, node)
        return plan

    def _widen(self, plan: QuantPlan) -> None:
        """Keep what lies at the ends of the graph at 8 bits.

        That is what first and last layers read, what lies in front of the first and what behind
        the last, with all tensors of the same scales.
        """
        layers = [node for node in self.integer if node.op_type in self.target.matrix]
        outer = outer_of(self.facts, layers)
        self.specs.wide_layers |= outer.layers
        kept = [self.graph.node_key(node) for node in layers if node in outer.layers]
        asked = [self.config.activation_spec, self.config.weight_spec(None, 0)]
        if any(spec is not None and at_8_bits(spec) != spec for spec in asked):
            plan.notes.append(f"first and last layers, at 8 bits: {', '.join(kept)}")
        values = [v for node in outer.ends for v in node.outputs]
        values += [v for node in outer.layers for v in self.facts.data_inputs(node)]
        wide = self.specs.wide_values
        wide |= {self.graph.key(self._source(value)) for value in values if value.name}
        for node in self.facts.nodes:  # tensors of one scale
            moved = self.facts.moved_input(node)
            if moved is not None and self.graph.key(self._source(node.outputs[0])) in wide:
                wide |= {self.graph.key(v) for v in node.outputs if v.name}
        lookups = [node for node in self.facts.nodes if self.facts.is_lookup(node)]
        for node in lookups:
            if self.graph.key(node.outputs[0]) in wide and node.inputs[0] is not None:
                wide.add(self.graph.key(node.inputs[0]))

    def _source(self, value: ir.Value) -> ir.Value:
        """Return the tensor whose scale ``value`` has."""
        node = value.producer()
        moved = None if node is None else self.facts.moved_input(node)
        return self._source(moved) if moved is not None and self._from_integer(moved) else value

    def _add_tensor(self, plan: QuantPlan, value: ir.Value) -> str:
        """Quantize ``value``; return the key of the tensor whose scale it has."""
        key = self.graph.key(value)
        if key in plan.tensors:
            return plan.tensors[key].source
        node = value.producer()
        moved = None if node is None else self.facts.moved_input(node)
        if moved is not None and self._source(value) is not value:
            source, fixed = self._add_tensor(plan, moved), None
        else:
            source, fixed = key, self.specs.fixed(node)
        spec = plan.tensors[source].spec if source != key else self.specs.activation(value)
        plan.tensors[key] = TensorPlan(spec=spec, source=source, fixed=fixed)
        if node is not None and node.op_type == "Split" and source != key:
            for other in node.outputs:  # the kernel wants all of them quantized alike
                self._add_tensor(plan, other)
        return source

    def _add_output(self, plan: QuantPlan, node: ir.Node) -> None:
        value = node.outputs[0]
        users = value.consumers()
        if len(users) == 1 and self.facts.absorbed_by(users[0]) is node:
            value = users[0].outputs[0]
        if node.op_type not in self.target.float_output or self._to_integer(value):
            self._add_tensor(plan, value)

    def _add_constants(self, plan: QuantPlan, node: ir.Node) -> None:
        key = self.graph.node_key(node)
        operands = set(self.facts.operands(node))
        for index, value in enumerate(node.inputs):
            if value is None or not self.facts.is_stored(value):
                continue
            if node.op_type in self.target.matrix and index == 2:
                if not self.specs.bias_as_codes(node):
                    continue
                x = node.inputs[0]
                assert x is not None
                plan.biases[key, 2] = BiasPlan(
                    value=self.graph.key(value),
                    activation=self._add_tensor(plan, x),
                    weight=(key, 1),
                )
            elif value in operands:
                spec = self.specs.activation(value)
                if node.op_type in self.target.matrix:
                    spec = self.specs.weight(node)
                plan.constants[key, index] = ConstantPlan(value=self.graph.key(value), spec=spec)

    def _add_bias_behind(self, plan: QuantPlan, node: ir.Node) -> None:
        """Quantize the bias that a float Add brings to a MatMul, where onnxruntime joins the two.

        Where all shapes are known it makes a Gemm of them before it looks for integer kernels,
        and that one fuses only with an int32 bias.
        """
        add = self.facts.bias_add(node)
        if add is None or self.odd is not None or not self.specs.has_kernel(node):
            return
        if add in self.integer:
            return
        if self.graph.key(node.outputs[0]) in plan.tensors:
            return
        index = 0 if add.inputs[1] is node.outputs[0] else 1
        bias, x = add.inputs[index], node.inputs[0]
        assert bias is not None
        assert x is not None
        plan.biases[self.graph.node_key(add), index] = BiasPlan(
            value=self.graph.key(bias),
            activation=self._add_tensor(plan, x),
            weight=(self.graph.node_key(node), 1),
        )

    def _add_lookup(self, plan: QuantPlan, node: ir.Node) -> None:
        key, output = self.graph.node_key(node), self.graph.key(node.outputs[0])
        table = node.inputs[0]
        assert table is not None
        spec = self.specs.table(node)
        plan.constants[key, 0] = ConstantPlan(value=self.graph.key(table), spec=spec)
        plan.tensors[output] = TensorPlan(spec=spec, source=output, table=(key, 0))

    def _node_plan(self, plan: QuantPlan, node: ir.Node) -> NodePlan:
        if node in self.integer:
            return NodePlan(node.op_type, "integer")
        if self.facts.absorbed_by(node) in self.integer:
            if self.graph.key(node.outputs[0]) in plan.tensors:
                return NodePlan(node.op_type, "absorbed")
            return NodePlan(node.op_type, "float", NO_CLAMP)  # no codes to clamp
        moved = self.facts.moved_input(node)
        follows = moved is not None and self._from_integer(moved)
        outputs = {self.graph.key(v) for v in node.outputs if v.name}
        if self.facts.is_lookup(node) or (follows and outputs & set(plan.tensors)):
            return NodePlan(node.op_type, "moves")
        if QUANTIZED.fullmatch(node.op_type):
            return NodePlan(node.op_type, "float", QUANTIZED_ALREADY)
        if not any(self.graph.type_of(v).is_float for v in node.outputs):
            return NodePlan(node.op_type, "float", "not floating point")
        reason = self.reasons.get(node, NO_KERNEL)
        if reason == NO_KERNEL and (moved is not None or node.op_type in self.target.absorbed):
            reason = UNMOVED
        return NodePlan(node.op_type, "float", reason)
