"""Live batch normalization against torch's own, and against the exported file."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.distributed as dist
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qwrap
from qwrap.errors import ConfigError, InputError, QwrapWarning
from qwrap.model.extra_state import SUFFIX
from qwrap.model.points import UsePoint, ValuePoint
from qwrap.quant.live import live_layers

LIVE = {"only_if_faster": False, "bn": "live"}


class Layers(nn.Module):
    """Layer after layer, each with a batch normalization, then what pools and a linear one."""

    def __init__(self, *layers: nn.Module, features: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        counts = [_outputs(layer) for layer in layers]
        self.norms = nn.ModuleList(_norm(layer, n) for layer, n in zip(layers, counts, strict=True))
        self.head = nn.Linear(features, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x)).relu()
        return self.head(x.mean((2, 3)) if x.dim() == 4 else x)


def _outputs(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _norm(layer: nn.Module, count: int) -> nn.Module:
    norm = (nn.BatchNorm1d if isinstance(layer, nn.Linear) else nn.BatchNorm2d)(count)
    generator = torch.Generator().manual_seed(count)
    with torch.no_grad():  # of both signs
        norm.weight.copy_(torch.randn(count, generator=generator))
        norm.bias.copy_(torch.randn(count, generator=generator))
    return norm


def conv_net() -> Layers:
    """Plain, depthwise, grouped and transposed convolutions, with and without a bias."""
    return Layers(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2),
        nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2, bias=False),
        nn.ConvTranspose2d(8, 6, 3, padding=1),
    )


def seeded(make: Callable[[], Layers], shape: tuple[int, ...] = (8, 3, 8, 8)) -> Layers:
    """A network whose running statistics have seen something."""
    torch.manual_seed(0)
    net = make().train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(shape))
    return net


def to_onnx(net: Layers) -> onnx.ModelProto:
    """The network with its normalizations as nodes; node ``/c2`` is ``net.layers[2]``."""
    weights = {k: v.numpy() for k, v in net.state_dict().items() if "batches" not in k}
    nodes, x = [], "x"
    for i, (layer, norm) in enumerate(zip(net.layers, net.norms, strict=True)):
        names = [f"layers.{i}.weight", f"layers.{i}.bias"][: 1 + (layer.bias is not None)]
        settings = _settings(layer)
        nodes.append(helper.make_node(KINDS[type(layer)], [x, *names], [f"c{i}"], **settings))
        parts = [f"norms.{i}.{p}" for p in ("weight", "bias", "running_mean", "running_var")]
        settings = {"epsilon": norm.eps, "momentum": 1 - norm.momentum}
        nodes.append(
            helper.make_node("BatchNormalization", [f"c{i}", *parts], [f"n{i}"], **settings)
        )
        nodes.append(helper.make_node("Relu", [f"n{i}"], [f"r{i}"]))
        x = f"r{i}"
    flat = isinstance(net.layers[0], nn.Linear)
    if not flat:
        nodes.append(helper.make_node("GlobalAveragePool", [x], ["pooled"]))
        nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
        x = "flat"
    nodes.append(helper.make_node("Gemm", [x, "head.weight", "head.bias"], ["y"], transB=1))
    for node in nodes:
        node.name = f"/{node.output[0]}"
    size = ["N", net.layers[0].in_features] if flat else ["N", 3, 8, 8]
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])


KINDS = {nn.Conv2d: "Conv", nn.ConvTranspose2d: "ConvTranspose", nn.Linear: "Gemm"}


def _settings(layer: nn.Module) -> dict[str, object]:
    if isinstance(layer, nn.Linear):
        return {"transB": 1}
    return {"group": layer.groups, "strides": layer.stride, "pads": [*layer.padding] * 2}


def live(net: Layers, **settings: object) -> qwrap.WrappedModel:
    model = qwrap.load(to_onnx(net))
    qwrap.prepare(model, qwrap.QConfig(**{**LIVE, **settings}))
    return model


def batches(count: int = 4, shape: tuple[int, ...] = (8, 3, 8, 8), seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def calibrated(net: Layers, **settings: object) -> qwrap.WrappedModel:
    model = live(net, **settings)
    qwrap.calibrate(model, batches(), progress=False)
    return model


def trained(model: qwrap.WrappedModel, steps: int = 3) -> qwrap.WrappedModel:
    """The model after some steps with live statistics, back in evaluation mode."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x in batches(steps, seed=2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


def linear_net() -> Layers:
    return Layers(nn.Linear(5, 8, bias=False), nn.Linear(8, 6))


NETS = {"convolutions": (conv_net, (8, 3, 8, 8)), "products": (linear_net, (8, 5))}


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


