"""What a target cannot run is refused before any data is looked at."""

from __future__ import annotations

from qwrap.config import QuantSpec
from qwrap.errors import ConfigError
from qwrap.ops.traits import WEIGHTED
from qwrap.quant.plan import QuantPlan
from qwrap.targets import Target
from qwrap.targets.target import FLOAT32

QUANTIZED_ROLES = ("integer", "pairs", "moves", "absorbed")


def check_obeys(plan: QuantPlan, target: Target) -> None:
    """Refuse a plan with types or scales that a target cannot carry.

    Raises:
        ConfigError: says which node or tensor, what was asked, and what the target runs.
    """
    if target.kernels is None:
        return
    for key, node in plan.nodes.items():
        activation = node.dtype if node.role in QUANTIZED_ROLES else FLOAT32
        index = WEIGHTED[node.op_type].weight if node.op_type in WEIGHTED else 0
        constant = plan.constants.get((key, index))
        is_weight = constant is not None and (node.op_type in WEIGHTED or activation == FLOAT32)
        weight = str(constant.spec.dtype) if constant is not None and is_weight else FLOAT32
        if not target.supports(node.op_type, activation, weight):
            asked = f"activations of {activation}" + (f", weights of {weight}" if is_weight else "")
            raise ConfigError(
                f"node {key!r} ({node.op_type}): {asked}; target {target.name!r} runs "
                f"{node.op_type} with {target.runs(node.op_type)}. Choose such a type, or begin "
                f"with QConfig.for_target({target.name!r})"
            )
    _check_activations(plan, target)
    _check_constants(plan, target)


def _check_activations(plan: QuantPlan, target: Target) -> None:
    for key, scale in plan.scales().items():
        _check(f"tensor {key!r}", scale.spec, target.symmetric, target)


def _check_constants(plan: QuantPlan, target: Target) -> None:
    for (key, index), constant in plan.constants.items():
        op_type, spec = plan.nodes[key].op_type, constant.spec
        what = f"constant {constant.value!r} of node {key!r} ({op_type})"
        is_weight = op_type in WEIGHTED and index == WEIGHTED[op_type].weight
        _check(what, spec, target.symmetric_weights if is_weight else target.symmetric, target)
        if spec.block_size is not None:
            if target.blocks is not None and str(spec.dtype) not in target.blocks:
                raise ConfigError(
                    f"{what}: {spec.dtype} in blocks of {spec.block_size}; target {target.name!r} "
                    f"has blocks of {', '.join(sorted(target.blocks)) or 'no type'} alone"
                )
        elif spec.axis is not None and not target.has_channels(op_type):
            raise ConfigError(
                f"{what}: a scale for each channel; target {target.name!r} has them in "
                f"{', '.join(sorted(target.per_channel or ())) or 'no operator'} alone"
            )


def _check(what: str, spec: QuantSpec, symmetric: frozenset[str], target: Target) -> None:
    if str(spec.dtype) in symmetric and not spec.symmetric:
        raise ConfigError(
            f"{what}: {spec.dtype} with a zero point to choose; target {target.name!r} has it "
            "symmetric: give symmetric=True, or the name of the type instead of a QuantSpec"
        )
    if target.power_of_two and not spec.power_of_two:
        raise ConfigError(
            f"{what}: any scale; target {target.name!r} has powers of two: give power_of_two=True, "
            "or the name of the type instead of a QuantSpec"
        )
