"""The float teacher, and what the student's distance from it is made of."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import qwrap
from qwrap.errors import ConfigError, InputError
from qwrap.train.losses import divergence, normalized_error


def step(model: qwrap.WrappedModel, loss: torch.Tensor, lr: float = 0.1) -> None:
    """One step of gradient descent."""
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad
                parameter.grad = None


def test_the_teacher_computes_what_onnxruntime_does_with_the_float_file(
    small, calibrated, tmp_path
) -> None:
    x = small.batches()[0]
    onnx.save(small.convs(), tmp_path / "float.onnx")
    (expected,) = small.run(tmp_path / "float.onnx", x)
    found = qwrap.train.teacher_of(calibrated())(torch.from_numpy(x))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # another order of sums


def test_the_teacher_is_the_float_model_whatever_training_does(small, calibrated) -> None:
    model = calibrated()
    x = torch.from_numpy(small.batches()[0])
    expected = qwrap.load(small.convs())(x)
    with qwrap.Distillation(model) as distillation:
        for _ in range(3):
            step(model, distillation(x).total)
        assert torch.equal(distillation.teacher(x), expected)
    assert torch.equal(qwrap.train.teacher_of(model)(x), expected)


def test_gradients_reach_the_student_alone(small, calibrated) -> None:
    model = calibrated()
    with qwrap.Distillation(model) as distillation:
        distillation(small.batches()[0]).total.backward()
    for name in ("w1", "b1", "w2", "b2"):
        assert model.stored(name).grad.abs().sum() > 0
    assert not any(p.requires_grad for p in distillation.teacher.parameters())
    assert all(p.grad is None for p in distillation.teacher.parameters())


def test_the_loss_is_that_of_outputs_plus_weighted_inner_tensors(small, calibrated) -> None:
    model, x = calibrated(), torch.from_numpy(small.batches()[0])
    seen: list[torch.Tensor] = []
    teacher = qwrap.load(small.convs())
    with model.watching({"b": seen.append}), teacher.watching({"b": seen.append}):
        end = normalized_error(model(x), teacher(x))
    inner = normalized_error(*seen)
    with qwrap.Distillation(model, block_weight=0.25) as distillation:
        losses = distillation(x)
    assert distillation.blocks == ["b"]
    assert torch.equal(losses.outputs["y"], end)
    assert torch.equal(losses.blocks["b"], inner)
    assert torch.equal(losses.total, end + 0.25 * inner)
    assert torch.equal(losses.results, model(x))


def test_without_weight_inner_tensors_are_not_compared(small, calibrated) -> None:
    with qwrap.Distillation(calibrated(), block_weight=0) as distillation:
        losses = distillation(small.batches()[0])
    assert losses.blocks == {}
    assert torch.equal(losses.total, losses.outputs["y"])


def test_a_student_equal_to_its_teacher_has_no_loss(small) -> None:
    model = qwrap.load(small.convs())
    qwrap.prepare(model)  # not calibrated: computes in float
    with qwrap.Distillation(model) as distillation:
        assert distillation(small.batches()[0]).total == 0


def test_outside_of_a_with_block_the_loss_is_the_same_and_nothing_stays(small, calibrated) -> None:
    model, x = calibrated(), small.batches()[0]
    distillation = qwrap.Distillation(model)
    outside = distillation(x).total
    assert not model.program.watchers
    assert not model._forward_hooks
    with distillation:
        assert torch.equal(distillation(x).total, outside)
    assert not model.program.watchers


def test_distillation_lowers_the_loss(small, calibrated) -> None:
    model, x = calibrated(weight="int4"), small.batches()[0]
    with qwrap.Distillation(model) as distillation:
        first = distillation(x).total
        for _ in range(20):
            step(model, distillation(x).total, lr=0.05)
        assert distillation(x).total < 0.95 * first  # rounding to 16 levels leaves no more


class Head(nn.Module):
    """A user's module around the encoder."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x).mean((2, 3)))


def test_a_model_inside_of_another_module_is_compared_by_what_it_did(small, calibrated) -> None:
    model, x = calibrated(), torch.from_numpy(small.batches()[0])
    module = Head(model)
    with qwrap.Distillation(model) as distillation:
        expected = distillation(x).total
        logits = module(x)
        losses = distillation.loss()
        assert torch.equal(losses.total, expected)
        (logits.square().mean() + losses.total).backward()
        with pytest.raises(ConfigError, match="has not run yet"):
            distillation.loss()
    assert module.head.weight.grad is not None


def test_padding_does_not_count(tokens, texts, calibrated) -> None:
    model = calibrated(tokens, texts)
    changed = copy.deepcopy(texts[0])
    changed["ids"][:, 3:] = 7  # the model would not read it, but for its own output there
    with qwrap.Distillation(model) as distillation:
        assert distillation.blocks
        before, after = distillation(texts[0]), distillation(changed)
        assert torch.equal(before.total, after.total)
        hidden = qwrap.load(tokens)(*map(torch.from_numpy, texts[0].values()))
    expected = normalized_error(before.results[:, :3], hidden[:, :3])
    assert float(before.outputs["hidden"].detach()) == pytest.approx(float(expected.detach()))


def test_a_function_of_ones_own_sees_what_counts(tokens, texts, calibrated) -> None:
    shapes = []

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        shapes.append((student.shape, teacher.shape))
        return (student - teacher).abs().mean()

    model = calibrated(tokens, texts)
    with qwrap.Distillation(model, outputs=loss) as distillation:
        distillation(texts[0])
    with qwrap.Distillation(model, outputs=loss, mask=None) as distillation:
        distillation(texts[0])
    assert shapes == [((12, 8), (12, 8)), ((4, 6, 8), (4, 6, 8))]


