"""FlexRound on whole models: what it gains, what it leaves alone, how it goes back."""

import itertools

import numpy as np
import pytest
import torch
from onnx import numpy_helper

import qwrap
from qwrap.algorithms.flexround import flexround
from qwrap.errors import ConfigError, InputError, NotCalibratedError
from qwrap.model.points import UsePoint
from qwrap.numerics import fake_quantize
from qwrap.quant.auto.held_out import HeldOut, float_model
from qwrap.quant.prepare import plan_of, stub_at

W4 = qwrap.QConfig(weight="int4")


def calibrated(source, batches, config=W4):
    model = qwrap.load(source).eval()
    qwrap.prepare(model, config)
    qwrap.calibrate(model, batches, progress=False)
    return model


def state(model):
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


def is_unchanged(model, before):
    return all(map(torch.equal, state(model), before))


def on_grid(model):
    """Whether every weight that was learned is what its stub makes of it."""
    for use, constant in plan_of(model).constants.items():
        stub, weight = stub_at(model, UsePoint(*use)), model.stored(constant.value)
        if not torch.equal(fake_quantize(weight, stub.scale, stub.zero_point, stub.grid), weight):
            return False
    return True


def correlated(count=16, size=8, seed=0, mix=0.9):
    """Batches of vectors whose entries are nearly the same."""
    rng = np.random.default_rng(seed)
    common, own = rng.normal(size=(count, size, 1)), rng.normal(size=(count, size, 4))
    return [(mix * c + (1 - mix) * o).astype(np.float32) for c, o in zip(common, own, strict=True)]


def one_layer(small, weight):
    return small.build(
        "y = MatMul(x, w)", {"w": weight}, inputs="float[N,4] x", outputs="float[N,1] y"
    )


def test_a_tiny_layer_comes_near_the_best_of_all_roundings(small) -> None:
    weight, batches = np.array([[0.9], [0.12], [0.13], [0.11]], np.float32), correlated()
    config = qwrap.QConfig(
        activation="uint16", weight="int3", per_channel=False, weight_method="minmax"
    )
    model = calibrated(one_layer(small, weight), batches, config)
    use, constant = next(iter(plan_of(model).constants.items()))
    scale, stored = float(stub_at(model, UsePoint(*use)).scale), model.stored(constant.value)
    moments = sum(b.T @ b for b in batches)

    def error(found):  # of the outputs; the activations of 16 bits have next to none
        off = np.atleast_2d(found) - weight[:, 0]
        return np.einsum("ni,ij,nj->n", off, moments, off)

    best = error(scale * np.array([*itertools.product(range(-4, 4), repeat=4)])).min()
    (nearest,) = error(scale * np.round(weight[:, 0] / scale))
    assert best < 0.1 * nearest
    assert flexround(model, batches, iterations=300, lr=1e-2, progress=False).kept
    # It learns the scale too, so that it may even be better.
    assert error(stored.detach().numpy()[:, 0]) < best + 0.1 * (nearest - best)


# The image reader of the shared data leaves files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_beats_nearest_rounding_at_4_bits_on_a_real_network(shared_model) -> None:
    model, batches = shared_model("resnet20_cifar10", 56, weight="int4")
    unseen = HeldOut(model, [{k: torch.from_numpy(x) for k, x in b.items()} for b in batches[32:]])
    nearest = unseen.error()
    outcome = flexround(model, batches[:32], iterations=6, batch_size=12, progress=False)
    assert outcome.kept
    assert unseen.error() < 0.6 * nearest


