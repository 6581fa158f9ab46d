"""Parameters of which FSDP keeps a part in each process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwrap.errors import ModelError


def is_sharded(model: nn.Module) -> bool:
    """Return whether this process holds only parts of some parameters, as DTensors."""
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def check_unsharded(model: nn.Module) -> None:
    """Refuse what one process cannot do with its part of the parameters.

    Raises:
        ModelError: some are sharded.
    """
    if is_sharded(model):
        raise ModelError(
            "the parameters are sharded (FSDP); call get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True, cpu_offload=True)) of "
            "torch.distributed.checkpoint.state_dict in every process, then load_state_dict in the "
            "first one, into a model that was loaded and prepared like this one"
        )


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; where it is sharded, every process has to call this."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


@torch.no_grad()
def write(parameter: Tensor, value: Tensor) -> None:
    """Copy the whole ``value`` into a parameter, in place; of a sharded one into the part here."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is not None:
        from torch.distributed.tensor import distribute_tensor  # slow to import

        value = distribute_tensor(value, mesh, parameter.placements)  # type: ignore[attr-defined]  # a DTensor
    parameter.copy_(value)
