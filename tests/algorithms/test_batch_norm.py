"""Restored channels against moments computed by hand, and what they bring on a real network."""

import numpy as np
import pytest
import torch

import qwrap
from qwrap.algorithms.batch_norm import restore_channels
from qwrap.config import QuantSpec
from qwrap.errors import ConfigError, InputError
from qwrap.model.points import UsePoint, ValuePoint
from qwrap.numerics import quantize
from qwrap.quant.matrices import weight_matrices

LAYERS = {
    "Conv": ("y = Conv(x, w, b)", (4, 3, 3, 3), 4),
    "groups": ("y = Conv<group=3>(x, w, b)", (6, 1, 3, 3), 6),
    "ConvTranspose": ("y = ConvTranspose<strides=[2,2]>(x, w, b)", (3, 5, 3, 3), 5),
    "Gemm": ("f = Flatten(x) y = Gemm(f, w, b)", (192, 5), 5),
    "Gemm transB": ("f = Flatten(x) y = Gemm<transB=1>(f, w, b)", (5, 192), 5),
}


def calibrated(source, batches, **settings):
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", **settings))
    qwrap.calibrate(model, batches, progress=False)
    return model


def moments(model, batches, value="y"):
    """Mean and variance of each channel of a tensor."""
    found = []
    with torch.no_grad(), model.watching({value: found.append}):
        for batch in batches:
            model(torch.from_numpy(batch))
    y = torch.cat(found).double().transpose(0, 1).flatten(1)
    return y.mean(1), y.var(1)


def codes(model, use=("/y", 1)):
    stub = model.tap(UsePoint(*use))
    constant = model.plan.constants[use]
    return quantize(model.stored(constant.value).detach(), stub.qparams, stub.spec)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items() if torch.is_tensor(v)}


def source_of(small, name):
    nodes, weight, outputs = LAYERS[name]
    rank = "float[N,M] y" if "Gemm" in name else "float[N,M,H,W] y"
    return small.build(nodes, {"w": weight, "b": (outputs,)}, outputs=rank)


@pytest.mark.parametrize(
    "weight",
    ["int8", "int4", QuantSpec(dtype="uint4", symmetric=False, axis=0)],
    ids=["int8", "int4", "uint4"],
)
@pytest.mark.parametrize("name", LAYERS)
def test_a_planted_shift_of_mean_and_variance_is_removed(small, name, weight) -> None:
    source, batches = source_of(small, name), small.batches(1, (16, 3, 8, 8))
    batches = [b + 1 for b in batches]
    model = calibrated(source, batches, activation=None, weight=weight)
    mean, variance = moments(qwrap.load(source), batches)
    stub = model.tap(UsePoint("/y", 1))
    with torch.no_grad():
        gain = torch.linspace(0.6, 1.7, len(stub.scale))
        shape = [1] * model.stored("w").dim()
        shape[stub.spec.axis] = -1
        model.stored("w").mul_(gain.reshape(shape))
        model.stored("b").add_(torch.linspace(-3, 2, len(mean)))
        stub.initial_scale.mul_(gain)
    before = codes(model)
    assert restore_channels(model, batches, progress=False)
    found = moments(model, batches)
    # What is left is float32 rounding of some hundred products of size 1.
    torch.testing.assert_close(found[0], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], variance, rtol=1e-4, atol=0)
    assert torch.equal(codes(model), before)


def test_layers_behind_one_another_are_restored_in_one_pass(small) -> None:
    source, batches = small.convs(), [np.abs(b) for b in small.batches(1, (8, 3, 8, 8))]
    model = calibrated(source, batches, activation=None, weight="int4")
    for node in ("/a", "/y"):
        model.tap(UsePoint(node, 1)).initial_scale.mul_(1.3)
    assert restore_channels(model, batches, progress=False)
    for value in ("a", "y"):
        wanted = moments(qwrap.load(source), batches, value)
        for found, target in zip(moments(model, batches, value), wanted, strict=True):
            torch.testing.assert_close(found, target, rtol=1e-4, atol=1e-5)


def test_one_scale_for_all_channels_leaves_it_alone_and_moves_means(small) -> None:
    source, batches = small.convs(), [np.abs(b) for b in small.batches(1, (8, 3, 8, 8))]
    model = calibrated(source, batches, activation=None, weight="int4", per_channel=False)
    before = {name: model.stored(name).clone() for name in ("w1", "w2")}
    scales = [model.tap(UsePoint(node, 1)).scale.clone() for node in ("/a", "/y")]
    outcome = restore_channels(model, batches, progress=False)
    assert outcome.details[0] == "mean and variance of 0 layers, mean alone of 2"
    assert outcome
    assert all(torch.equal(model.stored(name), value) for name, value in before.items())
    after = [model.tap(UsePoint(node, 1)).scale for node in ("/a", "/y")]
    assert all(torch.equal(a, b) for a, b in zip(scales, after, strict=True))
    wanted = moments(qwrap.load(source), batches)[0]
    torch.testing.assert_close(moments(model, batches)[0], wanted, rtol=1e-4, atol=1e-5)


