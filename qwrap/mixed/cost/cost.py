"""What the choices of each group cost in bytes and in bit operations."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch

from qwrap.config import FLOATS, QConfig
from qwrap.dtypes import quant_type
from qwrap.errors import ConfigError, InputError
from qwrap.mixed.choices import Assignment, Choice, Group, all_quantized, config_with, everywhere
from qwrap.mixed.cost.stored import Identity, StoredSizes
from qwrap.model.attributes import attributes_of
from qwrap.model.wrapped import WrappedModel
from qwrap.ops.traits import WEIGHTED
from qwrap.quant.prepare import prepare

Costs = dict[tuple[str, Choice], float]
Shape = tuple[int, ...]


def bytes_of(model: WrappedModel, groups: Sequence[Group], config: QConfig | None = None) -> Costs:
    """Return the bytes that the constants of each group take in the file, for each choice.

    That is codes, packed where a type has fewer than 8 bits, scales and zero points, biases as
    int32 with theirs, and floats where they stay float. What several groups read counts for the
    first of them. With ``rest_bytes`` this adds up to the constants of the exported file, but for
    the scales and zero points of activations, and what calibration returns to float.

    Args:
        model: a wrapped model, unchanged; a copy is prepared for each choice.
        groups: of ``groups_of``.
        config: what else the model will be quantized with.

    Returns:
        (name of a group, choice) -> bytes.
    """
    found: Costs = {}
    for choice in all_choices(groups):
        prepared = prepared_with(model, groups, everywhere(groups, choice), config)
        sizes, seen = StoredSizes(prepared), set[Identity]()
        for group in groups:
            size = sizes.of(group.nodes, seen)
            if choice in group.choices:
                found[group.name, choice] = float(size)
    return found


def rest_bytes(
    model: WrappedModel, groups: Sequence[Group], config: QConfig | None = None
) -> float:
    """Return the bytes of the constants that no group reads; they are the same for all choices."""
    choice = next(iter(all_choices(groups)))
    prepared = prepared_with(model, groups, everywhere(groups, choice), config)
    sizes, seen = StoredSizes(prepared), set[Identity]()
    grouped = {key for group in groups for key in group.nodes}
    for group in groups:
        sizes.of(group.nodes, seen)
    rest = sizes.of((key for key in prepared.graph.nodes if key not in grouped), seen)
    return float(rest + sizes.unread(seen))


def bit_ops_of(
    model: WrappedModel,
    groups: Sequence[Group],
    inputs: Mapping[str, Any],
    config: QConfig | None = None,
) -> Costs:
    """Return the bit operations of each group, for each choice.

    A multiplication of b bits with c bits counts b times c; of a product of two activations both
    have the bits of activations. Convolutions and matrix products count, nothing else does.

    Args:
        model: a wrapped model, unchanged.
        groups: of ``groups_of``.
        inputs: graph input -> tensor or array; shapes are those of a forward on them.
        config: what else the model will be quantized with.

    Returns:
        (name of a group, choice) -> bit operations.

    Source: BOPs as in Wang et al., arXiv:2005.07093, section 3, and HAWQ-V3, arXiv:2011.10680.
    """
    macs, products = _multiplications(model, inputs, config)
    found: Costs = {}
    for group in groups:
        for choice in group.choices:
            activation, weight = bits(choice.activation), bits(choice.weight)
            found[group.name, choice] = float(
                sum(
                    macs.get(key, 0) * activation * (activation if key in products else weight)
                    for key in group.nodes
                )
            )
    return found


def bits(name: str) -> int:
    """Return the bits of a type by its name, "float32" and "float16" included."""
    return int(name.removeprefix("float")) if name in FLOATS else quant_type(name).bits


def all_choices(groups: Sequence[Group]) -> list[Choice]:
    """Return every choice that some group has, in the order of the groups.

    Raises:
        ConfigError: there are no groups.
    """
    if not groups:
        raise ConfigError("there are no groups: nothing of the model can be quantized")
    return list(dict.fromkeys(choice for group in groups for choice in group.choices))


def prepared_with(
    model: WrappedModel,
    groups: Sequence[Group],
    assignment: Assignment,
    config: QConfig | None = None,
) -> WrappedModel:
    """Return a copy of ``model``, prepared as ``assignment`` says."""
    prepared = copy.deepcopy(model)
    prepare(prepared, config_with(config or QConfig(), groups, assignment))
    return prepared


# --- multiplications -----------------------------------------------------------------------------


def _multiplications(
    model: WrappedModel, inputs: Mapping[str, Any], config: QConfig | None
) -> tuple[dict[str, int], set[str]]:
    """Return how often each node multiplies, and which nodes multiply two activations."""
    config = replace(config or QConfig(), method="minmax", kept_samples=0)
    prepared = all_quantized(model, config)
    graph, stored = prepared.graph, prepared.layout.values.stored
    nodes = {
        key: node
        for key, node in graph.nodes.items()
        if node.op_type in WEIGHTED and node in prepared.layout.homes
    }
    computed = {
        key: [v for v in node.inputs[:2] if v is not None and graph.key(v) not in stored]
        for key, node in nodes.items()
    }
    values = {v for key, node in nodes.items() for v in (node.outputs[0], *computed[key])}
    shapes = shapes_seen(prepared, [graph.key(value) for value in values], inputs)
    macs = {}
    for key, node in nodes.items():
        given = [_seen(graph.key(v), v in computed[key], shapes, stored) for v in node.inputs[:2]
                 if v is not None]  # fmt: skip
        outputs = shapes[graph.key(node.outputs[0])]
        macs[key] = sum(
            _macs(node, [sizes[min(i, len(sizes) - 1)] for sizes in given], output)
            for i, output in enumerate(outputs)
        )
    return macs, {key for key, values in computed.items() if len(values) > 1}


def shapes_seen(
    model: WrappedModel, values: Sequence[str], inputs: Mapping[str, Any]
) -> dict[str, list[Shape]]:
    """Return the shapes that values have in a forward on ``inputs``, one for each time it runs.

    Raises:
        InputError: an input is missing, unknown, or of another rank or kind of type.
    """
    found: dict[str, list[Shape]] = defaultdict(list)

    def watcher(key: str) -> Callable[[torch.Tensor], None]:
        return lambda tensor: found[key].append(tuple(tensor.shape))

    with torch.no_grad(), model.watching({key: watcher(key) for key in values}):
        model(**as_tensors(inputs))
    return defaultdict(list, found)


def as_tensors(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs as the model takes them; numbers in arrays become tensors.

    Raises:
        InputError: it is no mapping from names.
    """
    if not isinstance(inputs, Mapping):
        raise InputError(
            f"inputs: expected {{graph input: tensor}}, got {type(inputs).__name__}; "
            "give one batch, not a list of them"
        )
    return {
        name: torch.as_tensor(value)
        if hasattr(value, "dtype") and getattr(value.dtype, "kind", "") in "biuf"
        else value
        for name, value in inputs.items()
    }


def _seen(
    key: str,
    computed: bool,
    shapes: Mapping[str, list[Shape]],
    stored: Mapping[str, ir.TensorProtocol],
) -> list[Shape]:
    if computed:
        return shapes[key]
    return [tuple(int(n) for n in stored[key].shape.numpy())]


def _macs(node: ir.Node, inputs: Sequence[Shape], output: Shape) -> int:
    """Return the multiplications of one convolution or matrix product."""
    x, weight = inputs
    if node.op_type == "Conv":
        return math.prod(output) * math.prod(weight[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(x) * math.prod(weight[1:])
    transposed = node.op_type == "Gemm" and attributes_of(node).get("transA", 0)
    return math.prod(output) * x[0 if transposed else -1]
