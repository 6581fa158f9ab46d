"""What a calibrated model goes through, and what the plan says of it."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import qwrap
from qwrap.errors import ConfigError, InputError, NotCalibratedError
from qwrap.improve.improve import EFFORTS, improve
from qwrap.model.points import ValuePoint


def calibrated(small, **settings):
    batches = small.batches(8, (4, 3, 8, 8))
    model = qwrap.load(small.convs()).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", **settings))
    qwrap.calibrate(model, batches, progress=False)
    return model, batches


def uneven(shape):
    """A weight whose output channels differ by up to a hundred."""
    rng = np.random.default_rng(1)
    scale = np.logspace(0, -2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return (scale * rng.normal(0, 0.3, shape)).astype(np.float32)


def error(model, source, batches) -> float:
    reference = qwrap.load(source)
    with torch.no_grad():
        pairs = [(model(x), reference(x)) for x in map(torch.from_numpy, batches)]
    return sum(float((y - wanted).square().sum()) for y, wanted in pairs)


def test_every_algorithm_is_in_the_summary_kept_or_undone(small) -> None:
    model, batches = calibrated(small, weight="int4")
    outcomes = improve(model, batches, progress=False)
    assert outcomes == model.plan.outcomes
    assert len(outcomes) == len(EFFORTS["default"])
    summary = model.plan.summary()
    for outcome in outcomes:
        label = "kept:     " if outcome.kept else "undone:   "
        assert f"{label} {outcome.algorithm}" in summary


def test_the_error_never_rises_and_each_begins_where_the_last_ended(small) -> None:
    model, batches = calibrated(small, weight="int4")
    outcomes = improve(model, batches, progress=False)
    for earlier, later in pairwise(outcomes):
        left = earlier.after if earlier.kept else earlier.before
        assert later.before == pytest.approx(left, rel=1e-6)  # the same sums, in float32
    assert all(o.after < o.before for o in outcomes if o.kept)


def test_more_effort_is_closer_on_other_data(small) -> None:
    source, other = small.convs(), small.batches(8, (4, 3, 8, 8), seed=9)
    errors = {}
    for effort in ("none", "default", "high"):
        model, batches = calibrated(small, weight="int2")
        improve(model, batches, effort=effort, progress=False)
        errors[effort] = error(model, source, other)
    assert errors["high"] <= errors["default"] < errors["none"]


def test_the_same_seed_gives_the_same_file(small, tmp_path) -> None:
    batches = small.batches(8, (4, 3, 8, 8))
    for name in ("a", "b"):
        torch.manual_seed(ord(name))  # must not matter
        qwrap.quantize(
            small.convs(),
            tmp_path / name,
            calibration=batches,
            config=qwrap.QConfig(scope="kernels", weight="int4"),
            effort="high",
            seed=3,
            progress=False,
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_effort_changes_nothing(small) -> None:
    model, batches = calibrated(small)
    before = {k: v.clone() for k, v in model.state_dict().items() if torch.is_tensor(v)}
    assert improve(model, batches, effort="none") == []
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_one_large_batch_is_divided_so_that_some_samples_decide(small) -> None:
    """The same samples in one batch, or one by one, come to the same."""
    batches = small.batches(1, (64, 3, 8, 8))
    found = []
    for data in (batches, [x[None] for x in batches[0]]):
        model = qwrap.load(small.convs()).eval()
        qwrap.prepare(model, qwrap.QConfig(scope="kernels", weight="int4"))
        qwrap.calibrate(model, data, progress=False)
        found.append(improve(model, data, progress=False))
    for one, many in zip(*found, strict=True):
        assert one.kept == many.kept
        assert one.before == pytest.approx(many.before, rel=1e-3)  # sums in another order


def test_a_model_that_stays_float_has_nothing_to_improve(small) -> None:
    model, batches = calibrated(small, excluded=["Conv"])
    assert improve(model, batches, progress=False) == []
    assert "held-back error" not in model.plan.summary()


@pytest.mark.parametrize("settings", [{"method": "percentile"}, {"keep_ranges": True}], ids=str)
def test_ranges_that_the_user_chose_are_left_alone(small, settings) -> None:
    keep = settings.pop("keep_ranges", False)
    model, batches = calibrated(small, **settings)
    found = improve(model, batches, keep_ranges=keep, progress=False)
    assert "range methods" not in {outcome.algorithm for outcome in found}
    assert model.plan.methods == {}


def test_what_equalizing_changed_is_observed_in_all_of_the_data(small, tmp_path) -> None:
    """The loud batch is not among those that stay in memory."""
    nodes = "a = Conv<pads=[1,1,1,1]>(x, w1, b1) b = Relu(a) y = Conv<pads=[1,1,1,1]>(b, w2, b2)"
    weights = {"w1": uneven((6, 3, 3, 3)), "b1": (6,), "w2": (4, 6, 3, 3), "b2": (4,)}
    source = small.build(nodes, weights)
    batches = [*small.batches(40, (4, 3, 8, 8)), *small.batches(1, (4, 3, 8, 8)) * 3]
    batches[-1] = 8 * batches[-1]
    seen = {}
    for kind in (list, iter):
        model = qwrap.quantize(
            source,
            tmp_path / "q.onnx",
            calibration=kind(batches),
            config=qwrap.QConfig(scope="kernels", per_channel=False, method="minmax"),
            progress=False,
        )
        assert any(
            o.algorithm == "cross-layer equalization" and o.kept for o in model.plan.outcomes
        )
        stub = model.tap(ValuePoint("x"))
        seen[kind] = float(stub.reach()[1])
    assert seen[list] > 4 * seen[iter]


@pytest.mark.parametrize("effort", ["default", "high"])
@pytest.mark.parametrize(
    "settings",
    [
        {"bn": "live"},
        {"activation": "uint16"},
        {"activation": None},
        {"weight": "float8e4m3fn"},
        {"weight": qwrap.QuantSpec(dtype="int4", block_size=3)},
        {"per_channel": False, "weight": "uint8"},
        {"training": "lsq+"},
        {"target": "tensorrt", "activation": "int8"},
    ],
    ids=str,
)
def test_every_kind_of_model_goes_through(small, tmp_path, effort, settings) -> None:
    model, batches = calibrated(small, **settings)
    before = error(model, small.convs(), batches)
    improve(model, batches, effort=effort, progress=False)
    assert error(model, small.convs(), batches) <= before * 1.05  # half of them decide
    qwrap.export(model, tmp_path / "q.onnx")


def test_it_refuses_what_it_cannot_work_with(small) -> None:
    model, batches = calibrated(small)
    with pytest.raises(ConfigError, match=r"effort='much': choose one of \('none', 'default', 'h"):
        improve(model, batches, effort="much")
    with pytest.raises(InputError, match="no batches"):
        improve(model, [])
    bare = qwrap.load(small.convs()).eval()
    with pytest.raises(ConfigError, match="not prepared"):
        improve(bare, batches)
    qwrap.prepare(bare, qwrap.QConfig(scope="kernels"))
    with pytest.raises(NotCalibratedError):
        improve(bare, batches)
