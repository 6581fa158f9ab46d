"""Codes that turn to and fro: seen, damped, frozen."""

import numpy as np
import pytest
import torch
from torch import nn

import qwrap
from qwrap.config import QuantSpec
from qwrap.errors import ConfigError
from qwrap.numerics import quantize
from qwrap.quant.prepare import stubs
from qwrap.train import OscillationFreezer, dampening, fake_quant, learn_scales


@pytest.fixture
def make(small):
    """A product whose 3-bit weight should become what no code stands for."""

    def make(training="fixed", weight="int3", seed=0):
        rng = np.random.default_rng(seed)
        source = small.build(
            "y = MatMul(x, w)",
            {"w": rng.normal(0, 1, (16, 8))},
            "float[N,16] x",
            "float[N,8] y",
            21,
        )
        model = qwrap.load(source)
        qwrap.prepare(model, qwrap.QConfig(activation=None, weight=weight, training=training))
        qwrap.calibrate(model, [], progress=False)
        return model.train()

    return make


def stub_of(model):
    return next(stub for _, stub in stubs(model))


def codes(model):
    stub = stub_of(model)
    return quantize(model.stored("w").detach(), stub.qparams, stub.grid).int()


class Run:
    """A regression on fixed inputs: each output's error pushes all of its weights."""

    def __init__(self, model, regular=None, freezer=None, accumulate=1, optimizer=None):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(64, 16, generator=generator)
        self.target = self.x @ torch.randn(16, 8, generator=generator)
        self.model, self.regular, self.freezer = model, regular, freezer
        self.accumulate = accumulate
        parameters = qwrap.param_groups(model, scale_lr=1e-3)
        self.optimizer = optimizer or torch.optim.SGD(parameters, lr=0.02, momentum=0.5)

    def step(self):
        self.optimizer.zero_grad()
        for x, y in zip(
            self.x.chunk(self.accumulate), self.target.chunk(self.accumulate), strict=True
        ):
            loss = (self.model(x) - y).square().sum(1).mean() / self.accumulate
            if self.regular is not None:
                loss = loss + self.regular * dampening(self.model) / self.accumulate
            loss.backward()
        self.optimizer.step()
        if self.freezer is not None:
            self.freezer.step()

    def turns(self, steps):
        """Count the steps of each code that lead back where it came from."""
        count = torch.zeros(16, 8, dtype=torch.int32)
        before, went = codes(self.model), torch.zeros(16, 8, dtype=torch.int32)
        for _ in range(steps):
            self.step()
            now = codes(self.model)
            direction = (now - before).sign()
            count += direction * went < 0
            went = torch.where(direction != 0, direction, went)
            before = now
        return count


def test_plain_training_oscillates_and_both_cures_end_it(make) -> None:
    plain = Run(make())
    plain.turns(300)
    assert int(plain.turns(100).sum()) > 200  # of 128 weights
    model = make()
    freezer = OscillationFreezer(model, threshold=0.02, momentum=0.05)
    frozen = Run(model, freezer=freezer)
    frozen.turns(400)
    assert int(frozen.turns(100).sum()) == 0
    damped = Run(make(), regular=10.0)
    damped.turns(300)
    assert int(damped.turns(100).sum()) < 20


def test_frequencies_are_the_average_of_turns_counted_by_a_loop(make) -> None:
    model = make()
    freezer = OscillationFreezer(model, threshold=1.0, momentum=0.05)
    run = Run(model, freezer=freezer)
    expected, before, went = np.zeros((16, 8)), codes(model).numpy(), np.zeros((16, 8), int)
    for _ in range(60):
        run.step()
        now = codes(model).numpy()
        for at in np.ndindex(16, 8):
            change = np.sign(now[at] - before[at])
            expected[at] = 0.95 * expected[at] + 0.05 * (change * went[at] < 0)
            went[at] = change or went[at]
        before = now
    assert expected.max() > 0.1
    # sixty float32 updates of numbers below 1
    np.testing.assert_allclose(freezer.frequencies()["w"].numpy(), expected, rtol=0, atol=1e-6)
    assert freezer.frozen() == {"w": 0.0}


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("weight", ["int2", "int4", "uint8", "int8", "int16"])
def test_a_frozen_code_stays_while_its_scale_is_learned(make, accumulate, kind, weight) -> None:
    model = make("lsq", weight)
    freezer = OscillationFreezer(model, threshold=0.0, momentum=0.5)
    rate = 1e-2 if kind is torch.optim.AdamW else 1e-7  # whose steps go with the loss
    optimizer = kind(qwrap.param_groups(model, scale_lr=rate), lr=0.02)
    run = Run(model, freezer=freezer, accumulate=accumulate, optimizer=optimizer)
    run.turns(60)
    mask = freezer._states["w"].frozen.clone()
    kept, scale = codes(model), stub_of(model).scale.clone()
    assert mask.any()
    for _ in range(10):
        run.step()
        assert torch.equal(codes(model)[mask], kept[mask])
    assert not torch.equal(stub_of(model).scale, scale)
    stub = stub_of(model)
    middles = ((kept - stub.zero_point) * stub.scale).expand(16, 8)
    assert torch.equal(model.stored("w").detach()[mask], middles[mask])