# --- state ---------------------------------------------------------------------------------------


def same_output(a: nn.Module, b: nn.Module) -> bool:
    (x,) = batches(1, seed=11)
    return torch.equal(a.eval()(x), b.eval()(x)) and torch.equal(a.train()(x), b.train()(x))


def test_a_state_dict_restores_everything(tmp_path: Path) -> None:
    net = seeded(conv_net)
    model, fresh = trained(calibrated(net)), live(net)
    qwrap.train.freeze_batch_norm(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert fresh.substitute("/c0").frozen
    assert same_output(model, fresh)
    qwrap.train.freeze_batch_norm(fresh, False)
    qwrap.train.freeze_batch_norm(model, False)
    assert same_output(model, fresh)


def test_a_state_dict_from_after_folding_folds_and_one_from_before_unfolds() -> None:
    net = seeded(conv_net)
    model = trained(calibrated(net))
    before = copy.deepcopy(model.state_dict())
    qwrap.train.fold_batch_norm(model, nodes="/c[01]")
    fresh = live(net)
    fresh.load_state_dict(model.state_dict())
    assert sorted(fresh.replaced) == ["/c2", "/c3", "/c4"]
    assert same_output(model, fresh)
    fresh.load_state_dict(before)
    assert sorted(fresh.replaced) == [f"/c{i}" for i in range(5)]
    assert same_output(fresh, model) is False
    other = live(net)
    other.load_state_dict(before)
    assert same_output(fresh, other)


def test_copies_and_pickles_go_on_alike() -> None:
    model = trained(calibrated(seeded(conv_net)))
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert same_output(copied, pickled)
    assert copied.substitute("/c0").gamma is not model.substitute("/c0").gamma


def test_preparing_again_keeps_normalizations_or_folds_them() -> None:
    model = trained(calibrated(seeded(conv_net)))
    layer, weight = model.substitute("/c0"), model.stored("layers.0.weight")
    deployed = {value: model.deployed(value) for value in model.remade}
    qwrap.prepare(model, qwrap.QConfig(**LIVE, weight="int4"))
    assert model.substitute("/c0") is layer
    assert model.stored("layers.0.weight") is weight
    assert all(torch.equal(model.deployed(v), tensor) for v, tensor in deployed.items())
    qwrap.prepare(model, qwrap.QConfig(only_if_faster=False))
    assert not model.replaced
    assert all(torch.equal(model.stored(v), tensor) for v, tensor in deployed.items())


def test_other_algorithms_write_through_the_folding() -> None:
    model = trained(calibrated(seeded(conv_net), weight="int4"))
    folded = copy.deepcopy(model)
    qwrap.train.fold_batch_norm(folded)
    for change in (qwrap.round_weights, qwrap.correct_biases):
        assert change(model, batches(8, seed=6)) == change(folded, batches(8, seed=6))
        for value in folded.layout.slots:
            # What was divided by a factor is multiplied by it again.
            ours, theirs = model.deployed(value), folded.deployed(value)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=value)


# --- statistics ----------------------------------------------------------------------------------


