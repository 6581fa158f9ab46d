"""Method "auto" does at least as well as every single method on the samples it decides on."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import qwrap
from qwrap.config import METHODS
from qwrap.model.points import ValuePoint

# Three layers, so that there is something to mix.
NODES = (
    "a = Conv<pads=[1,1,1,1]>(x, w1) b = Relu(a) c = Conv<pads=[1,1,1,1]>(b, w2) d = Relu(c) "
    "y = Conv(d, w3)"
)
WEIGHTS = {"w1": (6, 3, 3, 3), "w2": (6, 6, 3, 3), "w3": (4, 6, 1, 1)}


def heavy_tailed(count: int = 4, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_t(2.5, (2, 3, 8, 8)).astype(np.float32) for _ in range(count)]


def calibrated(source, batches, **settings):
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", activation="uint4", **settings))
    qwrap.calibrate(model, batches, progress=False)
    return model


@torch.no_grad()
def mean_log_error(model, source, batches) -> float:
    """Logarithm of each sample's relative output error, averaged."""
    reference, x = qwrap.load(source).eval(), torch.from_numpy(np.concatenate(batches))
    wanted = reference(x)
    error, power = (e.double().square().sum((1, 2, 3)) for e in (model(x) - wanted, wanted))
    return float((error / power).log().mean())


def scales(model) -> dict[str, float]:
    points = (p for p in model.attached if isinstance(p, ValuePoint))
    return {p.value: float(model.tap(p).scale) for p in points}


@pytest.mark.parametrize("seed", range(4))
def test_no_single_method_is_better_on_the_samples(small, seed: int) -> None:
    source, batches = small.build(NODES, WEIGHTS), heavy_tailed(seed=seed)
    model = calibrated(source, batches, method="auto")
    found = mean_log_error(model, source, batches)
    for method in METHODS:
        qwrap.rescale(model, method=method)
        # ranges within 1 % of each other are tried once
        assert found <= mean_log_error(model, source, batches) + 0.02, method


def test_tensors_of_unlike_needs_take_unlike_methods(small) -> None:
    """Outliers of x meet weights of zero, those of z large ones: no single method suits both."""
    (ignored, (x,)), (decisive, (z,)) = outlier_in_a_channel(0.0), outlier_in_a_channel(10.0)
    source = small.build(
        "a = Conv(x, v) b = Conv(z, w) y = Add(a, b)",
        {"v": ignored["w"] * 10, "w": decisive["w"]},
        inputs="float[N,3,8,8] x, float[N,3,8,8] z",
    )
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", method="auto"))
    qwrap.calibrate(model, [(x, z)], progress=False)
    found = scales(model)
    assert found["x"] < 30 / 255 < 40 / 255 < found["z"]


def outlier_in_a_channel(weight: float) -> tuple[dict, list[np.ndarray]]:
    """A value of channel 0 is far from all others; the layer gives the channel ``weight``."""
    batches = [np.random.default_rng(0).normal(0, 1, (4, 3, 8, 8)).astype(np.float32)]
    batches[0][:, 0, 0, 0] = 50
    matrix = np.random.default_rng(1).normal(0, 1, (4, 3, 1, 1)).astype(np.float32)
    matrix[:, 0] *= weight
    return {"w": matrix}, batches


def test_an_outlier_counts_as_much_as_its_reader_lets_it(small) -> None:
    for weight, cut in ((0.0, True), (10.0, False)):
        weights, batches = outlier_in_a_channel(weight)
        model = calibrated(small.build("y = Conv(x, w)", weights), batches, method="auto")
        assert (scales(model)["x"] * 15 < 30) == cut, weight


def test_one_tensor_can_be_automatic_among_others_that_are_not(small) -> None:
    source, batches = small.build(NODES, WEIGHTS), heavy_tailed()
    config = qwrap.QConfig(scope="kernels", activation="uint4", method="minmax")
    config.set("b", method="auto")
    model = qwrap.load(source).eval()
    qwrap.prepare(model, config)
    qwrap.calibrate(model, batches, progress=False)
    assert model.plan.methods.keys() == {"b"}
    plain = scales(calibrated(source, batches, method="minmax"))
    assert {k for k, s in scales(model).items() if s != plain[k]} <= {"b"}