def test_a_frozen_weight_keeps_the_code_it_had_most_of_the_time(make) -> None:
    model = make()
    stub, weight = stub_of(model), model.stored("w")
    freezer = OscillationFreezer(model, threshold=0.5, momentum=0.2)
    scale = float(stub.scale[0])
    with torch.no_grad():
        for code in [0, 1, 1, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0]:
            weight[0, 0] = 1.2 * scale if code else 0.3 * scale
            freezer.step()
            if freezer.frozen()["w"] > 0:
                break
    assert freezer._states["w"].frozen[0, 0]
    assert freezer.frozen()["w"] == 1 / 128
    assert codes(model)[0, 0] == round(float(freezer._states["w"].average[0, 0]))


def test_the_threshold_falls_along_a_cosine(make) -> None:
    freezer = OscillationFreezer(make(), threshold=(0.04, 0.01), steps=10)
    found = []
    for _ in range(12):
        found.append(freezer.threshold)
        freezer.step()
    wanted = [0.01 + 0.03 * (1 + np.cos(np.pi * min(k, 10) / 10)) / 2 for k in range(12)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert (found[0], found[-1]) == (0.04, 0.01)


def test_a_resumed_run_freezes_what_the_whole_run_does(make, tmp_path) -> None:
    whole, first, second = make(), make(), make()
    runs = []
    for model in (whole, first, second):
        optimizer = torch.optim.SGD([model.stored("w")], lr=0.03)
        runs.append(Run(model, None, OscillationFreezer(model, 0.05, 0.05), optimizer=optimizer))
    for _ in range(80):
        runs[0].step()
    for _ in range(40):
        runs[1].step()
    torch.save((first.state_dict(), runs[1].freezer.state_dict()), tmp_path / "run.pt")
    weights, counted = torch.load(tmp_path / "run.pt", weights_only=True)
    second.load_state_dict(weights)
    runs[2].freezer.load_state_dict(counted)
    for _ in range(40):
        runs[2].step()
    assert runs[2].freezer.frozen() == runs[0].freezer.frozen() != {"w": 0.0}
    assert torch.equal(second.stored("w"), whole.stored("w"))


def test_a_state_of_other_weights_is_an_error(make) -> None:
    freezer = OscillationFreezer(make())
    state = freezer.state_dict()
    state["weights"]["v"] = state["weights"].pop("w")
    with pytest.raises(ConfigError, match="other quantized weights"):
        freezer.load_state_dict(state)


def test_weights_that_are_not_quantized_yet_are_passed_over(make) -> None:
    model = make()
    fake_quant(model, False)
    freezer = OscillationFreezer(model, threshold=0.0, momentum=1.0)
    Run(model, freezer=freezer).turns(20)
    assert freezer.frozen() == {"w": 0.0}
    assert float(dampening(model).detach()) == 0.0


@pytest.mark.parametrize("kind", ["int3", "uint8", "float8e4m3fn"])
def test_dampening_is_the_squared_distance_and_draws_weights_in_range_alone(make, kind) -> None:
    model = make("lsq", QuantSpec(dtype=kind))
    stub, weight = stub_of(model), model.stored("w")
    with torch.no_grad():
        weight[0, 0], weight[0, 1] = 100.0, -100.0
    loss = dampening(model)
    loss.backward()
    low = ((stub.grid.qmin - stub.zero_point) * stub.scale).double()
    high = ((stub.grid.qmax - stub.zero_point) * stub.scale).double()
    clipped = weight.detach().double().clamp(low, high)
    with torch.no_grad():
        rounded = stub(weight).double()
    assert float(loss.detach()) == pytest.approx(
        float((rounded - clipped).square().sum()), rel=1e-4
    )
    inside = (clipped == weight.double()).double()
    # float32 against float64 of differences of numbers of about 1
    torch.testing.assert_close(
        weight.grad.double(), 2 * (clipped - rounded) * inside, rtol=1e-4, atol=1e-6
    )
    assert weight.grad[0, :2].tolist() == [0.0, 0.0]
    assert all(p.grad is None for p in stub.parameters())


def test_weights_of_all_models_in_a_module_count_once(make) -> None:
    one, other = make(seed=0), make(seed=1)
    user = nn.ModuleDict({"a": one, "b": other, "again": one})
    both = float(dampening(user).detach())
    each = [float(dampening(m).detach()) for m in (one, other)]
    assert both == pytest.approx(sum(each), rel=1e-6)
    assert set(OscillationFreezer(user).frozen()) == {"a.w", "b.w"}
    learn_scales(user, False)


def test_without_a_quantized_weight_there_is_an_error(make) -> None:
    model = make(weight="float8e4m3fn")
    with pytest.raises(ConfigError, match="no trainable weight in this module is quantized"):
        OscillationFreezer(model)
    with pytest.raises(ConfigError, match="no prepared model"):
        dampening(nn.Linear(2, 2))


def test_a_sharded_model_is_an_error(make, tmp_path) -> None:
    distributed = pytest.importorskip("torch.distributed.fsdp")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = distributed.fully_shard(make(), mesh=mesh)
        with pytest.raises(ConfigError, match="FSDP has sharded this module"):
            OscillationFreezer(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -0.1}, "expected 0 or more"),
        ({"momentum": 0.0}, "more than 0 up to 1"),
        ({"threshold": (0.1, 0.0)}, "say of how many steps"),
    ],
)
def test_senseless_settings_are_errors(make, settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        OscillationFreezer(make(), **settings)


def live(small):
    """Convolutions whose batch normalization is live, so that a folded weight is rounded."""
    rng = np.random.default_rng(0)
    norm = {f"{n}{k}": np.abs(rng.normal(1, 0.3, 6)) for n in "gbmv" for k in (1, 2)}
    source = small.build(
        "c = Conv(x, w1) d = BatchNormalization(c, g1, b1, m1, v1) r = Relu(d) "
        "e = Conv(r, w2) y = BatchNormalization(e, g2, b2, m2, v2)",
        {"w1": (6, 3, 3, 3), "w2": (6, 6, 3, 3), **norm},
        opset=21,
    )
    model = qwrap.load(source)
    qwrap.prepare(model, qwrap.QConfig(activation="uint8", weight="int4", bn="live"))
    qwrap.calibrate(model, small.batches(), progress=False)
    return model.train()


def test_the_folded_weight_counts_where_batch_normalization_is_live(small) -> None:
    model = live(small)
    freezer = OscillationFreezer(model, threshold=0.0, momentum=0.5)
    optimizer = torch.optim.SGD(qwrap.param_groups(model, scale_lr=1e-4), lr=0.05)
    values = [torch.from_numpy(x) for x in small.batches()]

    def folded():
        found = {s.name: (s, model.deployed(s.name)) for _, s in stubs(model) if s.stored}
        return {n: quantize(w.detach(), s.qparams, s.grid).int() for n, (s, w) in found.items()}

    for step in range(60):
        before, masks = folded(), {n: s.frozen.clone() for n, s in freezer._states.items()}
        optimizer.zero_grad()
        model(values[step % 3]).square().mean().backward()
        optimizer.step()
        freezer.step()
        now = folded()
        assert all(torch.equal(now[n][mask], before[n][mask]) for n, mask in masks.items())
    assert all(share > 0 for share in freezer.frozen().values())
    model.zero_grad()
    dampening(model).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert {name.rpartition(".")[2] for name in gradients} == {"w1", "w2"}