def test_groups_of_a_transposed_convolution_share_scales_and_get_their_means(small) -> None:
    nodes = "y = ConvTranspose<group=3>(x, w, b)"
    source = small.build(nodes, {"w": (3, 2, 3, 3), "b": (6,)})
    batches = [np.abs(b) for b in small.batches(1, (8, 3, 8, 8))]
    model = calibrated(source, batches, activation=None, weight="int4")
    outcome = restore_channels(model, batches, progress=False)
    assert outcome.details[0] == "mean and variance of 0 layers, mean alone of 1"


def test_blocks_of_a_channel_move_together(small) -> None:
    source = source_of(small, "Gemm")
    batches = [b + 1 for b in small.batches(1, (64, 3, 8, 8))]
    spec = QuantSpec(dtype="int4", block_size=32)
    model = calibrated(source, batches, activation=None, weight=spec)
    stub = model.tap(UsePoint("/y", 1))
    with torch.no_grad():
        model.stored("w").mul_(0.8)
        stub.initial_scale.mul_(0.8)
    before, kept = stub.scale.clone(), codes(model)
    assert restore_channels(model, batches, progress=False)
    ratio = stub.scale / before
    assert ratio.std(0).max() < 1e-6 < (ratio[0] - 1).abs().min()
    assert torch.equal(codes(model), kept)


def test_a_channel_without_variance_keeps_its_scale(small) -> None:
    weight = np.random.default_rng(0).normal(0, 1, (2, 3, 3, 3)).astype(np.float32)
    weight[1] = 0
    source = small.build("y = Conv(x, w, b)", {"w": weight, "b": (2,)})
    batches = small.batches(1, (8, 3, 8, 8))
    model = calibrated(source, batches, activation=None, weight="int4")
    before = model.tap(UsePoint("/y", 1)).scale.clone()
    assert restore_channels(model, batches, progress=False)
    after = model.tap(UsePoint("/y", 1)).scale
    assert after[1] == before[1]
    assert after[0] != before[0]


def test_layers_without_a_bias_of_their_own_are_named(small) -> None:
    nodes = "a = Conv<pads=[1,1,1,1]>(x, w, b) c = Relu(a) y = Conv<pads=[1,1,1,1]>(c, u, b)"
    source = small.build(nodes, {"w": (3, 3, 3, 3), "u": (3, 3, 3, 3), "b": (3,)})
    model, batches = calibrated(source, small.batches()), small.batches()
    before = state(model)
    outcome = restore_channels(model, batches, progress=False)
    assert not outcome
    assert outcome.details[1:] == ("2 layers have no bias of their own and were left alone",)
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())


def test_what_does_not_help_is_taken_back_bit_for_bit(small) -> None:
    """What the first batch teaches is the opposite of what the second one needs."""
    source = small.build(
        "y = Gemm(x, w, b)", {"w": (12, 20), "b": (20,)}, "float[N,12] x", "float[N,20] y"
    )
    ones = np.ones((2, 12), np.float32)
    model = calibrated(source, [ones, -ones])
    model.tap(UsePoint("/y", 1)).initial_scale.mul_(0.7)  # clamps the largest weights
    model.train()
    before, random = state(model), torch.random.get_rng_state()
    outcome = restore_channels(model, [ones, -ones], progress=False)
    assert not outcome
    assert outcome.after >= outcome.before
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize("activation", ["uint8", None])
def test_the_file_computes_with_the_restored_channels(small, tmp_path, activation) -> None:
    source, batches = small.convs(), [np.abs(b) for b in small.batches(4)]
    model = calibrated(source, batches, weight="int8", activation=activation)
    for node in ("/a", "/y"):
        model.tap(UsePoint(node, 1)).initial_scale.mul_(1.3)
    assert restore_channels(model, batches, progress=False)
    qwrap.export(model, tmp_path / "q.onnx")
    for batch in batches:
        found, wanted = small.run(tmp_path / "q.onnx", batch)[0], model(torch.from_numpy(batch))
        # Without codes of activations only float32 sums of 54 products differ.
        near = 1e-5 if activation is None else float(model.tap(ValuePoint("y")).scale) * 1.01
        np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=0, atol=near)


def test_it_refuses_what_it_cannot_work_with(small) -> None:
    with pytest.raises(InputError, match="no batches"):
        restore_channels(calibrated(small.convs(), small.batches()), [])
    with pytest.raises(ConfigError, match="not prepared"):
        restore_channels(qwrap.load(small.convs()), small.batches())


def test_live_batch_normalizations_have_their_own_function(small) -> None:
    nodes = "a = Conv(x, w, b) y = BatchNormalization(a, g, c, m, v)"
    ones = np.ones(4, np.float32)
    weights = {"w": (4, 3, 3, 3), "b": (4,), "g": ones, "c": ones, "m": ones, "v": ones}
    model = calibrated(small.build(nodes, weights), small.batches(), bn="live")
    with pytest.raises(ConfigError, match=r"call qwrap\.train\.reestimate_batch_norm"):
        restore_channels(model, small.batches())


def test_a_network_at_4_bits_loses_half_of_its_error(shared_model) -> None:
    model, batches = shared_model("resnet20_cifar10", 16, weight="int4")
    found, _ = weight_matrices(model)
    before = [codes(model, m.use) for m in found]
    outcome = restore_channels(model, batches, progress=False)
    assert outcome
    assert outcome.after < outcome.before / 2
    after = [codes(model, m.use) for m in found]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
