"""How the scale of each quantized tensor moves in training."""

from __future__ import annotations

from dataclasses import replace

from qwrap.config import QConfig, QuantSpec, RangeOverride, Training
from qwrap.errors import ConfigError
from qwrap.graph.index import OnnxGraph
from qwrap.quant.placement.overrides import has_range
from qwrap.quant.plan import QuantPlan, TensorPlan


def choose_training(plan: QuantPlan, graph: OnnxGraph, config: QConfig) -> None:
    """Write into ``plan``, in place, how each scale moves in training.

    What cannot be had for a tensor becomes the next simpler way: learned zero points need an
    asymmetric type, and one that no absorbed activation ties to the end of the codes; power-of-two
    scales are learned as such; PACT is for activations. The scales of graph inputs with 8 bits or
    more are learned only where a pattern asks for them: their data stay as they were calibrated,
    and a gradient for them is one more product in what is often the largest layer.

    Raises:
        ConfigError: "tqt" is asked for scales that are not powers of two.
    """
    tables = {tensor.table for tensor in plan.tensors.values()}
    for key, tensor in plan.tensors.items():
        if tensor.source not in plan.tensors:
            continue  # that of a conversion
        source = plan.tensors[tensor.source]
        way = _asked(tensor.source, source.override, source.spec, config)
        said = source.override is not None and source.override.training is not None
        free = source.is_observed or (said and source.table is None)
        if (
            not free
            or _is_dictated(source)
            or (way != "follow" and not said and _is_given(graph, source))
        ):
            way = "fixed"
        elif way == "lsq+" and _is_absorbed(plan, graph, tensor):
            way = "lsq"
        plan.tensors[key] = replace(tensor, training=way)
    for point, constant in plan.constants.items():
        way = _asked(constant.value, constant.override, constant.spec, config)
        override = constant.override or RangeOverride()
        is_given = constant.given is not None or has_range(override)
        is_given = is_given and override.training is None
        if point in tables or is_given:
            way = "fixed"
        plan.constants[point] = replace(constant, training="lsq" if way == "pact" else way)


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


def _is_given(graph: OnnxGraph, source: TensorPlan) -> bool:
    """Whether a tensor is a graph input with codes enough."""
    value = graph.values.get(source.source)
    return value is not None and value.is_graph_input() and source.spec.dtype.bits >= 8


def _is_absorbed(plan: QuantPlan, graph: OnnxGraph, tensor: TensorPlan) -> bool:
    node = graph.values[tensor.source].producer()
    return node is not None and plan.nodes[graph.node_key(node)].role == "absorbed"
