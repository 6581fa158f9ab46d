"""Which parameters an optimizer should treat alike."""

from __future__ import annotations

from typing import Any

from torch import nn

from qwrap.errors import ConfigError
from qwrap.quant.stubs import Stub

GROUP_OF = {"scale": "scales", "zero_point": "zero_points", "clip": "clips"}
WEIGHT_SCALES = "weight_scales"


def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float = 0.0,
    scale_lr: float | None = None,
    zero_point_lr: float | None = None,
    weight_scale_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Return the trainable parameters of ``model`` in groups for any ``torch.optim`` optimizer.

    Trained scales count in the log domain: 1e-4 is a ten-thousandth of a scale for each step of
    Adam. Groups are called "weights", "no_decay" (vectors and scalars: biases, normalisations),
    "scales", "weight_scales", "zero_points" and "clips" (of PACT, which decay as weights do) under
    the key "name"; those without a parameter are left out.

    Args:
        model: a prepared model, or any module with such models in it.
        lr: learning rate of all that is not named below; None leaves it to the optimizer.
        weight_decay: of weights and clips; all else has none.
        scale_lr: learning rate of scales and clips, None for ``lr``.
        zero_point_lr: that of zero points, None for ``scale_lr``.
        weight_scale_lr: that of the scales of weights, which then are the group "weight_scales";
            with None they are among "scales". For weights that lie on their grid, as after GPTQ or
            in a file that was quantized, LSQ's gradient says nothing of their scale, of which Adam
            makes full steps all the same: there 0 serves best.

    Raises:
        ConfigError: nothing is trainable, or a rate is negative.
    """
    scale_lr = lr if scale_lr is None else scale_lr
    zero_point_lr = scale_lr if zero_point_lr is None else zero_point_lr
    settings = {"lr": lr, "weight_decay": weight_decay, "scale_lr": scale_lr}
    others = {"zero_point_lr": zero_point_lr, "weight_scale_lr": weight_scale_lr}
    for name, value in {**settings, **others}.items():
        if value is not None and not value >= 0:
            raise ConfigError(f"{name}={value}: expected 0 or more")
    rates = {"scales": scale_lr, "clips": scale_lr, "zero_points": zero_point_lr}
    rates[WEIGHT_SCALES] = weight_scale_lr
    decays = {"weights": weight_decay, "clips": weight_decay}
    groups = {
        name: {"name": name, "params": members, "weight_decay": decays.get(name, 0.0)}
        | ({} if rates.get(name, lr) is None else {"lr": rates.get(name, lr)})
        for name, members in _members(model, apart=weight_scale_lr is not None).items()
        if members
    }
    if not groups:
        raise ConfigError("the model has no trainable parameter")
    return list(groups.values())


def _members(model: nn.Module, *, apart: bool) -> dict[str, list[nn.Parameter]]:
    """Return every trainable parameter once, by the name of its group.

    Args:
        model: what they are of.
        apart: whether the scales of weights are a group of their own.
    """
    kinds = {
        id(parameter): WEIGHT_SCALES
        if apart and module.stored and kind == "scale"
        else GROUP_OF[kind]
        for module in model.modules()
        if isinstance(module, Stub)
        for kind, parameter in module.trained().items()
    }
    names = ("weights", "no_decay", *GROUP_OF.values(), WEIGHT_SCALES)
    found: dict[str, list[nn.Parameter]] = {name: [] for name in names}
    for parameter in model.parameters():
        if parameter.requires_grad:
            plain = "weights" if parameter.dim() > 1 else "no_decay"
            found[kinds.get(id(parameter), plain)].append(parameter)
    return found
