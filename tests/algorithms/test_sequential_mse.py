"""Chosen scales against those found by running every candidate."""

import numpy as np
import pytest
import torch

import qwrap
from qwrap.algorithms.sequential_mse import sequential_mse
from qwrap.config import QuantSpec
from qwrap.errors import ConfigError, InputError, NotCalibratedError
from qwrap.model.points import UsePoint
from qwrap.numerics import choose_qparams
from qwrap.quant.constants import LARGEST_BIAS
from qwrap.quant.ranges import choose_weight_range

LAYERS = {
    "Conv": ("y = Conv<strides=[2,1],pads=[1,0,1,2]>(x, w, b)", (4, 3, 3, 3), (4,)),
    "groups": ("y = Conv<group=3>(x, w, b)", (6, 1, 3, 3), (6,)),
    "1-D": ("r = Reshape(x, s) y = Conv(r, w, b)", (4, 3, 5), (4,)),
    "ConvTranspose": ("y = ConvTranspose<strides=[2,2]>(x, w, b)", (3, 5, 3, 3), (5,)),
    "Gemm": ("f = Flatten(x) y = Gemm(f, w, b)", (192, 5), (5,)),
    "Gemm transB": ("f = Flatten(x) y = Gemm<transB=1>(f, w, b)", (5, 192), (5,)),
    "MatMul": ("y = MatMul(x, w)", (8, 5), None),
    "batched": ("y = MatMul(x, w)", (3, 8, 5), None),
}
SPECS = {
    "int8": "int8",
    "int4": "int4",
    "uint4": QuantSpec(dtype="uint4", symmetric=False, axis=0),
    "float4": QuantSpec(dtype="float4e2m1", axis=0),
}


def source_of(small, name):
    nodes, weight, bias = LAYERS[name]
    rank = {"Gemm": "[N,M]", "1-D": "[N,M,L]"}.get(name.split()[0], "[N,M,H,W]")
    weights = {"w": weight, **({} if bias is None else {"b": bias})}
    if name == "1-D":
        weights["s"] = np.int64([0, 3, 64])
    return small.build(nodes, weights, outputs=f"float{rank} y")


def correlated(small, count=1):
    """Inputs with a mean, and with a part in common: errors of weights then add up."""
    common = np.random.default_rng(3).normal(1, 1, (1, 3, 8, 8))
    return [(b + common).astype(np.float32) for b in small.batches(count, (6, 3, 8, 8))]


def calibrated(source, batches, **settings):
    model = qwrap.load(source).eval()
    settings = {"scope": "kernels", "weight_method": "minmax", **settings}
    qwrap.prepare(model, qwrap.QConfig(**settings))
    qwrap.calibrate(model, batches, progress=False)
    return model


def output(model, batches):
    with torch.no_grad():
        return torch.cat([model(torch.from_numpy(b)) for b in batches]).double()


def by_scale(error, name):
    """Sum the squared error of an output over what shares a scale."""
    axis = error.dim() - 1 if "MatMul" in LAYERS[name][0] else 1
    return error.square().transpose(0, axis).flatten(1).sum(1)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items() if torch.is_tensor(v)}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_scale_is_the_best_of_explicit_forwards(small, name, spec) -> None:
    source, batches = source_of(small, name), correlated(small)
    model = calibrated(source, batches, activation=None, weight=SPECS[spec])
    stub, weight = model.tap(UsePoint("/y", 1)), model.stored("w").detach()
    wanted = output(qwrap.load(source), batches)
    before, errors, scales = stub.qparams, [], []
    low, high = choose_weight_range(weight, stub.spec, "minmax")
    for number in range(1, 21):
        stub.set_qparams(choose_qparams(low * number / 20, high * number / 20, stub.spec))
        errors.append(by_scale(output(model, batches) - wanted, name))
        scales.append(stub.scale.clone())
    stub.set_qparams(before)
    sequential_mse(model, batches, progress=False)
    found = by_scale(output(model, batches) - wanted, name)
    best = torch.stack(errors).min(0)
    # Sums of float32 products: what is as good to 1e-4 may be taken for better.
    torch.testing.assert_close(found, best.values, rtol=1e-4, atol=0)
    # A scale that is trained is what its parameter stands for, to the last bit or two.
    same = torch.isclose(stub.scale, torch.stack(scales).gather(0, best.indices[None])[0])
    close = torch.stack(errors).sort(0).values
    assert (same | (close[1] < close[0] * (1 + 1e-4))).all()


