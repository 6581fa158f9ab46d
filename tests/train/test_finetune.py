"""The training loop for those who have none."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import qwrap
from qwrap.errors import ConfigError, InputError, NotCalibratedError, TrainingError
from qwrap.quant.live import live_layers
from qwrap.train.rates import weight_rate

quiet = functools.partial(qwrap.finetune, progress=False)


@pytest.fixture(scope="module")
def data(small) -> list[np.ndarray]:
    return small.batches(10, (4, 3, 8, 8))


@pytest.fixture
def student(calibrated, data) -> qwrap.WrappedModel:
    """Four-bit weights leave something to learn."""
    return calibrated(batches=data, weight="int4")


def state(model: qwrap.WrappedModel) -> dict[str, Any]:
    return copy.deepcopy(model.state_dict())


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name].nan_to_num(), value.nan_to_num()), name


def loss_of(model: qwrap.WrappedModel, batches: list[np.ndarray]) -> float:
    """Mean loss of the outputs over some batches of equal size."""
    with torch.no_grad(), qwrap.Distillation(model, blocks=None) as distillation:
        return float(np.mean([distillation(batch).total.item() for batch in batches]))


def test_the_distance_to_the_float_model_falls_on_data_never_seen(small, student, data) -> None:
    others = small.batches(4, (4, 3, 8, 8), seed=7)
    before = loss_of(student, others)
    report = quiet(student, data, steps=60, lr=1e-4)
    assert report.improved
    assert report.lowest < 0.9 * report.before
    assert loss_of(student, others) < 0.9 * before


def test_the_report_tells_the_losses_there_were(student, data) -> None:
    held_out = data[:3]
    before = loss_of(student, held_out)
    report = quiet(student, data[3:], held_out=held_out, steps=20, evaluate=5, lr=1e-4)
    assert [record.step for record in report.history] == [0, 5, 10, 15, 20]
    assert report.before == pytest.approx(before, rel=1e-6)
    assert report.lowest == min(record.held_out for record in report.history)
    assert report.lowest == pytest.approx(loss_of(student, held_out), rel=1e-6)
    assert math.isnan(report.history[0].loss)
    assert all(record.loss > record.outputs > 0 for record in report.history[1:])
    assert (report.batches, report.held_out_batches) == (7, 3)


def test_the_report_can_be_read(student, data) -> None:
    report = quiet(student, data, steps=40, evaluate=20, lr=1e-4)
    lines = str(report).splitlines()
    assert lines[0].startswith("fine-tuned for 40 steps")
    assert f"kept from step {report.best_step}; 2 batches held out" in lines[1]
    assert len(lines) == 3 + 3  # a header, and a line for each look
    assert [line.endswith("<- kept") for line in lines[3:]].count(True) == 1
    assert report.to_dict()["history"][0]["step"] == 0


def test_the_best_state_is_what_the_model_has_bit_for_bit(student, data) -> None:
    states: list[dict[str, Any]] = []
    take = lambda module, *_: None if module.training else states.append(state(module))  # noqa: E731
    with student.register_forward_hook(take):
        report = quiet(student, data, steps=20, evaluate=1, lr=3e-4, schedule="constant")
    steps = [record.step for record in report.history]
    assert 0 < report.best_step < steps[-1]  # else the claim would be empty
    looks = len(states) // len(steps)  # batches held out
    assert_same(state(student), states[report.best_step * looks])


def test_a_model_that_gets_no_better_is_exactly_as_it_was(student, data) -> None:
    before = state(student)
    report = quiet(student, data, steps=6, lr=10.0, scale_lr=1.0)
    assert not report.improved
    assert report.best_step == 0
    assert "exactly as it was" in report.summary()
    assert_same(state(student), before)


def test_following_scales_are_put_back_with_their_statistics(calibrated, data) -> None:
    model = calibrated(batches=data, training="follow")
    before = state(model)
    quiet(model, [100 * batch for batch in data], held_out=data[:2], steps=4, lr=1.0)
    assert_same(state(model), before)


def test_live_batch_normalization_keeps_its_statistics(small, data) -> None:
    nodes = """
        a = Conv<pads=[1,1,1,1]>(x, w1) b = BatchNormalization(a, gamma, beta, mean, var)
        c = Relu(b) y = Conv(c, w2)
    """
    rng = np.random.default_rng(2)
    norm = {name: rng.uniform(0.5, 2, 6) for name in ("gamma", "beta", "mean", "var")}
    source = small.build(nodes, {"w1": (6, 3, 3, 3), "w2": (4, 6, 1, 1)} | norm)
    model = qwrap.load(source)
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", weight="int4", bn="live"))
    qwrap.calibrate(model, data, progress=False)
    before = state(model)
    ((_, layer),) = live_layers(model)
    quiet(model, data, steps=10, held_out=0)
    assert not layer.frozen
    after = state(model)
    same = {name for name, x in before.items() if "running" in name and torch.equal(x, after[name])}
    assert len(same) == 2
    assert any("gamma" in name and not torch.equal(x, after[name]) for name, x in before.items())


def test_the_same_seed_gives_the_same_bits(calibrated, data) -> None:
    states = []
    for seed in (3, 3, 4):
        model = calibrated(batches=data, weight="int4")
        torch.rand(5)  # what happened before does not matter
        quiet(model, data, steps=10, evaluate=1, lr=1e-4, seed=seed)
        states.append(state(model))
    assert_same(states[1], states[0])
    assert not torch.equal(states[2]["w1"], states[0]["w1"])


def test_random_numbers_of_the_caller_are_left_alone(student, data) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    quiet(student, data, steps=2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_put_back(student, data, training: bool) -> None:
    student.train(training)
    quiet(student, data, steps=2)
    assert all(module.training == training for module in student.modules())
    assert not student.program.watchers
    assert all(parameter.grad is None for parameter in student.parameters())


def test_an_interrupt_leaves_the_best_state_so_far(student, data) -> None:
    class Interrupted(torch.optim.Adam):
        steps = 0

        def step(self, *args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            if self.steps == 8:
                raise KeyboardInterrupt
            return super().step(*args, **kwargs)

    held_out = data[:3]
    before = loss_of(student, held_out)
    with pytest.raises(KeyboardInterrupt):
        quiet(
            student,
            data[3:],
            held_out=held_out,
            steps=20,
            evaluate=1,
            lr=1e-4,
            optimizer=Interrupted,
        )
    assert loss_of(student, held_out) < before
    assert not student.program.watchers


def test_a_loss_that_is_not_finite_stops_with_its_step(student, data) -> None:
    calls = 0

    def loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        return (found - wanted).square().mean() / (0.0 if calls == 3 else 1.0)

    before = state(student)
    with pytest.raises(TrainingError, match="step 3: the loss is inf"):
        quiet(student, data, steps=6, evaluate=6, loss=loss)
    assert_same(state(student), before)


def test_a_held_out_loss_that_is_not_finite_stops_too(student, data) -> None:
    def loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        factor = 1.0 if torch.is_grad_enabled() else math.nan
        return factor * (found - wanted).square().mean()

    with pytest.raises(TrainingError, match="step 0: the loss of what was held out is nan"):
        quiet(student, data, steps=2, loss=loss)


def test_an_iterator_gives_one_epoch(student, data) -> None:
    def stream() -> Iterator[np.ndarray]:
        yield from data
        yield from data

    report = quiet(student, stream(), steps=100, lr=1e-4)
    assert report.end == "data"
    assert report.history[-1].step == 12  # 20 batches, of which 8 are held out
    assert report.held_out_batches == 8


def test_epochs_count_batches(student, data) -> None:
    report = quiet(student, data, epochs=2, accumulate=3)
    assert report.history[-1].step == 2 * 3  # 8 of 10 batches are trained on, in steps of 3


def test_accumulated_batches_make_one_step(calibrated, data) -> None:
    # Plain gradient descent from the same state: the step of two batches is the mean of theirs.
    descent = functools.partial(torch.optim.SGD, lr=0.1)
    settings: dict[str, Any] = {"held_out": 0, "steps": 1, "optimizer": descent, "seed": 1}
    moved = []
    for batches, accumulate in ((data[:2], 2), (data[:1], 1), (data[1:2], 1)):
        model = calibrated(batches=data, weight="int4", training="fixed")
        start = model.w1.detach().clone()
        quiet(model, batches, accumulate=accumulate, lr=0.1, **settings)
        moved.append(model.w1.detach() - start)
    torch.testing.assert_close(moved[0], (moved[1] + moved[2]) / 2, rtol=1e-5, atol=1e-7)


def test_patience_ends_a_training_that_gets_nowhere(student, data) -> None:
    report = quiet(student, data, steps=50, evaluate=1, patience=3, lr=10.0)
    assert report.end == "patience"
    assert report.history[-1].step == 3


def test_without_a_check_the_last_state_is_kept(student, data) -> None:
    before = state(student)
    report = quiet(student, data, steps=3, held_out=0)
    assert report.best_step == 3
    assert math.isnan(report.lowest)
    assert "unchecked" in report.summary()
    assert not torch.equal(state(student)["w1"], before["w1"])


def test_learning_rates_and_the_weight_of_inner_tensors_go_down(student, data) -> None:
    seen = []
    distillation = qwrap.Distillation(student, block_weight=2.0)

    class Seen(torch.optim.Adam):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            rates = {group["name"]: group["lr"] for group in self.param_groups}
            seen.append((rates["weights"], rates["scales"], distillation.block_weight))
            return super().step(*args, **kwargs)

    quiet(student, data, steps=4, loss=distillation, lr=1e-3, scale_lr=1e-2, optimizer=Seen)
    factors = [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    expected = [(1e-3 * f, 1e-2 * f, 2 * (1 - i / 4)) for i, f in enumerate(factors)]
    np.testing.assert_allclose(seen, expected, rtol=1e-12)
    assert distillation.block_weight == 2.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_may_compute_in_half_precision(student, data, dtype: torch.dtype) -> None:
    report = quiet(student, data, steps=20, lr=1e-4, autocast=dtype)
    assert report.improved


def test_what_was_trained_is_what_is_exported(student, data, tmp_path) -> None:
    assert quiet(student, data, steps=20, lr=1e-4).improved
    qwrap.export(student, tmp_path / "tuned.onnx")
    report = qwrap.verify(student, tmp_path / "tuned.onnx", data, progress=False)
    assert report.deployed.differing == 0


def test_a_quantized_file_is_trained_on_with_the_float_file_as_its_teacher(
    small, student, data, tmp_path
) -> None:
    qwrap.export(student, tmp_path / "q.onnx")
    model, teacher = qwrap.load(tmp_path / "q.onnx"), qwrap.load(small.convs())
    distillation = qwrap.Distillation(model, teacher=teacher)
    assert distillation.blocks == ["b"]
    expected = loss_of(student, data[:3])
    report = quiet(model, data[3:], held_out=data[:3], steps=100, lr=2e-3, loss=distillation)
    assert report.before == pytest.approx(expected, rel=1e-3)
    assert report.lowest < 0.95 * report.before


def test_the_bar_counts_steps(student, data, capsys) -> None:
    quiet(student, data, steps=2)
    assert not capsys.readouterr().err
    qwrap.finetune(student, data, steps=2)
    assert not capsys.readouterr().err  # there is no terminal


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0: expected 1 or more"),
        ({"steps": 5, "epochs": 1}, "give one of them"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"schedule": "step"}, "schedule='step': choose one of cosine, constant"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"loss": "mae"}, "no loss 'mae'"),
    ],
)
def test_settings_out_of_range_are_refused(student, data, settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quiet(student, data, **settings)


@pytest.mark.parametrize(("weight", "qmax"), [("int8", 127), ("int4", 7)])
def test_the_usual_rate_goes_by_the_distance_between_codes(
    calibrated, data, weight: str, qmax: int
) -> None:
    model = calibrated(batches=data, weight=weight, weight_method="minmax", per_channel=False)
    largest = min(model.stored(w).detach().abs().max().item() for w in ("w1", "w2"))
    rate = weight_rate(model)
    assert rate == pytest.approx(largest / qmax / 150, rel=0.01)
    assert quiet(model, data, steps=1).history[0].lr == rate


def test_without_codes_the_usual_rate_is_that_of_8_bits(calibrated, data) -> None:
    model = calibrated(batches=data, activation="float8e4m3fn", weight="float8e4m3fn")
    assert weight_rate(model) == 1e-5


def test_epochs_need_data_of_known_length(student, data) -> None:
    with pytest.raises(ConfigError, match="read once"):
        quiet(student, iter(data), epochs=2)
    with pytest.raises(ConfigError, match="tells its length"):
        quiet(student, iter(data), epochs=1)


def test_a_model_without_scales_is_refused(small, data) -> None:
    model = qwrap.load(small.convs())
    with pytest.raises(ConfigError, match="not prepared"):
        quiet(model, data)
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    with pytest.raises(NotCalibratedError, match="no scale yet"):
        quiet(model, data)
    config = qwrap.QConfig()
    config.exclude("*")
    qwrap.prepare(model, config)
    with pytest.raises(ConfigError, match="nothing in the model is quantized"):
        quiet(model, data)


def test_the_distillation_of_another_model_is_refused(calibrated, data) -> None:
    with pytest.raises(ConfigError, match="of another model"):
        quiet(calibrated(), data, loss=qwrap.Distillation(calibrated()))


def test_data_that_does_not_fit_is_refused(student) -> None:
    with pytest.raises(InputError, match="expected 4 dimensions"):
        quiet(student, [np.zeros((2, 2), np.float32)] * 4)
