"""How the scale of each quantized tensor moves in training."""

from __future__ import annotations

from dataclasses import replace

from qwrap.config import QConfig, QuantSpec, RangeOverride, Training
from qwrap.errors import ConfigError
from qwrap.graph.index import OnnxGraph
from qwrap.quant.placement.overrides import has_range
from qwrap.quant.plan import Conversion, QuantPlan, TensorPlan


def choose_training(plan: QuantPlan, graph: OnnxGraph, config: QConfig) -> None:
    """Write into ``plan``, in place, how each scale moves in training.

    What cannot be had for a tensor becomes the next simpler way: learned zero points need an
    asymmetric type, and one that no absorbed activation ties to the end of the codes; power-of-two
    scales are learned as such; PACT is for activations. The scales of graph inputs with 8 bits or
    more, and of what they are converted to, are learned only where a pattern asks for them: their
    data stay as they were calibrated, and a gradient for them is one more product in what is often
    the largest layer.

    Raises:
        ConfigError: "tqt" is asked for scales that are not powers of two.
    """
    tables = {tensor.table for tensor in plan.tensors.values()}
    ways = {key: _way_of_tensor(plan, graph, key, config) for key in plan.sources()}
    for key, conversion in plan.conversions():
        ways[conversion.key] = _way_of_conversion(graph, key, conversion, config)
    for key, tensor in plan.tensors.items():
        plan.tensors[key] = replace(
            tensor,
            training=ways[tensor.source],
            conversions=tuple(replace(c, training=ways[c.key]) for c in tensor.conversions),
        )
    for point, constant in plan.constants.items():
        way = _asked(constant.value, constant.override, constant.spec, config)
        override = constant.override or RangeOverride()
        is_given = constant.given is not None or has_range(override)
        is_given = is_given and override.training is None
        if point in tables or is_given:
            way = "fixed"
        plan.constants[point] = replace(constant, training="lsq" if way == "pact" else way)


def _way_of_tensor(plan: QuantPlan, graph: OnnxGraph, key: str, config: QConfig) -> Training:
    """Return how the scale of a tensor that has its own is trained."""
    source = plan.tensors[key]
    way = _asked(key, source.override, source.spec, config)
    said = source.override is not None and source.override.training is not None
    free = source.is_observed or (said and source.table is None)
    given = _is_given(graph, key, source.spec)
    if not free or _is_dictated(source) or (way != "follow" and not said and given):
        return "fixed"
    return "lsq" if way == "lsq+" and _is_absorbed(plan, graph, key) else way


def _way_of_conversion(
    graph: OnnxGraph, key: str, conversion: Conversion, config: QConfig
) -> Training:
    """Return how the scale of a conversion of tensor ``key`` is trained."""
    way = _asked(conversion.key, conversion.override, conversion.spec, config)
    said = conversion.override is not None and conversion.override.training is not None
    held = way != "follow" and _is_given(graph, key, conversion.spec)
    return "fixed" if not said and (conversion.fixed is not None or held) else way


def _asked(name: str, override: RangeOverride | None, spec: QuantSpec, config: QConfig) -> Training:
    """Return what was asked for a tensor, as far as its type has it."""
    own = override.training if override is not None else None
    way = own or config.training
    if spec.dtype.function is not None or way in ("fixed", "follow"):
        return "fixed" if spec.dtype.function is not None else way
    if spec.power_of_two or spec.scale_type == "float8e8m0":
        return "tqt"
    if way == "tqt":
        raise ConfigError(
            f"tensor {name!r}: training='tqt' learns powers of two, but the spec of its type "
            f"{spec.dtype} does not ask for them; give a QuantSpec with power_of_two=True, or "
            "choose 'lsq'"
        )
    has_choice = spec.dtype.has_zero_point and not (spec.symmetric or spec.restricted)
    return "lsq" if way == "lsq+" and not has_choice else way


def _is_dictated(source: TensorPlan) -> bool:
    """Whether an operator's kernel is right for the one scale only."""
    return source.fixed is not None and not has_range(source.override or RangeOverride())


def _is_given(graph: OnnxGraph, key: str, spec: QuantSpec) -> bool:
    """Whether a tensor is a graph input with codes enough."""
    value = graph.values.get(key)
    return value is not None and value.is_graph_input() and spec.dtype.bits >= 8


def _is_absorbed(plan: QuantPlan, graph: OnnxGraph, key: str) -> bool:
    node = graph.values[key].producer()
    return node is not None and plan.nodes[graph.node_key(node)].role == "absorbed"