def test_reestimation_gives_mean_and_variance_of_all_batches_together() -> None:
    model = trained(calibrated(seeded(conv_net)))
    data = [*batches(3, seed=4), *batches(2, (5, 3, 8, 8), seed=5)]
    layer, x = model.substitute("/c0"), torch.cat(data)
    factor = layer.factor().float().reshape(-1, 1, 1, 1)
    weight = model.tap(UsePoint("/c0", 1))(model.stored("layers.0.weight") * factor) / factor
    y = nn.functional.conv2d(model.tap(ValuePoint("x"))(x), weight, None, 1, 1).double()
    qwrap.train.reestimate_batch_norm(model, data, progress=False)
    # Means of float32 values.
    torch.testing.assert_close(layer.running_mean.double(), y.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.running_var.double(), y.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not layer.renewing
    assert layer.moments is None


def test_reestimating_in_a_loop_of_ones_own_works_inside_of_another_module() -> None:
    model = trained(calibrated(seeded(conv_net)))
    other, data = nn.Sequential(copy.deepcopy(model)), batches(3, seed=4)
    qwrap.train.reestimate_batch_norm(model, data, progress=False)
    with qwrap.train.reestimating_batch_norm(other):
        for x in data:
            other(x)
    assert same_output(model, other[0])


def enter_and_leave(model: nn.Module) -> None:
    with qwrap.train.reestimating_batch_norm(model):
        pass


def test_a_failed_reestimation_leaves_the_statistics() -> None:
    model = trained(calibrated(seeded(conv_net)))
    before = model.substitute("/c3").running_var.clone()
    with pytest.raises(InputError, match="no batch"):
        qwrap.train.reestimate_batch_norm(model, [], progress=False)
    with pytest.raises(InputError, match=r"'/c0'.* saw no data"):
        enter_and_leave(model)
    with pytest.raises(InputError, match="'x'"):
        qwrap.train.reestimate_batch_norm(model, [*batches(1), torch.zeros(3)], progress=False)
    assert torch.equal(model.substitute("/c3").running_var, before)
    assert not model.substitute("/c3").renewing


def test_the_verbs_say_where_nothing_is_live() -> None:
    model = live(seeded(conv_net), bn="fold")
    verbs = (
        qwrap.train.freeze_batch_norm,
        qwrap.train.sync_batch_norm,
        qwrap.train.fold_batch_norm,
    )
    for verb in verbs:
        assert verb(model) == 0
        with pytest.raises(ConfigError, match="no prepared model"):
            verb(nn.Linear(1, 1))
        with pytest.raises(ConfigError, match="'/c9'"):
            verb(model, nodes="/c9")
    with pytest.raises(ConfigError, match="bn='live'"):
        qwrap.train.reestimate_batch_norm(model, batches(1))


def test_some_layers_can_be_frozen() -> None:
    model = live(seeded(conv_net))
    assert qwrap.train.freeze_batch_norm(nn.Sequential(model), nodes="/c[13]") == 2
    assert [layer.frozen for _, layer in live_layers(model)] == [False, True, False, True, False]


def test_a_schedule_freezes_statistics_for_the_last_third() -> None:
    model = live(seeded(conv_net))
    schedule = qwrap.train.Schedule(model, 9, fake_quant=None)
    frozen = []
    for _ in range(9):
        frozen.append(model.substitute("/c0").frozen)
        schedule.step()
    assert frozen == [False] * 6 + [True] * 3


# --- models that came folded ---------------------------------------------------------------------

FOLDED = """
    a = Conv<pads=[1,0,2,1]>(x, w1) r = Relu(a)
    b = Conv<group=2>(r, w2, b2) s = Relu(b)
    c = Conv(s, w3, b3) p = GlobalAveragePool(c) f = Flatten(p) y = Gemm(f, w4, b4)
"""
SHAPES = {"w1": (6, 3, 3, 3), "w2": (6, 3, 1, 1), "b2": (6,), "w3": (8, 6, 3, 3), "b3": (8,)}
SHAPES |= {"w4": (8, 4), "b4": (4,)}


def came_folded(small, nodes: str = FOLDED, shapes=SHAPES, outputs="float[N,4] y"):
    model = qwrap.load(small.build(nodes, shapes, outputs=outputs)).eval()
    (x,) = batches(1, seed=8)
    wanted = model(x)
    qwrap.prepare(model, qwrap.QConfig(**LIVE))
    return model, x, wanted


def test_a_model_that_came_folded_gets_normalizations_that_change_nothing(small) -> None:
    model, x, wanted = came_folded(small)
    assert sorted(model.replaced) == ["/a", "/b", "/c"]
    assert torch.equal(model(x), wanted)
    seen: list[Tensor] = []
    with qwrap.calibrating(model), model.watching({"b": seen.append}), torch.no_grad():
        for batch in batches(3):
            model(batch)
    stub_modes(model, "float")
    # A mean is added to each bias and taken off again, in float32.
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    layer, y = model.substitute("/b"), torch.cat(seen).double()
    bias = torch.tensor(model.graph.values["b2"].const_value.numpy()).reshape(1, -1, 1, 1)
    mean, variance = (y - bias).mean((0, 2, 3)), y.var((0, 2, 3))
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var.double(), variance, rtol=1e-5, atol=1e-5)
    for value in ("w1", "w2", "w3"):
        wanted = torch.tensor(model.graph.values[value].const_value.numpy())
        assert torch.equal(model.deployed(value), wanted)


def stub_modes(model: qwrap.WrappedModel, mode: str) -> None:
    for tap in (model.tap(point) for point in model.attached):
        tap.mode = mode


def test_what_came_folded_can_be_trained_exported_and_verified(small, tmp_path: Path) -> None:
    model, _, _ = came_folded(small)
    qwrap.calibrate(model, batches(3), progress=False)
    trained(model)
    qwrap.export(model, tmp_path / "live.onnx")
    report = qwrap.verify(model, tmp_path / "live.onnx", batches(2, seed=9), progress=False)
    assert report.deployed.differing == 0


