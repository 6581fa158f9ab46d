"""Live batch normalization against torch's own, and against the exported file."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from normed import (
    LIVE,
    NETS,
    Layers,
    batches,
    calibrated,
    conv_net,
    linear_net,
    live,
    seeded,
    to_onnx,
    trained,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qwrap
from qwrap.errors import InputError
from qwrap.model.points import UsePoint, ValuePoint


@pytest.fixture(params=NETS.values(), ids=NETS.keys())
def case(request: pytest.FixtureRequest) -> tuple[Layers, tuple[int, ...]]:
    make, shape = request.param
    return seeded(make, shape), shape


# --- preparing -----------------------------------------------------------------------------------


def test_preparing_keeps_the_function_and_says_which_layers_are_live(case) -> None:
    net, shape = case
    model, (x,) = live(net), batches(1, shape)
    wanted = qwrap.load(to_onnx(net)).eval()(x)
    # Folding rounds each weight once: some 2^-24 of the largest output.
    torch.testing.assert_close(
        model.eval()(x), wanted, rtol=0, atol=1e-6 * wanted.abs().max().item()
    )
    nodes = ", ".join(f"/c{i}" for i in range(len(net.layers)))
    assert f"live in {len(net.layers)} layers: {nodes}" in model.plan.summary()


def test_what_is_deployed_is_what_folding_before_training_gives(case) -> None:
    net, _ = case
    model, folded = live(net), live(net, bn="fold")
    assert not folded.replaced
    for value in model.remade:
        wanted = folded.stored(value)
        if "bias" not in value:
            assert torch.equal(model.deployed(value), wanted)
        # A mean from which the layer's own bias was taken is rounded to float32 once more.
        torch.testing.assert_close(model.deployed(value), wanted, rtol=1e-6, atol=1e-6)


def test_the_weight_stays_the_parameter_that_an_optimizer_holds(case) -> None:
    model = qwrap.load(to_onnx(case[0]))
    before = dict(model.named_parameters())
    qwrap.prepare(model, qwrap.QConfig(**LIVE))
    after = dict(model.named_parameters())
    for i in range(len(case[0].layers)):
        assert after[f"layers.{i}.weight"] is before[f"layers.{i}.weight"]


# --- training ------------------------------------------------------------------------------------


def pairs(model: qwrap.WrappedModel, net: Layers) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameters and statistics of both that mean the same."""
    found = {
        f"head.{n}": (model.stored(f"head.{n}"), getattr(net.head, n)) for n in ("weight", "bias")
    }
    for i, norm in enumerate(net.norms):
        layer = model.substitute(f"/c{i}")
        bias = model.graph.nodes[f"/c{i}"].inputs[2].name
        found[f"{i} weight"] = model.stored(f"layers.{i}.weight"), net.layers[i].weight
        found[f"{i} beta"] = model.stored(bias), norm.bias
        found[f"{i} gamma"] = layer.gamma, norm.weight
        own = net.layers[i].bias
        shift = 0 if own is None else own.detach()
        found[f"{i} mean"] = layer.running_mean, norm.running_mean - shift
        found[f"{i} variance"] = layer.running_var, norm.running_var
    return found


def test_float_training_is_that_of_torch_with_its_own_normalization(case) -> None:
    net, shape = case
    model = live(net).train()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, net)]
    for x in batches(4, shape):
        outputs = model(x), net(x)
        # The same kernels, but for the bias that the batch's mean takes off again.
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.square().mean().backward()
        for name, (ours, theirs) in pairs(model, net).items():
            if ours.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)
        for optimizer in optimizers:
            optimizer.step()
    for name, (ours, theirs) in pairs(model, net).items():
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)


def test_evaluation_after_float_training_is_that_of_torch(case) -> None:
    net, shape = case
    model = live(net).train()
    for x in batches(3, shape):
        model(x)
        net(x)
    (x,) = batches(1, shape, seed=5)
    torch.testing.assert_close(model.eval()(x), net.eval()(x), rtol=1e-5, atol=1e-5)