def test_a_tensor_that_nothing_computes_on_falls_back_to_least_squares(small) -> None:
    source, batches = small.build("y = Conv(x, w)", {"w": (4, 3, 1, 1)}), heavy_tailed()
    model = calibrated(source, batches, method="auto")
    assert model.plan.methods["y"] in METHODS
    assert "auto: " in model.plan.summary()
    qwrap.rescale(model, method="mse")
    assert model.plan.methods == {}
    assert "auto: " not in model.plan.summary()


def test_the_same_is_chosen_each_time_and_later_as_at_once(small) -> None:
    source, batches = small.build(NODES, WEIGHTS), heavy_tailed()
    first = calibrated(source, batches, method="auto")
    later = calibrated(source, batches, method="mse")
    qwrap.rescale(later, method="auto")
    assert scales(first) == scales(later)
    assert first.plan.methods == later.plan.methods


def test_biases_leave_no_trace_of_the_trials(small) -> None:
    """A bias that overflows enlarges the weight's scale, more so for narrow ranges."""
    weights = WEIGHTS | {"b1": np.full(6, 3e4, np.float32), "w1": np.full((6, 3, 3, 3), 1e-9)}
    source = small.build(NODES.replace("(x, w1)", "(x, w1, b1)"), weights)
    model = calibrated(source, heavy_tailed(), method="auto")
    chosen = dict(model.plan.methods)
    plain = qwrap.QConfig(scope="kernels", activation="uint4")
    for key, method in chosen.items():
        plain.set(key, method=method)
    other = qwrap.load(source).eval()
    qwrap.prepare(other, plain)
    qwrap.calibrate(other, heavy_tailed(), progress=False)
    for point in model.attached:
        assert torch.equal(model.tap(point).scale, other.tap(point).scale), point


# --- several processes ---------------------------------------------------------------------------


def decide_with_others(rank: int, world: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    state = torch.load(f"{folder}/state", weights_only=True)
    batches = torch.load(f"{folder}/batches", weights_only=True)
    model = qwrap.load(f"{folder}/model.onnx").eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", activation="uint4"))
    model.load_state_dict(state)
    samples = qwrap.quant.auto.samples.Samples(32)
    for batch in batches if rank == 1 else []:  # process 0 has none
        samples.take({"x": batch}, divisible=True)
    model.samples = samples
    qwrap.rescale(model, method="auto")
    torch.save({"scales": scales(model), "methods": model.plan.methods}, f"{folder}/{rank}")
    model = qwrap.load(f"{folder}/model.onnx").eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", activation="uint4", method="auto"))
    qwrap.calibrate(model, batches[2 * rank : 2 * rank + 2], progress=False)
    torch.save({"scales": scales(model), "methods": model.plan.methods}, f"{folder}/shares {rank}")
    dist.destroy_process_group()


def test_processes_decide_alike_and_as_one(small, tmp_path) -> None:
    source, batches = small.build(NODES, WEIGHTS), heavy_tailed()
    model = calibrated(source, batches, method="mse")
    (tmp_path / "model.onnx").write_bytes(source.SerializeToString())
    torch.save(model.state_dict(), tmp_path / "state")
    torch.save([torch.from_numpy(batch) for batch in batches], tmp_path / "batches")
    mp.spawn(decide_with_others, (2, str(tmp_path)), nprocs=2)
    qwrap.rescale(model, method="auto")
    for rank in range(2):
        found = torch.load(tmp_path / str(rank), weights_only=True)
        assert found == {"scales": scales(model), "methods": model.plan.methods}
    shares = [torch.load(tmp_path / f"shares {rank}", weights_only=True) for rank in range(2)]
    assert shares[0] == shares[1]
    assert shares[0]["methods"].keys() == model.plan.methods.keys()
