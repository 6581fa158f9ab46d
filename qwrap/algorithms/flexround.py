"""FlexRound: learn what each weight is divided by before it is rounded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, get_args

import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.errors import ConfigError
from qwrap.model.attributes import attributes_of
from qwrap.model.batches import iterate
from qwrap.model.points import UsePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.ops.traits import WEIGHTED
from qwrap.quant.constants import LARGEST_BIAS, deployed
from qwrap.quant.outcome import Outcome
from qwrap.quant.plan import BiasPlan, Use
from qwrap.quant.prepare import plan_of, stub_at
from qwrap.quant.stubs import Stub
from qwrap.reconstruct import FlexRound, Rounding
from qwrap.reconstruct.fit import Recipe
from qwrap.reconstruct.reconstruct import MEMORY, Plan, reconstruct
from qwrap.reconstruct.trainee import Choice
from qwrap.reconstruct.units import Granularity


def flexround(
    model: WrappedModel,
    batches: Iterable[Any],
    *,
    granularity: Granularity = "block",
    iterations: int = 200,
    batch_size: int = 32,
    lr: float = 1e-3,
    drop: float = 0.0,
    learn_scales: bool = False,
    learn_biases: bool = False,
    scale_lr: float = 1e-3,
    bias_lr: float = 1e-2,
    seed: int = 0,
    memory: int = MEMORY,
    progress: bool = True,
) -> Outcome:
    """Learn the codes of all weights, and their scales, by division, in place.

    Each weight is divided by a number of its own, by one for its output channel, by one for its
    input channel (of a convolution) and by a learned scale before it is rounded. Unlike AdaRound,
    which chooses between two codes, this can move large weights further, and each step is taken
    with weights rounded as they will be. A scale that the user dictates stays as it is.

    Blocks or layers learn one after the other, each on what the quantized ones before it make,
    under the scheme that is deployed. Every eighth sample is held back: a unit that does not come
    closer for them stays as it was, and all does if the model's outputs do not.

    Args:
        model: calibrated.
        batches: as for ``calibrate``, without labels; some hundred samples do. They are held in
            memory.
        granularity: learn all weights of a "block" together, or each "layer" on its own.
        iterations: for each unit.
        batch_size: samples in each.
        lr: of the logarithms of what weights are divided by (Adam).
        drop: probability with which an element of an activation is not rounded while weights learn,
            below 1; 0.5 as in QDrop.
        learn_scales: learn the scales of activations too.
        learn_biases: learn biases too.
        scale_lr: of the scales of activations, relative to them.
        bias_lr: of biases, in units of the noise that rounding to nearest would give them.
        seed: of all that is drawn.
        memory: bytes that the activations between two units may take.
        progress: show a bar on a terminal.

    Raises:
        ConfigError: an option is out of its range, or the model is not prepared.
        InputError: there are no batches, or one does not fit.
        NotCalibratedError: the model is not calibrated.

    Source: Lee et al., arXiv:2306.00317, section 3.2.
    """
    if granularity not in get_args(Granularity):
        raise ConfigError(f"granularity={granularity!r}: choose one of {get_args(Granularity)}")
    data = list(iterate(batches, model))
    recipe = Recipe(
        iterations=iterations,
        batch_size=batch_size,
        lr=lr,
        scale_lr=scale_lr,
        bias_lr=bias_lr,
        choice=Choice(rounder=_rounder(model), scales=learn_scales, biases=learn_biases, drop=drop),
    )
    plan = Plan(
        algorithm="FlexRound",
        granularity=granularity,
        recipe=recipe,
        seed=seed,
        memory=memory,
        progress=progress,
    )
    return reconstruct(model, data, plan)


def _rounder(model: WrappedModel) -> Callable[[Tensor, Stub, Tensor], Rounding]:
    """Return what makes the rounding of a weight."""
    plan = plan_of(model)
    uses: dict[Stub, Use] = {}
    stubs: dict[str, set[Stub]] = defaultdict(set)
    biases: dict[Stub, list[BiasPlan]] = defaultdict(list)
    for use, constant in plan.constants.items():
        stub = stub_at(model, UsePoint(*use))
        uses[stub] = use
        stubs[constant.value].add(stub)
    for bias in plan.biases.values():
        biases[stub_at(model, UsePoint(*bias.weight))].append(bias)

    def make(weight: Tensor, stub: Stub, original: Tensor) -> Rounding:
        del original
        node, index = uses[stub]
        output_axis, input_axis = _axes(model.graph.nodes[node], index, weight)
        return FlexRound(
            weight,
            stub,
            output_axis=output_axis,
            input_axis=input_axis,
            least=_room(model, stub, biases[stub]),
            # What else reads the weight, with a stub of its own, has to go on reading it right.
            learn_scale=len(stubs[plan.constants[node, index].value]) == 1,
        )

    return make


def _axes(node: ir.Node, index: int, weight: Tensor) -> tuple[int | None, int | None]:
    """Return the axes of a weight along which there is a divisor for each index.

    They are those of output channels and, in a convolution, of input channels.
    """
    layer, attributes = WEIGHTED[node.op_type], attributes_of(node)
    if index != layer.weight or weight.dim() < 2:
        return None, None
    is_convolution = node.op_type in ("Conv", "ConvTranspose")
    return layer.axis(attributes), layer.block_axis(attributes) if is_convolution else None


@torch.no_grad()
def _room(model: WrappedModel, stub: Stub, biases: Iterable[BiasPlan]) -> Tensor:
    """Return how small the scale of a weight may be, for its biases to fit in 32 bits."""
    room = torch.zeros_like(stub.initial_scale)
    for bias in biases:
        activation = stub_at(model, plan_of(model).point_of(bias.activation))
        least = deployed(model, bias.value).abs() / (activation.scale * LARGEST_BIAS)
        room = torch.maximum(room, least.max() if room.numel() == 1 else least)
    return room