def alike(shape, seed):
    """A batch whose entries are nearly the same in each sample, so that roundings have to agree."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(shape[0], *[1] * (len(shape) - 1)))
    return (common + 0.2 * rng.normal(size=shape)).astype(np.float32)


LAYERS = {
    "grouped": (
        "y = Conv<group=2, pads=[1,1,1,1], strides=[2,2]>(x, w, b)",
        {"w": (8, 2, 3, 3), "b": (8,)},
        "float[N,4,8,8] x",
    ),
    "depthwise": (
        "y = Conv<group=12, pads=[1,1,1,1]>(x, w, b)",
        {"w": (12, 1, 3, 3), "b": (12,)},
        "float[N,12,8,8] x",
    ),
    "one axis": ("y = Conv(x, w)", {"w": (12, 8, 3)}, "float[N,8,12] x"),
    "three axes": ("y = Conv(x, w)", {"w": (12, 8, 2, 2, 2)}, "float[N,8,4,4,4] x"),
    "transposed": (
        "y = ConvTranspose<group=2, strides=[2,2]>(x, w, b)",
        {"w": (8, 6, 3, 3), "b": (12,)},
        "float[N,8,6,6] x",
    ),
    "gemm": ("y = Gemm(x, w, b)", {"w": (48, 16), "b": (16,)}, "float[N,48] x"),
    "gemm, transB": ("y = Gemm<transB=1>(x, w, b)", {"w": (16, 48), "b": (16,)}, "float[N,48] x"),
    "gemm, transA": (
        "t = Transpose<perm=[1,0]>(x) y = Gemm<transA=1>(t, w)",
        {"w": (48, 16)},
        "float[N,48] x",
    ),
    "matmul": ("y = MatMul(x, w)", {"w": (48, 16)}, "float[N,7,48] x"),
}
KINDS = {
    "int4 by channel": {"weight": "int4", "per_channel": True},
    "int8 by tensor": {"weight": "int8", "per_channel": False},
    "uint4 asymmetric": {
        "weight": qwrap.QuantSpec(dtype="uint4", symmetric=False),
        "per_channel": True,
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_kind_of_layer_ends_on_its_grid_and_closer_to_float(small, layer, kind) -> None:
    nodes, weights, inputs = LAYERS[layer]
    rank = inputs.count(",") + 1
    output = f"float[{','.join('NMHWD'[:rank])}] y"
    source = small.build(nodes, weights, inputs=inputs, outputs=output)
    shape = [6, *(int(n) for n in inputs[len("float[N,") : inputs.index("]")].split(","))]
    batches = [alike(shape, seed) for seed in range(9)]
    model = calibrated(source, batches, qwrap.QConfig(scope="all", **KINDS[kind]))
    assert len(plan_of(model).constants) == 1
    outcome = flexround(model, batches, iterations=60, lr=3e-3, progress=False)
    assert outcome.after <= outcome.before
    assert not outcome.kept or on_grid(model)
    assert "int8" in kind or outcome.kept


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_a_weight_that_is_read_twice_stays_on_the_grid_of_both_readers(small, granularity) -> None:
    nodes = "a = MatMul(x, w) b = Relu(a) y = MatMul(b, w)"
    source = small.build(nodes, {"w": (48, 48)}, "float[N,48] x", "float[N,48] y")
    batches = [alike((6, 48), seed) for seed in range(9)]
    model = calibrated(source, batches, qwrap.QConfig(scope="all", weight="int4"))
    outcome = flexround(model, batches, granularity=granularity, iterations=40, progress=False)
    assert outcome.kept == (granularity == "block")
    assert not outcome.kept or on_grid(model)
    assert outcome.kept or "1 weights are shared by several units" in outcome.details


def test_weights_without_integer_codes_are_left_out_with_the_reason(small) -> None:
    nodes = "a = MatMul(x, w) b = Relu(a) y = MatMul(b, v)"
    source = small.build(nodes, {"w": (48, 32), "v": (32, 8)}, "float[N,48] x", "float[N,8] y")
    batches = [alike((6, 48), seed) for seed in range(9)]
    config = qwrap.QConfig(weight="float8e4m3fn", activation="float8e4m3fn", scope="all")
    outcome = flexround(calibrated(source, batches, config), batches, progress=False)
    assert not outcome.kept
    assert any("float8e4m3fn has no integer codes" in line for line in outcome.details)


def test_one_bias_for_all_channels_is_no_obstacle(small) -> None:
    source = small.build(
        "y = Gemm(x, w, b)", {"w": (48, 16), "b": (1,)}, "float[N,48] x", "float[N,16] y"
    )
    batches = [alike((6, 48), seed) for seed in range(9)]
    model = calibrated(source, batches, qwrap.QConfig(scope="all", weight="int4"))
    assert flexround(model, batches, iterations=40, learn_biases=True, progress=False).kept
    assert on_grid(model)


def test_a_bias_still_fits_in_32_bits(small) -> None:
    source = small.convs()
    bias = next(t for t in source.graph.initializer if t.name == "b1")
    bias.CopyFrom(numpy_helper.from_array(np.full(6, 3e5, np.float32), "b1"))
    batches = small.batches(9)
    model = calibrated(source, batches)
    flexround(model, batches, iterations=10, lr=0.1, progress=False)
    for (node, index), plan in plan_of(model).biases.items():
        codes = model.tap(UsePoint(node, index)).codes(model.stored(plan.value))
        assert codes.abs().max() <= 2**30 + 2**10  # products of float32 numbers


def test_it_goes_back_bit_for_bit_where_the_deciding_batches_lose(small) -> None:
    # What is learned from inputs that go together is wrong where they go against each other.
    weight = np.array([[0.9], [0.12], [0.13], [0.11]], np.float32)
    batches = correlated(mix=1.0)
    for batch in batches:
        batch[0] *= [1, -1, -1, 1]  # every eighth sample is held back
    model = calibrated(one_layer(small, weight), batches, qwrap.QConfig(weight="int3"))
    before, random = state(model), torch.get_rng_state()
    outcome = flexround(model, batches, iterations=50, lr=1e-2, progress=False)
    assert not outcome
    assert is_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert plan_of(model).outcomes[-1] is outcome


def test_it_repeats_with_the_seed_and_leaves_modes_and_random_numbers_alone(small) -> None:
    batches, results = small.batches(9), []
    for seed in (3, 3, 4):
        model = calibrated(small.convs(), batches)
        model.train()
        random = torch.get_rng_state()
        flexround(model, batches, iterations=20, batch_size=4, seed=seed, progress=False)
        assert torch.equal(torch.get_rng_state(), random)
        assert model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        results.append(state(model))
    assert all(map(torch.equal, results[0], results[1]))
    assert not all(map(torch.equal, results[0], results[2]))


def test_the_float_model_and_the_interface_stay(small) -> None:
    batches = small.batches(9)
    model = calibrated(small.convs(), batches)
    inputs = torch.from_numpy(batches[0])
    names, wanted = (model.input_names, model.output_names), float_model(model)(inputs)
    assert flexround(model, batches, iterations=10, progress=False)
    assert (model.input_names, model.output_names) == names
    assert torch.equal(float_model(model)(inputs), wanted)


def test_what_is_exported_is_what_was_learned(small, tmp_path) -> None:
    batches = small.batches(9)
    model = calibrated(small.convs(), batches, qwrap.QConfig())
    flexround(model, batches, iterations=10, progress=False)
    qwrap.export(model, tmp_path / "q.onnx")
    report = qwrap.verify(model, tmp_path / "q.onnx", batches, progress=False)
    assert report.differing_codes == 0


def test_one_batch_teaches_and_decides(small) -> None:
    batches = small.batches(1, (8, 3, 8, 8))
    model = calibrated(small.convs(), batches)
    assert flexround(model, batches, iterations=20, progress=False).kept


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"iterations": 0}, "iterations=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"drop": 1.5}, "drop=1.5"),
        ({"granularity": "net"}, "granularity='net'"),
    ],
)
def test_options_out_of_range_are_refused(small, option, message) -> None:
    model = calibrated(small.convs(), small.batches())
    with pytest.raises(ConfigError, match=message):
        flexround(model, small.batches(), progress=False, **option)


def test_it_needs_batches_and_a_calibrated_model(small) -> None:
    with pytest.raises(InputError, match="no batches"):
        flexround(calibrated(small.convs(), small.batches()), [])
    model = qwrap.load(small.convs())
    with pytest.raises(ConfigError, match="prepare"):
        flexround(model, small.batches())
    qwrap.prepare(model, W4)
    with pytest.raises(NotCalibratedError):
        flexround(model, small.batches(), progress=False)