# --- with quantization ---------------------------------------------------------------------------


def by_hand(model: qwrap.WrappedModel, key: str, x: Tensor) -> Tensor:
    """Convolution 0 as the paper has it, from the parts of the model."""
    layer, weight = model.substitute(key), model.stored("layers.0.weight")
    factor = (layer.gamma / (layer.running_var + layer.eps).sqrt()).detach().reshape(-1, 1, 1, 1)
    rounded = model.tap(UsePoint(key, 1))(weight * factor) / factor
    y = nn.functional.conv2d(model.tap(ValuePoint("x"))(x), rounded, None, 1, 1)
    mean, variance = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), keepdim=True, correction=0)
    shape = (1, -1, 1, 1)
    beta = model.stored("layers.0.bias").reshape(shape)
    return (y - mean) / (variance + layer.eps).sqrt() * layer.gamma.reshape(shape) + beta


def test_a_batch_is_normalized_by_its_own_statistics_behind_the_rounded_folded_weight() -> None:
    model = calibrated(seeded(conv_net)).train()
    (x,), seen = batches(1, seed=3), []
    for layer in (model.substitute(f"/c{i}") for i in range(5)):
        layer.momentum = 0.0  # so that both ways find the same factors
    with model.watching({"n0": seen.append}):
        model(x)
    names = ("layers.0.weight", "layers.0.bias", "gamma", "gain")
    parameters = [model.stored(names[0]), model.stored(names[1]), model.substitute("/c0").gamma]
    parameters.append(model.tap(UsePoint("/c0", 1)).gain)
    other = torch.randn(seen[0].shape, generator=torch.Generator().manual_seed(4))
    ours = torch.autograd.grad((seen[0] * other).sum(), parameters)
    wanted = by_hand(model, "/c0", x)
    theirs = torch.autograd.grad((wanted * other).sum(), parameters)
    # Sums over 512 values in another order.
    torch.testing.assert_close(seen[0], wanted, rtol=1e-4, atol=1e-4)
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=name)


def test_scales_of_weights_learn_behind_a_live_normalization() -> None:
    model = calibrated(seeded(conv_net)).train()
    model(batches(1)[0]).square().sum().backward()
    for i in range(3):
        assert model.tap(UsePoint(f"/c{i}", 1)).gain.grad.any()


def test_frozen_statistics_give_the_gradients_of_torch_in_evaluation(case) -> None:
    net, shape = case
    model, (x,) = live(net).train(), batches(1, shape)
    qwrap.train.freeze_batch_norm(model)
    net.eval()
    for module in (model, net):
        module(x).square().mean().backward()
    for name, (ours, theirs) in pairs(model, net).items():
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_frozen_training_computes_what_is_deployed_and_keeps_the_statistics() -> None:
    model = trained(calibrated(seeded(conv_net)))
    (x,) = batches(1, seed=7)
    wanted, before = model(x), copy.deepcopy(model.state_dict())
    qwrap.train.freeze_batch_norm(model)
    assert torch.equal(model.train()(x), wanted)
    for name in before:
        if "running" in name:
            assert torch.equal(model.state_dict()[name], before[name])
    qwrap.train.freeze_batch_norm(model, False)
    assert not torch.equal(model(x), wanted)


