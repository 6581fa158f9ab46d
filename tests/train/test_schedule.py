"""The verbs of a schedule, and when a ``Schedule`` calls them."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import qwrap
from qwrap.config import QuantSpec
from qwrap.errors import ConfigError, NotCalibratedError
from qwrap.numerics import QParams
from qwrap.quant.batch_norm import LiveBatchNorm
from qwrap.quant.prepare import stubs
from qwrap.quant.stubs import Stub, Switch
from qwrap.train import Schedule, fake_quant, freeze_observers, learn_scales, learn_zero_points

OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
]


class User(nn.Module):
    """A module of the user's with a prepared model somewhere in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"onnx": model})
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body["onnx"](x).mean((2, 3)))


@pytest.fixture
def make(small):
    def make(training="lsq", calibrated=True, **overrides):
        config = qwrap.QConfig(scope="kernels", training=training)
        for name, way in {"x": training, **overrides}.items():  # of the input too
            config.set(name, training=way)
        model = qwrap.load(small.convs())
        qwrap.prepare(model, config)
        if calibrated:
            qwrap.calibrate(model, small.batches(), progress=False)
        torch.manual_seed(0)
        return User(model.train())

    return make


def found(user):
    return {stub.name: stub for _, stub in stubs(user.body["onnx"])}


def train(user, batches, optimizer, steps=3):
    for step in range(steps):
        optimizer.zero_grad()
        user(torch.from_numpy(batches[step % len(batches)])).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("way", ["lsq", "lsq+", "pact"])
def test_frozen_scales_stay_exactly_where_momentum_would_move_them(
    make, small, way, optimizer
) -> None:
    user = make(way)
    made, batches = optimizer(user.parameters()), small.batches()
    start = {name: stub.scale for name, stub in found(user).items()}
    train(user, batches, made)
    moved = {n: (s.scale, s.zero_point) for n, s in found(user).items()}
    assert any((moved[name][0] != start[name]).any() for name in start)
    assert learn_scales(user, False) == len(found(user))
    before = {n: p.detach().clone() for n, p in user.named_parameters()}
    train(user, batches, made)
    for name, stub in found(user).items():
        assert torch.equal(stub.scale, moved[name][0]), name
        assert torch.equal(stub.zero_point, moved[name][1]), name
    assert any((p != before[n]).any() for n, p in user.named_parameters() if "weight" in n)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_zero_points_stay_and_their_scales_move(make, small, optimizer) -> None:
    user = make("lsq+")
    stub = found(user)["x"]
    made, batches = optimizer(user.parameters()), small.batches()
    stub.get_parameter("shift").grad = torch.ones(1)
    made.step()
    assert learn_zero_points(user, False) == 2  # x and y; b is a Relu's, and weights are symmetric
    kept, scale = stub.zero_point, stub.scale
    train(user, batches, made)
    assert torch.equal(stub.zero_point, kept)
    assert not torch.equal(stub.scale, scale)
    assert stub.get_parameter("shift").grad.tolist() == [0.0]
    assert stub.get_parameter("gain").grad.tolist() != [0.0]


@pytest.mark.parametrize("way", ["lsq", "lsq+", "pact"])
def test_what_is_frozen_and_freed_goes_on_from_where_it_stood(make, small, way) -> None:
    user = make(way)
    made = torch.optim.Adam(user.parameters(), lr=0.02)
    train(user, small.batches(), made)
    before = {n: (s.scale, s.zero_point) for n, s in found(user).items()}
    learn_scales(user, False)
    train(user, small.batches(), made)
    learn_scales(user, True)
    for name, stub in found(user).items():
        assert torch.equal(stub.scale, before[name][0])
        assert torch.equal(stub.zero_point, before[name][1])
    train(user, small.batches(), made, 1)
    assert any((s.scale != before[n][0]).any() for n, s in found(user).items())


def test_tqt_frozen_and_freed_keeps_its_powers_of_two() -> None:
    spec = QuantSpec(dtype="int8", power_of_two=True)
    stub = Stub("w", spec, stored=True, training_by="tqt")
    stub.set_qparams(QParams(torch.tensor([0.25]), torch.zeros(1, dtype=torch.int32)))
    with torch.no_grad():
        stub.get_parameter("gain").add_(1.2)  # -0.5 + 1.2 rounds up to 1
    for learning in (False, True):
        stub.learning = learning
        assert stub.scale.tolist() == [0.5]
        assert stub.get_parameter("gain").tolist() == pytest.approx([0.7])


def test_an_average_of_the_parameters_knows_what_was_learned_before_a_freeze(make, small) -> None:
    """As a moving average of weights does, which copies neither buffers nor flags."""
    user = make("lsq+")
    average = torch.optim.swa_utils.AveragedModel(user, avg_fn=lambda _old, new, _count: new)
    optimizer = torch.optim.SGD(user.parameters(), lr=0.05)
    train(user, small.batches(), optimizer)
    learn_scales(user, False)
    train(user, small.batches(), optimizer)
    average.update_parameters(user)
    average.update_parameters(user)
    learned = found(user)
    for name, stub in found(average.module).items():
        assert torch.equal(stub.scale, learned[name].scale)
        assert torch.equal(stub.zero_point, learned[name].zero_point)


def test_no_parameter_stops_requiring_a_gradient_and_all_get_one(make, small) -> None:
    user = make("lsq+")
    learn_scales(user, False)
    learn_zero_points(user, False)
    train(user, small.batches(), torch.optim.SGD(user.parameters(), lr=0.1), 1)
    assert all(p.requires_grad and p.grad is not None for p in user.parameters())
    trained = [p for s in found(user).values() for p in s.trained().values()]
    assert all(not p.grad.any() for p in trained)


