"""Checkpointing of activations, for each Block, against plain training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.utils.checkpoint import checkpoint

import qwrap
from qwrap.model.block import Block
from qwrap.quant.prepare import stubs

WAYS = ("fixed", "follow", "lsq", "lsq+", "pact")


def data() -> Tensor:
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.normal(0, 1, (4, 3, 8, 8)).astype(np.float32))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.mean((1, 2, 3), keepdim=True)).square().mean()


def results(model: qwrap.WrappedModel) -> dict[str, Any]:
    """Losses, gradients and state of some steps."""
    optimizer = torch.optim.SGD(qwrap.param_groups(model, lr=0.01, scale_lr=2e-4), momentum=0.9)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, data().requires_grad_())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = {
        f"grad of {n.replace('_checkpoint_wrapped_module.', '')}": p.grad
        for n, p in model.named_parameters()
    }
    found |= {n: v.clone() for n, v in model.state_dict().items() if isinstance(v, Tensor)}
    seen = [stub.observer and stub.observer.seen for _, stub in stubs(model)]
    return {"losses": losses, "tensors": found, "seen": seen}


def wrapped(model: nn.Module) -> None:
    """By torch's wrapper, a module in the place of each Block."""
    apply_activation_checkpointing(model, check_fn=lambda module: module in [*model.children()])


def checkpointed(model: nn.Module, use_reentrant: bool) -> None:
    for child in model.children():
        if isinstance(child, Block):
            child.forward = partial(checkpoint, child.forward, use_reentrant=use_reentrant)


FORMS: dict[str, Callable[[nn.Module], None]] = {
    "not reentrant": partial(checkpointed, use_reentrant=False),
    "reentrant": partial(checkpointed, use_reentrant=True),
    "wrapper": wrapped,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_each_block_changes_nothing(calibrated, residual, way, form) -> None:
    plain, other = (calibrated(residual, training=way).train() for _ in range(2))
    FORMS[form](other)
    expected, found = results(plain), results(other)
    assert found["losses"] == expected["losses"]
    for name, value in expected["tensors"].items():
        assert torch.equal(found["tensors"][name], value), name
    assert found["seen"] == expected["seen"]
