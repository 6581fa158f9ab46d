"""Decides where quantization sits: the only module that does."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial

import onnx_ir as ir

from qwrap.config import QConfig
from qwrap.errors import ConfigError
from qwrap.graph.nodes import STANDARD
from qwrap.model.layout import Layout
from qwrap.ops.traits import QUANTIZED, WEIGHTED
from qwrap.quant.placement.eligibility import NO_KERNEL, QUANTIZED_ALREADY, Eligibility
from qwrap.quant.placement.half import place_half
from qwrap.quant.placement.nodes import QuantizedNodes
from qwrap.quant.placement.obey import check_obeys
from qwrap.quant.placement.opsets import carried_reals
from qwrap.quant.placement.outer import at_8_bits, outer_of
from qwrap.quant.placement.overrides import apply_overrides
from qwrap.quant.placement.regions import Types
from qwrap.quant.placement.specs import Specs, is_fusable
from qwrap.quant.placement.tensor_overrides import Named
from qwrap.quant.placement.tensor_ranges import add_named_constants, apply_named
from qwrap.quant.placement.tensors import QuantizedTensors
from qwrap.quant.placement.trainable import choose_training
from qwrap.quant.placement.weights_only import place_weight, place_weights, warn_of_rounding
from qwrap.quant.plan import (
    BiasPlan,
    ConstantPlan,
    NodePlan,
    QuantPlan,
    Role,
    TensorPlan,
)
from qwrap.targets import Target, find_target

NO_CLAMP = "its input comes out of an integer kernel as floats"
UNMOVED = "stands among float nodes"


def place(
    layout: Layout,
    config: QConfig,
    target: Target | None = None,
    without: Mapping[str, str] | None = None,
) -> QuantPlan:
    """Return the plan for one graph: which tensors and constants are quantized, and which are not.

    Of the nodes that ``target`` has integer kernels for, those are quantized that make the whole
    fastest, conversions included. What merely moves values follows; activations that the output's
    range makes redundant are absorbed. The rest stays float, with the reason.

    Args:
        layout: the graph.
        config: types, granularity and exclusions.
        target: which kernels there are; None for those of ``config.target``.
        without: node key -> reason why it has to stay float.

    Raises:
        ConfigError: the target cannot run what is asked for; a selector of ``config.excluded`` or
            ``config.regions`` fits no node, one of ``config.overrides`` no quantized tensor, or
            what ``config.tensors`` says cannot be had.
    """
    strict = without is None
    without = dict(without or {})
    target = target or find_target(config.target)
    types, named = Types(layout, config), Named(layout, config)
    barred = types.left_float() | without | _excluded(layout, config)
    reals = carried_reals(config, layout.graph.opset)
    may_absorb = partial(_may_absorb, types, named, target)
    facts = Eligibility(layout, target, barred, reals, may_absorb=may_absorb)
    specs = Specs(facts, config, types, named)
    if config.activation_specs:
        plan = _Placement(facts, specs).plan()
    else:
        plan = place_weights(facts, specs)
        add_named_constants(plan, facts, specs)
    plan.notes += types.notes
    place_half(plan, layout, types, without)
    apply_overrides(plan, layout, config, strict=strict)
    apply_named(plan, layout, named)
    check_obeys(plan, target)
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


def _may_absorb(
    types: Types,
    named: Named,
    target: Target,
    producer: ir.Node,
    activation: ir.Node,
    bounds: tuple[float, float],
) -> bool:
    """Whether the activation behind a node can be a part of its kernel.

    They are of one type: that of the node, where nothing was said of the activation and it cannot
    be quantized by itself. And in onnxruntime codes have to stand for it: where they end at 0, all
    of them can lie on one side of it, as those of an asymmetric type can.
    """
    spec, other = types.of(producer), types.of(activation)
    if not (types.is_chosen(activation) or types.everything):
        other = spec
    if not named.may_absorb(activation):
        return False
    said = named.base(activation.outputs[0])
    if said is not None and spec is not None and other is not None:
        spec = other = said
    if spec is None or other is None:
        return spec is other
    one_sided = not (target.is_cpu and spec.symmetric and is_fusable(spec))
    return spec.dtype == other.dtype and (one_sided or 0 not in bounds)


class _Placement:
    def __init__(self, facts: Eligibility, specs: Specs) -> None:
        self.graph, self.config, self.target = facts.graph, specs.config, facts.target
        self.facts, self.specs = facts, specs
        self.nodes = QuantizedNodes(facts, specs)
        self.integer, self.reasons = self.nodes.chosen, self.nodes.reasons
        self.tensors = QuantizedTensors(facts, specs, self.nodes)

    def plan(self) -> QuantPlan:
        plan = QuantPlan(fused=self._is_fused())
        if self.config.first_last_8bit:
            self._widen(plan)
        if self.nodes.slow is not None and self.integer:
            plan.notes.append(f"{self.nodes.slow}: it computes in float between the pairs")
        self.tensors.find()
        self.tensors.add_to(plan)
        for node in self.integer:
            self._add_constants(plan, node)
            self._add_bias_behind(plan, node)
        for node in self.tensors.lookups:
            self._add_lookup(plan, node)
        for node in self.facts.nodes:
            plan.nodes[self.graph.node_key(node)] = self._node_plan(plan, node)
        add_named_constants(plan, self.facts, self.specs)
        warn_of_rounding(plan, self.graph)
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
        wide |= {self.graph.key(self.tensors.source(value)) for value in values if value.name}
        for node in self.facts.nodes:  # tensors of one scale
            moved = self.facts.moved_input(node)
            if moved is not None and self.graph.key(self.tensors.source(node.outputs[0])) in wide:
                wide |= {self.graph.key(v) for v in node.outputs if v.name}
        lookups = [node for node in self.facts.nodes if self.facts.is_lookup(node)]
        for node in lookups:
            if self.graph.key(node.outputs[0]) in wide and node.inputs[0] is not None:
                wide.add(self.graph.key(node.inputs[0]))

    # --- constants -------------------------------------------------------------------------------

    def _add_constants(self, plan: QuantPlan, node: ir.Node) -> None:
        key = self.graph.node_key(node)
        operands = set(self.facts.operand_inputs(node))
        known = WEIGHTED.get(node.op_type) if node.domain in STANDARD else None
        for index, value in enumerate(node.inputs):
            if value is None or not self.facts.is_stored(value):
                continue
            if known is not None and index == known.bias:
                self._add_bias(plan, node, index, value)
            elif (index, value) in operands and known is not None and index == known.weight:
                if value in self.specs.named or not self.specs.types.keeps_weight(node):
                    spec = self.specs.weight(node)
                    plan.constants[key, index] = ConstantPlan(
                        value=self.graph.key(value), spec=spec
                    )
            elif (index, value) in operands:
                spec = self.specs.operand(node, value)
                plan.constants[key, index] = ConstantPlan(value=self.graph.key(value), spec=spec)

    def _add_bias(self, plan: QuantPlan, node: ir.Node, index: int, bias: ir.Value) -> None:
        """Store a bias as the target has it: in int32 where the accumulator has a scale."""
        key, x = self.graph.node_key(node), node.inputs[0]
        weight = (key, WEIGHTED[node.op_type].weight)
        is_vector = self.graph.type_of(bias).rank == 1
        if x is None or weight not in plan.constants or not is_vector or bias in self.specs.named:
            return
        if self.target.bias != "int32":
            if self.target.bias != "float32":
                spec = self.config.weight_spec_of(self.target.bias, None)
                plan.constants[key, index] = ConstantPlan(value=self.graph.key(bias), spec=spec)
            return
        read = plan.read_by(key, 0, self.graph.key(x))
        if read is None:
            return
        if self.specs.bias_as_codes(node, plan.spec_of(read), plan.constants[weight].spec):
            plan.biases[key, index] = BiasPlan(
                value=self.graph.key(bias), activation=read, weight=weight
            )

    def _add_bias_behind(self, plan: QuantPlan, node: ir.Node) -> None:
        """Quantize the bias that a float Add brings to a MatMul, where onnxruntime joins the two.

        Where all shapes are known it makes a Gemm of them before it looks for integer kernels,
        and that one fuses only with an int32 bias.
        """
        add = self.facts.bias_add(node)
        if add is None or self.nodes.odd is not None or not self.specs.has_kernel(node):
            return
        if add in self.integer or not self.target.is_cpu:
            return
        if self.graph.key(node.outputs[0]) in plan.tensors:
            return
        index = 0 if add.inputs[1] is node.outputs[0] else 1
        bias, x = add.inputs[index], node.inputs[0]
        assert bias is not None
        if bias in self.specs.named:
            return
        assert x is not None
        read = plan.read_by(self.graph.node_key(node), 0, self.graph.key(x))
        assert read is not None
        plan.biases[self.graph.node_key(add), index] = BiasPlan(
            value=self.graph.key(bias),
            activation=read,
            weight=(self.graph.node_key(node), 1),
        )

    def _add_lookup(self, plan: QuantPlan, node: ir.Node) -> None:
        key, output = self.graph.node_key(node), self.graph.key(node.outputs[0])
        table = node.inputs[0]
        assert table is not None
        spec = self.specs.table(node)
        plan.constants[key, 0] = ConstantPlan(value=self.graph.key(table), spec=spec)
        conversions = self.tensors.conversions(node.outputs[0])
        plan.tensors[output] = TensorPlan(
            spec=spec, source=output, table=(key, 0), conversions=conversions
        )

    def _lacks_kernel(self, node: ir.Node) -> bool:
        """Whether a quantized node computes in float, where that is not so for the whole model."""
        if self.nodes.is_in_pairs(node):
            return True
        return self._is_fused() and not self.specs.has_types(node)

    def _is_fused(self) -> bool:
        """Whether there are kernels for the types of the model at large, or else of some nodes."""
        some = self.nodes.odd is None and any(map(self.specs.has_types, self.integer))
        return self.nodes.slow is None or some

    def _node_plan(self, plan: QuantPlan, node: ir.Node) -> NodePlan:
        if node in self.integer:
            role: Role = "pairs" if self._lacks_kernel(node) else "integer"
            said = self.specs.named.base(self.nodes.written_by(node)) or self.specs.of(node)
            return NodePlan(node.op_type, role, dtype=str(said.dtype))
        first = self.graph.key(node.outputs[0])
        if self.facts.absorbed_by(node) in self.integer:
            if first in plan.tensors:
                return NodePlan(node.op_type, "absorbed", dtype=str(plan.tensors[first].spec.dtype))
            return NodePlan(node.op_type, "float", NO_CLAMP)  # no codes to clamp
        moved = self.facts.moved_input(node)
        follows = moved is not None and self.tensors.source(node.outputs[0]) is not node.outputs[0]
        outputs = [self.graph.key(v) for v in node.outputs if v.name]
        quantized = [key for key in outputs if key in plan.tensors]
        if node in self.tensors.lookups or (follows and quantized):
            dtype = str(plan.tensors[quantized[0]].spec.dtype) if quantized else ""
            return NodePlan(node.op_type, "moves", dtype=dtype)
        if self.specs.types.of(node) is None:
            return place_weight(plan, self.facts, self.specs, node)
        if QUANTIZED.fullmatch(node.op_type):
            return NodePlan(node.op_type, "float", QUANTIZED_ALREADY)
        if not any(self.graph.type_of(v).is_float for v in node.outputs):
            return NodePlan(node.op_type, "float", "not floating point")
        reason = self.reasons.get(node, NO_KERNEL)
        if reason == NO_KERNEL and (moved is not None or node.op_type in self.target.absorbed):
            reason = UNMOVED
        return NodePlan(node.op_type, "float", reason)