def run_literally(path: Path, x: Tensor) -> np.ndarray:
    """What onnxruntime computes from the file as it is written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})[0]


def test_the_exported_file_is_what_was_trained(case, tmp_path: Path) -> None:
    net, shape = case
    model = live(net)
    qwrap.calibrate(model, batches(4, shape), progress=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for x in batches(5, shape):
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()
    path, data = tmp_path / "live.onnx", batches(2, shape, seed=9)
    qwrap.train.freeze_batch_norm(model)
    qwrap.export(model, path)
    # Float sums in another order between equal codes.
    np.testing.assert_allclose(run_literally(path, data[0]), model(data[0]).detach(), atol=1e-5)
    report = qwrap.verify(model, path, data, progress=False)
    assert report.deployed.differing == 0
    assert report.specification.differing == 0


def test_exporting_folds_in_the_file_alone(tmp_path: Path) -> None:
    model = trained(calibrated(seeded(conv_net)))
    before = copy.deepcopy(model.state_dict())
    qwrap.export(model, tmp_path / "live.onnx")
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items() if isinstance(v, Tensor))
    qwrap.train.fold_batch_norm(model)
    assert not model.replaced
    assert not [name for name, _ in model.named_parameters() if "gamma" in name]
    qwrap.export(model, tmp_path / "folded.onnx")
    assert (tmp_path / "live.onnx").read_bytes() == (tmp_path / "folded.onnx").read_bytes()


def test_folding_for_good_changes_no_bit_of_the_output() -> None:
    model = trained(calibrated(seeded(conv_net)))
    (x,) = batches(1, seed=7)
    wanted = model(x)
    qwrap.train.fold_batch_norm(model, nodes="/c[12]")
    assert sorted(model.replaced) == ["/c0", "/c3", "/c4"]
    assert torch.equal(model(x), wanted)
    qwrap.train.fold_batch_norm(nn.Sequential(model))
    assert torch.equal(model(x), wanted)
    assert "live" not in model.plan.summary()


def test_exact_is_what_is_deployed_in_training_mode_too() -> None:
    model = trained(calibrated(seeded(conv_net), excluded=["/c2"]))
    (x,) = batches(1, seed=7)
    with qwrap.exact(model):
        wanted = model(x)
        assert torch.equal(model.train()(x), wanted)


def test_a_layer_left_in_float_is_live_too() -> None:
    net = seeded(conv_net)
    model = calibrated(net, excluded=["/c2"])
    assert model.plan.nodes["/c2"].role == "float"
    before = model.substitute("/c2").running_mean.clone()
    model.train()(batches(1)[0])
    assert not torch.equal(model.substitute("/c2").running_mean, before)


def test_a_channel_whose_gamma_is_zero_puts_out_beta_and_can_come_back() -> None:
    net = seeded(conv_net)
    with torch.no_grad():
        net.norms[0].weight[2] = 0.0
    model = calibrated(net).train()
    seen: list[Tensor] = []
    with model.watching({"n0": seen.append}):
        model(batches(1)[0]).square().sum().backward()
    beta = model.stored("layers.0.bias").detach()
    # Normalized values times zero, plus beta.
    torch.testing.assert_close(seen[0][:, 2], beta[2].expand_as(seen[0][:, 2]), rtol=0, atol=1e-6)
    layer = model.substitute("/c0")
    assert layer.gamma.grad.isfinite().all()
    assert model.stored("layers.0.weight").grad.isfinite().all()
    if beta[2] > 0:  # else a Relu hides it
        assert layer.gamma.grad[2] != 0


def test_a_checkpointed_step_is_the_step_without_checkpoints() -> None:
    model = calibrated(seeded(conv_net)).train()
    other, (x, y) = copy.deepcopy(model), batches(2, seed=3)
    for _ in range(2):
        model(x).square().mean().backward()
        model(y).square().mean().backward()
    for _ in range(2):
        checkpoint(other, x, use_reentrant=False).square().mean().backward()
        checkpoint(other, y, use_reentrant=False).square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b), name


# torch itself makes an instance of the autograd function while it traces one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_torch_compiles_a_live_model() -> None:
    model = calibrated(seeded(conv_net), excluded=["Gemm"]).train()
    other, (x,) = copy.deepcopy(model), batches(1)
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(
        other.substitute("/c0").running_var, model.substitute("/c0").running_var, rtol=0, atol=0
    )


def test_one_value_for_each_channel_is_refused() -> None:
    model = live(seeded(linear_net, (8, 5)))
    with pytest.raises(InputError, match=r"'/c0'.*\[1, 8\].*freeze_batch_norm"):
        model.train()(torch.zeros(1, 5))