def test_a_fixed_size_that_equals_the_length_by_chance_is_not_masked(small, calibrated) -> None:
    nodes = """
        k = Cast<to=1>(attention_mask) s = ReduceMean<axes=[1], keepdims=1>(k)
        a = MatMul(s, w1) r = Relu(a) scores = MatMul(r, w2)
    """
    source = small.build(
        nodes,
        {"w1": (1, 5), "w2": (5, 4)},
        inputs="int64[N,L] attention_mask",
        outputs="float[N,4] scores",
    )
    mask = np.array([[1, 1, 0, 0], [1, 0, 0, 0]])  # as long as there are scores
    model = calibrated(source, [{"attention_mask": mask}])
    with qwrap.Distillation(model) as distillation:
        losses = distillation({"attention_mask": mask})
    expected = normalized_error(losses.results, qwrap.load(source)(torch.from_numpy(mask)))
    assert torch.equal(losses.outputs["scores"], expected)


@pytest.mark.parametrize("opset", [12, 13])
def test_of_probabilities_the_logits_are_compared(small, calibrated, opset: int) -> None:
    nodes = "h = MatMul(x, w1) r = Relu(h) z = MatMul(r, w2) y = Softmax<axis=1>(z)"
    source = small.build(
        nodes, {"w1": (5, 8), "w2": (8, 4)}, "float[N,5] x", "float[N,4] y", opset=opset
    )
    x = small.batches(1, (6, 5))
    model = calibrated(source, x)
    logits: list[torch.Tensor] = []
    with qwrap.Distillation(model, outputs="kl", blocks=None) as distillation:
        losses = distillation(x[0])
    teacher = qwrap.load(source)
    with model.watching({"z": logits.append}), teacher.watching({"z": logits.append}):
        model(torch.from_numpy(x[0]))
        teacher(torch.from_numpy(x[0]))
    assert torch.equal(losses.outputs["y"], divergence(*logits))
    losses.total.backward()
    assert model.stored("w1").grad.abs().sum() > 0


def test_outputs_that_are_no_floats_are_left_out(small, calibrated) -> None:
    nodes = "a = Conv(x, w1) y = Relu(a) best = ArgMax<axis=1>(y)"
    source = small.build(
        nodes, {"w1": (4, 3, 1, 1)}, outputs="float[N,4,8,8] y, int64[N,1,8,8] best"
    )
    model = calibrated(source)
    with qwrap.Distillation(model) as distillation:
        assert list(distillation(small.batches()[0]).outputs) == ["y"]
    with (
        qwrap.Distillation(model, outputs={"best": "mse"}, blocks=None) as distillation,
        pytest.raises(InputError, match="nothing to compare"),
    ):
        distillation(small.batches()[0])


def test_each_output_has_the_loss_asked_for(small, calibrated) -> None:
    nodes = "a = Conv(x, w1) y = Relu(a) z = Conv(y, w2) u = Conv(y, w3)"
    source = small.build(
        nodes,
        {"w1": (4, 3, 1, 1), "w2": (4, 4, 1, 1), "w3": (4, 4, 1, 1)},
        outputs="float[N,4,8,8] z, float[N,4,8,8] u",
    )
    model, x = calibrated(source), torch.from_numpy(small.batches()[0])
    with qwrap.Distillation(model, outputs={"u": "kl"}, blocks=None) as distillation:
        losses = distillation(x)
    wanted = qwrap.load(source)(x)[1]
    assert torch.equal(losses.total, divergence(losses.results[1], wanted, axis=1))


def test_another_teacher_may_be_given(small, calibrated) -> None:
    class Zero(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.zeros(len(x), 4, 8, 8),)

    model, x = calibrated(), small.batches()[0]
    with qwrap.Distillation(model, teacher=Zero()) as distillation:
        losses = distillation(x)
    assert distillation.blocks == []
    assert torch.allclose(losses.total, losses.results.square().mean())


def test_under_autocast_the_teacher_keeps_its_precision(small, calibrated) -> None:
    model, x = calibrated(), torch.from_numpy(small.batches()[0])
    teacher = qwrap.train.teacher_of(model)
    wanted = []
    teacher.register_forward_hook(lambda *args: wanted.append(args[-1]))
    with (
        qwrap.Distillation(model, teacher=teacher) as distillation,
        torch.autocast("cpu", torch.bfloat16),
    ):
        distillation(x).total.backward()
    assert torch.equal(wanted[0], qwrap.load(small.convs())(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"outputs": "mae"}, "no loss 'mae'; choose one of mse, kl, cosine"),
        ({"outputs": {"q": "mse"}}, r"no outputs \['q'\]"),
        ({"blocks": "b"}, 'expected "auto" or a list'),
        ({"blocks": ["x"]}, r"blocks=\['x'\]: no such tensors"),
        ({"blocks": ["b"], "teacher": nn.Identity()}, "the teacher computes no tensors"),
    ],
)
def test_settings_that_fit_nothing_are_refused(calibrated, settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        qwrap.Distillation(calibrated(), **settings)


def test_a_model_that_is_not_prepared_has_no_teacher(small) -> None:
    with pytest.raises(ConfigError, match="not prepared"):
        qwrap.Distillation(qwrap.load(small.convs()))


def test_a_teacher_with_other_outputs_is_refused(small, calibrated) -> None:
    distillation = qwrap.Distillation(calibrated(), teacher=nn.Sequential(nn.Identity(), Two()))
    with pytest.raises(ConfigError, match="returns 2 outputs; the graph has 1"):
        distillation(small.batches()[0])


class Two(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


def test_one_distillation_is_entered_once(calibrated) -> None:
    distillation = qwrap.Distillation(calibrated())
    with distillation, pytest.raises(ConfigError, match="in use already"):
        distillation.__enter__()