def test_only_layers_with_another_one_behind_get_a_normalization_back(small) -> None:
    nodes = "a = Conv(x, w1) b = Relu(a) c = Conv(b, w2) y = Sigmoid(c)"
    shapes = {"w1": (6, 3, 3, 3), "w2": (4, 6, 1, 1)}
    model, _, _ = came_folded(small, nodes, shapes, "float[N,M,H,W] y")
    assert sorted(model.replaced) == ["/a"]
    assert "/c" not in model.replaced


def test_a_weight_of_two_nodes_stays_folded_and_it_is_said(small) -> None:
    nodes = "a = Conv(x, w) r = Relu(a) b = Conv(r, w) c = Conv(b, u) y = GlobalAveragePool(c)"
    shapes = {"w": (3, 3, 3, 3), "u": (4, 3, 1, 1)}
    model, x, wanted = came_folded(small, nodes, shapes, "float[N,M,H,W] y")
    assert not model.replaced
    assert "Conv '/a': stays without batch normalization: its weight 'w'" in model.plan.summary()
    assert torch.equal(model(x), wanted)


def test_layers_without_statistics_are_named_and_get_them_later(small, tmp_path: Path) -> None:
    model, x, _ = came_folded(small)
    file = tmp_path / "statistics.safetensors"
    qwrap.calibrate(model, batches(3), save=file, progress=False)
    model, x, _ = came_folded(small)
    with pytest.warns(QwrapWarning, match="3 layers have no statistics.*'/a', '/b', '/c'"):
        qwrap.calibrate(model, [], statistics=file, progress=False)
    before = model(x)
    assert torch.equal(model.train()(x), before)
    model(x).sum().backward()
    assert not model.substitute("/a").gamma.grad.any()
    qwrap.train.reestimate_batch_norm(model, batches(3), progress=False)
    assert model.substitute("/a").known
    # A bias may move to the next of its codes, which are steps of a hundred thousandth.
    torch.testing.assert_close(model.eval()(x), before, rtol=0, atol=1e-2)


# --- several processes ---------------------------------------------------------------------------

WORLD = 2


def run_rank(rank: int, folder: str, source: bytes) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    model = qwrap.load(onnx.load_from_string(source))
    qwrap.prepare(model, qwrap.QConfig(**LIVE))
    qwrap.calibrate(model, shares(batches())[rank], progress=False)
    qwrap.train.sync_batch_norm(model)
    train_in_parallel(model, rank)
    state = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith(SUFFIX)}
    qwrap.train.reestimate_batch_norm(model, shares(batches())[rank], progress=False)
    state |= {f"renewed {k}": v for k, v in model.state_dict().items() if "running" in k}
    torch.save(state, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def train_in_parallel(model: nn.Module, rank: int) -> None:
    """In a function, for a wrapper that outlives the process group may wait for ever."""
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    steps(parallel, lambda x: shares([x])[rank][0])


def shares(data: list[Tensor]) -> list[list[Tensor]]:
    """Unequal parts of each batch for the ranks."""
    return [[x[:3] for x in data], [x[3:] for x in data]]


def steps(model: nn.Module, part: Callable[[Tensor], Tensor]) -> None:
    """Train on the sum over samples of a loss, so that parts of a batch add up to it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x in batches(2, seed=2):
        optimizer.zero_grad()
        scale = dist.get_world_size() if dist.is_initialized() else 1  # which averages gradients
        (model.train()(part(x)).square().sum() * scale / 32).backward()
        optimizer.step()


def test_two_ranks_with_common_statistics_train_as_one_process(tmp_path: Path) -> None:
    source = to_onnx(seeded(conv_net)).SerializeToString()
    arguments = (str(tmp_path), source)
    torch.multiprocessing.spawn(run_rank, arguments, nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    model = qwrap.load(onnx.load_from_string(source))
    qwrap.prepare(model, qwrap.QConfig(**LIVE))
    qwrap.calibrate(model, batches(), progress=False)
    steps(model, lambda x: x)
    wanted = {k: v for k, v in model.state_dict().items() if not k.endswith(SUFFIX)}
    for name, value in wanted.items():
        if not name.startswith("taps"):  # gains learn from samples, each rank from its own
            # Sums over samples in another order, through rounding that may fall the other way.
            torch.testing.assert_close(first[name], value, rtol=2e-2, atol=2e-3)
    qwrap.train.reestimate_batch_norm(model, batches(), progress=False)
    for name, value in model.state_dict().items():
        if "c0.running" in name:
            torch.testing.assert_close(first[f"renewed {name}"], value, rtol=2e-2, atol=2e-3)
