"""Training under autocast: what is multiplied is rounded to 16 bits, scales and codes are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import qwrap
from qwrap.quant.prepare import stubs

WAYS = ("fixed", "follow", "lsq", "lsq+", "pact")
TYPES = (torch.bfloat16, torch.float16)


def data() -> Tensor:
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.normal(0, 1, (4, 3, 8, 8)).astype(np.float32))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_loss_falls_and_scales_stay_float32(calibrated, tmp_path, dtype, way: str) -> None:
    model, x = calibrated(training=way).train(), data()
    optimizer = torch.optim.AdamW(qwrap.param_groups(model, lr=1e-2, scale_lr=1e-3))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            y = model(x)
        loss = (y.float() - x.mean((1, 2, 3), keepdim=True)).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert all(p.grad.isfinite().all() for p in model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    for _, stub in stubs(model):
        assert stub.scale.dtype == torch.float32
        assert stub.scale.isfinite().all()
    qwrap.export(model, tmp_path / "trained.onnx")
    report = qwrap.verify(model, tmp_path / "trained.onnx", [x], progress=False)
    assert not any(t.differing for t in report.deployed.tensors)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gradients_are_those_of_float32_to_16_bits(calibrated, dtype) -> None:
    """Relative to the largest of each tensor, a few units of the type: 2**-8 and 2**-11."""
    model, x = calibrated(training="lsq").train(), data()
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            y = model(x)
        y.float().square().mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, value in found[0].items():
        if name.startswith(("w", "b")):
            assert found[1][name].dtype == torch.float32
            error = (found[1][name] - value).abs().max() / value.abs().max()
            assert error < 16 * torch.finfo(dtype).eps, name