@pytest.mark.parametrize("loss", ["mse", "sqnr"])
def test_one_scale_for_all_takes_the_best_sum(small, loss) -> None:
    source, batches = source_of(small, "Gemm"), correlated(small)
    model = calibrated(source, batches, activation=None, weight="int4", per_channel=False)
    stub, weight = model.tap(UsePoint("/y", 1)), model.stored("w").detach()
    wanted = output(qwrap.load(source), batches)
    power = (wanted - model.stored("b").double().detach()).square().sum(0)
    before, errors = stub.qparams, []
    low, high = choose_weight_range(weight, stub.spec, "minmax")
    tried = [choose_qparams(low * n / 20, high * n / 20, stub.spec) for n in range(1, 21)]
    for qparams in tried:
        stub.set_qparams(qparams)
        error = (output(model, batches) - wanted).square().sum(0)
        errors.append(float((error / power if loss == "sqnr" else error).sum()))
    stub.set_qparams(before)
    sequential_mse(model, batches, loss=loss, progress=False)
    torch.testing.assert_close(stub.scale, tried[int(np.argmin(errors))].scale)


@pytest.mark.parametrize("name", ["Conv", "Gemm", "Gemm transB", "MatMul"])
def test_each_block_is_chosen_with_the_others_as_they_are(small, name) -> None:
    source, batches = source_of(small, name), correlated(small)
    spec = QuantSpec(dtype="int4", block_size=2)
    model = calibrated(source, batches, activation=None, weight=spec)
    wanted = output(qwrap.load(source), batches)
    stub, weight = model.tap(UsePoint("/y", 1)), model.stored("w").detach()
    before = float((output(model, batches) - wanted).square().sum())
    assert sequential_mse(model, batches, progress=False)
    after = float((output(model, batches) - wanted).square().sum())
    assert after < 0.8 * before
    # The last block of all was chosen with all others as they are now: no other scale is better.
    low, high = choose_weight_range(weight, stub.spec, "minmax")
    last = tuple(torch.tensor(stub.scale.shape) - 1)
    for number in range(1, 21):
        qparams = choose_qparams(low * number / 20, high * number / 20, stub.spec)
        kept = stub.initial_scale[last].clone()
        stub.initial_scale[last] = qparams.scale[last]
        error = float((output(model, batches) - wanted).square().sum())
        stub.initial_scale[last] = kept
        assert error > after * (1 - 1e-4)


def test_it_learns_behind_the_quantized_prefix_or_the_float_one(small) -> None:
    nodes = "a = Mul(x, s) c = Conv(a, v) d = Conv(c, w) y = Relu(d)"
    weights = {"s": np.float32([2]), "v": (3, 3, 1, 1), "w": (4, 3, 1, 1)}
    source, batches = small.build(nodes, weights), correlated(small, 2)
    found = {}
    for inputs in ("quantized", "float"):
        model = calibrated(source, batches, weight="int2")
        sequential_mse(model, batches, inputs=inputs, progress=False)
        assert {tap.mode for tap in map(model.tap, model.attached)} == {"quantize"}
        found[inputs] = model.tap(UsePoint("/d", 1)).scale.clone()
    assert not torch.equal(*found.values())


def test_biases_still_fit_their_codes(small) -> None:
    weights = {"w": (4, 3, 3, 3), "b": np.full(4, 3e5, np.float32)}
    batches = [b * np.float32(1e-6) for b in correlated(small, 2)]
    model = calibrated(small.build("y = Conv(x, w, b)", weights), batches, weight="int4")
    sequential_mse(model, batches, progress=False)
    weight, bias = (model.tap(UsePoint("/y", index)) for index in (1, 2))
    assert (model.stored("b").abs() / bias.scale <= LARGEST_BIAS * (1 + 1e-6)).all()
    assert weight.scale.isfinite().all()