def test_flags_survive_a_state_dict_and_a_copy(make) -> None:
    user, other = make("lsq+"), make("lsq+")
    learn_zero_points(user, False)
    learn_scales(user, False, tensors="w?")
    other.load_state_dict(user.state_dict())
    for one in (other, copy.deepcopy(user)):
        assert {n for n, s in found(one).items() if not s.learning} == {"w1", "w2"}
        assert {n for n, s in found(one).items() if not s.learning_zero_point} == {"x", "y"}


def test_observers_follow_until_they_are_frozen(make, small) -> None:
    user = make("follow", w1="lsq")
    assert freeze_observers(user) == 4  # x, b, y, w2
    wide = 10 * torch.from_numpy(small.batches()[0])
    before = {n: s.scale.clone() for n, s in found(user).items()}
    user(wide)
    assert all(torch.equal(s.scale, before[n]) for n, s in found(user).items())
    freeze_observers(user, frozen=False)
    user(wide)
    assert found(user)["x"].scale > before["x"]
    assert torch.equal(found(user)["w1"].scale, before["w1"])


def test_without_fake_quantization_the_float_model_computes(make, small) -> None:
    user, x = make(), torch.from_numpy(small.batches()[0])
    plain = qwrap.load(small.convs())
    assert fake_quant(user, enabled=False) == 7  # x, b, y; two weights; two biases
    torch.testing.assert_close(user.body["onnx"](x), plain(x))
    assert fake_quant(user) == 7
    assert all(m.mode == "quantize" for m in user.modules() if isinstance(m, Switch))
    assert not torch.equal(user.body["onnx"](x), plain(x))


def test_weights_alone_can_be_rounded(make) -> None:
    user = make()
    fake_quant(user, enabled=False)
    assert fake_quant(user, tensors="w*") == 2
    assert {n for n, s in found(user).items() if s.mode == "quantize"} == {"w1", "w2"}


def test_a_tensor_without_a_scale_is_named_and_nothing_is_switched(make) -> None:
    user = make(calibrated=False)
    stub = found(user)["w1"]
    stub.set_qparams(QParams(torch.ones(6), torch.zeros(6, dtype=torch.int32), 0))
    with pytest.raises(NotCalibratedError, match="tensors 'b', 'w2', 'x', 'y' have no scale yet"):
        fake_quant(user)
    assert stub.mode == "float"


def test_a_module_without_a_prepared_model_or_tensor_is_an_error(make) -> None:
    with pytest.raises(ConfigError, match="no prepared model in this module"):
        freeze_observers(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="tensors='conv': no quantized tensor"):
        learn_scales(make(), tensors="conv")


def state(user):
    stub = found(user)["x"]
    return stub.mode, stub.learning, stub.learning_zero_point


def test_a_schedule_switches_at_its_steps(make) -> None:
    user = make("lsq+", w1="follow")
    schedule = Schedule(user, 10, fake_quant=1, learn_scales=0.2)
    seen = []
    for _ in range(10):
        seen.append((*state(user), found(user)["w1"].following))
        schedule.step()
    modes, learning, zero_points, following = zip(*seen, strict=True)
    assert modes == ("float",) + 9 * ("quantize",)
    assert learning == 2 * (False,) + 8 * (True,)
    assert zero_points == 8 * (True,) + 2 * (False,)
    assert following == 5 * (True,) + 5 * (False,)


def test_a_resumed_schedule_is_where_it_was(make) -> None:
    first, second = make("lsq+"), make("lsq+")
    saved = Schedule(first, 10)
    for _ in range(9):
        saved.step()
    resumed = Schedule(second, 10)
    resumed.load_state_dict(saved.state_dict())
    assert state(second) == state(first) == ("quantize", True, False)
    assert resumed.taken == 9


def test_a_schedule_freezes_live_batch_normalizations(small) -> None:
    norm = {
        name: np.full(4, value) for name, value in zip("gbmv", (1.0, 0.0, 0.1, 2.0), strict=True)
    }
    source = small.build(
        "c = Conv(x, w) y = BatchNormalization(c, g, b, m, v)", {"w": (4, 3, 3, 3), **norm}
    )
    model = qwrap.load(source)
    qwrap.prepare(model, qwrap.QConfig(bn="live", scope="kernels"))
    qwrap.calibrate(model, small.batches(), progress=False)
    (layer,) = [m for m in model.modules() if isinstance(m, LiveBatchNorm)]
    schedule = Schedule(model, 3)
    seen = [layer.frozen]
    for _ in range(3):
        schedule.step()
        seen.append(layer.frozen)
    assert seen == [False, False, True, True]


def test_a_schedule_prints_its_steps(make) -> None:
    text = repr(Schedule(make(), 200, freeze_zero_points=None, learn_scales=30))
    assert "0 of 200 steps" in text
    assert "learn_scales: step 30" in text
    assert "freeze_observers: step 100" in text
    assert "freeze_zero_points: never" in text


@pytest.mark.parametrize("when", [1.5, -1, 11, True])
def test_a_time_outside_of_the_steps_is_an_error(make, when) -> None:
    with pytest.raises(ConfigError, match=r"learn_scales=.*expected a share of the steps"):
        Schedule(make(), 10, learn_scales=when)


def test_no_steps_are_an_error(make) -> None:
    with pytest.raises(ConfigError, match="steps=0: expected 1 or more"):
        Schedule(make(), 0)
