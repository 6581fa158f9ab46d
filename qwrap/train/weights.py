"""The weights of prepared models that training moves and stubs round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwrap.errors import ConfigError
from qwrap.model.points import UsePoint
from qwrap.model.substitute import Substitute
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import spread
from qwrap.quant.plan import QuantPlan
from qwrap.quant.prepare import stubs
from qwrap.quant.stubs import Stub


@dataclass(frozen=True, slots=True, eq=False)
class RoundedWeight:
    """A trainable weight and what rounds it.

    Attributes:
        name: of the initialiser, behind the path of its model where there are several models.
        stub: rounds it.
        model: has the parameter.
        value: key of the initialiser.
    """

    name: str
    stub: Stub
    model: WrappedModel
    value: str

    @property
    def weight(self) -> Tensor:
        """What is rounded now, without gradient: the parameter, or what batch norm makes of it."""
        weight = self.model.deployed(self.value)
        assert weight is not None
        return weight.detach()

    def latent(self) -> Tensor:
        """Return what is rounded now, with the gradient of the parameter alone."""
        stored = self._stored()
        substitute, index = self._substitute()
        if substitute is None:
            return stored
        with torch.no_grad():
            factor = substitute.made(index, torch.ones_like(stored))
        return stored * factor

    @torch.no_grad()
    def write(self, mask: Tensor, values: Tensor) -> None:
        """Let ``values`` be what is rounded where ``mask`` is, in place."""
        stored = self._stored()
        substitute, index = self._substitute()
        wanted = values if substitute is None else substitute.unmade(index, values)
        stored.copy_(torch.where(mask, wanted.to(stored.dtype), stored))

    def _stored(self) -> Tensor:
        stored = self.model.stored(self.value)
        assert stored is not None
        return stored

    def _substitute(self) -> tuple[Substitute | None, int]:
        key, index = self.model.remade.get(self.value, ("", 0))
        return (self.model.substitute(key) if key else None), index

    def over(self, values: Tensor) -> Tensor:
        """Return scales, or what is one for each scale, as they broadcast against the weight."""
        return spread(values, self._stored().shape, self.stub.spec)


def models_in(module: nn.Module) -> dict[str, WrappedModel]:
    """Return the prepared models in ``module``: what their tensors' names begin with -> model.

    That is nothing for a single one, and else its path.

    Raises:
        ConfigError: there is none.
    """
    found = {
        path: model
        for path, model in module.named_modules()
        if isinstance(model, WrappedModel) and isinstance(model.plan, QuantPlan)
    }
    if not found:
        raise ConfigError(
            "there is no prepared model in this module; call qwrap.prepare(model) first"
        )
    if len(found) == 1:
        return {"": next(iter(found.values()))}
    return {f"{path}." if path else "": model for path, model in found.items()}


def rounded_weights(
    module: nn.Module, fits: Callable[[Stub], bool] = lambda _: True
) -> list[RoundedWeight]:
    """Return the trainable weights in ``module`` that stubs round to codes, each once.

    A weight that several nodes read counts as the first of them rounds it.

    Args:
        module: a prepared model, or a module with such models in it.
        fits: whether a stub is meant.

    Raises:
        ConfigError: there is none, or FSDP has sharded them.
    """
    if any(hasattr(part, "reshard") for part in module.modules()):  # as FSDP2 makes it
        raise ConfigError(
            "FSDP has sharded this module, but weights have to be whole here, as DDP leaves them"
        )
    found: dict[int, RoundedWeight] = {}
    for prefix, model in models_in(module).items():
        assert isinstance(model.plan, QuantPlan)
        for point, stub in stubs(model):
            if (
                not (isinstance(point, UsePoint) and stub.stored)
                or stub.spec.dtype.function is not None
            ):
                continue
            value = model.plan.constants[point.node, point.index].value
            weight = model.stored(value)
            if weight is None or not weight.requires_grad or not fits(stub):
                continue
            name = f"{prefix}{value}"
            found.setdefault(id(weight), RoundedWeight(name, stub, model, value))
    if not found:
        raise ConfigError("no trainable weight in this module is quantized to such a type")
    return list(found.values())