def test_one_weight_in_two_layers_gets_the_scale_for_both(small) -> None:
    nodes = "n = Neg(x) a = Conv(x, w) c = Conv(n, w) y = Concat<axis=1>(a, c)"
    source, batches = small.build(nodes, {"w": (4, 3, 3, 3)}), correlated(small)
    both = calibrated(source, batches, activation=None, weight="int4")
    alone = calibrated(small.build("y = Conv(x, w)", {"w": (4, 3, 3, 3)}), batches, weight="int4",
                       activation=None)  # fmt: skip
    sequential_mse(both, batches, progress=False)
    sequential_mse(alone, batches, progress=False)
    scales = [both.tap(UsePoint(node, 1)).scale for node in ("/a", "/c")]
    assert torch.equal(*scales)
    # Products of two inputs are the same with both signs.
    assert torch.equal(scales[0], alone.tap(UsePoint("/y", 1)).scale)


def test_scales_that_were_given_stay(small) -> None:
    source, batches = small.convs(), correlated(small, 2)
    config = qwrap.QConfig(scope="kernels", weight="int4")
    config.set("w1", scale=0.25, zero_point=0)
    model = qwrap.load(source).eval()
    qwrap.prepare(model, config)
    qwrap.calibrate(model, batches, progress=False)
    outcome = sequential_mse(model, batches, progress=False)
    assert outcome.details[1:] == ("'w1' has the scale or range that it was given",)
    assert torch.allclose(model.tap(UsePoint("/a", 1)).scale, torch.tensor(0.25))


def test_what_does_not_help_is_taken_back_bit_for_bit(small) -> None:
    """What the first batch teaches is the opposite of what the second one needs."""
    weight = np.float32([[4, 0.6, 0.7], [2, 0.7, 0.6]])
    source = small.build("y = MatMul(x, w)", {"w": weight.T}, "float[N,3] x", "float[N,M] y")
    small_ones, large_one = np.float32([[0, 1, 1]]), np.float32([[5, 0.1, 0]])
    batches = [small_ones, large_one]
    model = calibrated(source, batches, weight="int4", activation=None)
    model.train()
    before, random = state(model), torch.random.get_rng_state()
    outcome = sequential_mse(model, batches, progress=False)
    assert not outcome
    assert outcome.after > outcome.before
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), random)
    assert sequential_mse(model, [small_ones], progress=False), "the first batch alone keeps it"


def test_the_same_batches_give_the_same_bits(small) -> None:
    batches, found = correlated(small, 4), []
    for _ in range(2):
        model = calibrated(small.convs(), batches, weight="int4")
        sequential_mse(model, batches, progress=False)
        found.append(state(model))
    assert all(torch.equal(a, b) for a, b in zip(*map(dict.values, found), strict=True))


def test_it_refuses_what_it_cannot_work_with(small) -> None:
    batches = small.batches()
    model = calibrated(small.convs(), batches)
    with pytest.raises(InputError, match="no batches"):
        sequential_mse(model, [])
    for option in ({"candidates": 0}, {"inputs": "any"}, {"loss": "l2"}):
        with pytest.raises(ConfigError, match="expected 1 or more"):
            sequential_mse(model, batches, **option)
    bare = qwrap.load(small.convs()).eval()
    with pytest.raises(ConfigError, match="not prepared"):
        sequential_mse(bare, batches)
    qwrap.prepare(bare, qwrap.QConfig(scope="kernels"))
    with pytest.raises(NotCalibratedError, match="no scale yet"):
        sequential_mse(bare, batches)


@pytest.mark.parametrize(
    ("name", "samples"), [("resnet20_cifar10", 32), ("squeezenet1_0_imagenet", 8)]
)
def test_networks_at_4_bits_lose_error_that_they_were_not_taught_on(
    shared_model, name, samples
) -> None:
    model, batches = shared_model(name, samples, weight="int4", weight_method="minmax")
    outcome = sequential_mse(model, batches, progress=False)
    assert outcome
    assert outcome.after < 0.7 * outcome.before
