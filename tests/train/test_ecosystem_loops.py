"""What training loops do to a model: copies, averages, accumulation, optimizers, wrappers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import qwrap
from qwrap.quant.prepare import stubs

Calibrated = Callable[..., qwrap.WrappedModel]
WAYS = ("fixed", "follow", "lsq", "lsq+", "pact")


def data(count: int = 3, samples: int = 4) -> list[Tensor]:
    rng = np.random.default_rng(1)
    shape = (count, samples, 3, 8, 8)
    return list(torch.from_numpy(rng.normal(0, 1, shape).astype(np.float32)))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.mean((1, 2, 3), keepdim=True)).square().mean()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(qwrap.param_groups(model, lr=0.01, scale_lr=2e-4), momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> list[float]:
    losses = []
    for x in batches:
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, second[name]), name


# --- copies


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_in_training_goes_on_alike_and_apart(calibrated, way: str, copied) -> None:
    model = calibrated(training=way).train()
    train(model, sgd(model), data())
    other = copied(model)
    assert_same_state(model, other)
    before = copy.deepcopy(model)
    losses = train(other, sgd(other), data(5))
    assert_same_state(model, before)
    assert train(model, sgd(model), data(5)) == losses
    assert_same_state(model, other)


def test_an_average_of_weights_is_a_model_of_its_own(calibrated, tmp_path) -> None:
    """Each parameter and buffer of the average is 0.5 of itself and 0.5 of the model's."""
    model = calibrated(training="lsq+").train()
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5), use_buffers=True)
    optimizer = sgd(model)
    expected: dict[str, Tensor] = {}
    for number, x in enumerate(data(4)):
        train(model, optimizer, [x])
        average.update_parameters(model)
        for name, value in model.named_parameters():
            mixed = value if not number else 0.5 * expected[name] + 0.5 * value
            expected[name] = mixed.detach().clone()
    for name, value in average.module.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], rtol=1e-6, atol=1e-7)
    averaged = average.module
    assert isinstance(averaged, qwrap.WrappedModel)
    assert not torch.equal(averaged.get_parameter("w1"), model.get_parameter("w1"))
    qwrap.export(averaged, tmp_path / "average.onnx")
    report = qwrap.verify(averaged, tmp_path / "average.onnx", data(1), progress=False)
    assert report.differing_codes == 0


@pytest.mark.parametrize("way", ["follow", "lsq+"])
def test_averaged_buffers_keep_their_types(calibrated, way: str) -> None:
    model = calibrated(training=way).train()
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    optimizer = sgd(model)
    for x in data(3):
        train(model, optimizer, [x])
        average.update_parameters(model)
    for (_, stub), (_, original) in zip(stubs(average.module), stubs(model), strict=True):
        assert stub.zero_point.dtype == torch.int32
        assert stub.scale.isfinite().all()
        assert (stub.zero_point - original.zero_point).abs().max() <= 2
    average(data(1)[0])


# --- accumulation


@pytest.mark.parametrize("way", ["fixed", "lsq", "lsq+", "pact"])
def test_accumulated_gradients_are_those_of_the_whole_batch(calibrated, way: str) -> None:
    """Up to the order of float32 sums, of gradients of order 1."""
    model = calibrated(training=way).train()
    (x,) = data(1, samples=8)
    loss_of(model, x).backward()
    expected = gradients(model)
    model.zero_grad()
    for part in x.chunk(4):
        (loss_of(model, part) / 4).backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


# --- optimizers


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "nesterov": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
    "sgd foreach": lambda groups: torch.optim.SGD(groups, momentum=0.9, foreach=True),
    "sgd fused": lambda groups: torch.optim.SGD(groups, momentum=0.9, fused=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, foreach=False),
    "adamw foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
    "adamw fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "rmsprop": torch.optim.RMSprop,
    "adafactor": torch.optim.Adafactor,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_lowers_the_loss_and_is_seen_at_once(calibrated, name: str) -> None:
    model = calibrated(training="lsq").train()
    optimizer = OPTIMIZERS[name](qwrap.param_groups(model, lr=1e-3, scale_lr=2e-4))
    (x,) = data(1)
    losses = train(model, optimizer, [x] * 4)
    assert losses == sorted(losses, reverse=True)
    # What was rounded before must not be used again.
    assert torch.equal(model(x), copy.deepcopy(model)(x))


def test_weights_written_by_hand_are_seen_at_once(calibrated) -> None:
    model = calibrated(training="lsq").train()
    (x,) = data(1)
    for _ in range(3):
        loss_of(model, x).backward()
        for parameter in model.parameters():
            parameter.data.sub_(parameter.grad, alpha=1e-3)
            parameter.grad = None
        assert torch.equal(model(x), copy.deepcopy(model)(x))


def test_gradients_are_clipped_to_a_norm(calibrated) -> None:
    model = calibrated(training="lsq").train()
    loss_of(model, data(1)[0]).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    found = torch.stack([g.square().sum() for g in gradients(model).values()]).sum().sqrt()
    assert found.item() == pytest.approx(0.5, rel=1e-5)  # float32, and torch adds 1e-6 to the norm


# --- functions of parameters


@pytest.mark.parametrize("way", ["fixed", "lsq", "lsq+", "pact"])
def test_functional_call_takes_other_parameters(calibrated, way: str) -> None:
    model = calibrated(training=way).train()
    other = copy.deepcopy(model)
    train(other, sgd(other), data(2))
    (x,) = data(1)
    own = model(x)
    theirs = torch.func.functional_call(model, dict(other.named_parameters()), (x,))
    assert torch.equal(theirs, other(x))
    assert not torch.equal(theirs, own)
    assert torch.equal(model(x), own)


def test_gradients_reach_what_parameters_were_made_of(calibrated) -> None:
    """As in meta-learning: weights that are themselves results."""
    model = calibrated(training="lsq").train()
    (x,) = data(1)
    factor = torch.tensor(1.0, requires_grad=True)
    made = {name: value * factor for name, value in model.named_parameters()}
    (torch.func.functional_call(model, made, (x,)) ** 2).mean().backward()
    model.zero_grad()
    (model(x) ** 2).mean().backward()
    expected = sum((p * p.grad).sum() for p in model.parameters())
    torch.testing.assert_close(factor.grad, expected.detach(), rtol=1e-5, atol=1e-6)


# --- inside a user's module


class Users(nn.Module):
    """A layer before and one after the model, which changes its input in place."""

    def __init__(self, model: qwrap.WrappedModel) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 3, 1)
        self.backbone = model
        self.after = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.backbone(self.before(x)))


@pytest.mark.parametrize("way", WAYS)
def test_a_users_module_trains_and_is_resumed(small, calibrated, tmp_path, way: str) -> None:
    torch.manual_seed(0)
    user = Users(calibrated(training=way)).train()
    (x,) = data(1)
    user(x)
    optimizer = torch.optim.AdamW(qwrap.param_groups(user, lr=1e-2, scale_lr=1e-3))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(user(x), torch.tensor([0, 1, 0, 1]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in user.parameters())
    torch.save(user.state_dict(), tmp_path / "user.pt")
    other = qwrap.load(small.convs())
    qwrap.prepare(other, qwrap.QConfig(scope="kernels", training=way))
    resumed = Users(other).train()
    resumed.load_state_dict(torch.load(tmp_path / "user.pt", weights_only=True))
    assert_same_state(user, resumed)
    qwrap.export(user.backbone, tmp_path / "user.onnx")
    qwrap.export(resumed.backbone, tmp_path / "resumed.onnx")
    assert (tmp_path / "user.onnx").read_bytes() == (tmp_path / "resumed.onnx").read_bytes()
