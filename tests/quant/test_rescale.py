"""Scales are chosen again without data: from what was observed, or from a table."""

import numpy as np
import pytest
import torch

import qwrap
from qwrap.errors import (
    ConfigError,
    NotCalibratedError,
    QwrapWarning,
    StatisticsError,
    TableError,
)
from qwrap.model.points import UsePoint, ValuePoint
from qwrap.quant.tables import RangeTable, TensorRange


def prepared(source, **settings):
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", **settings))
    return model


def calibrated(source, batches, **settings):
    model = prepared(source, **settings)
    qwrap.calibrate(model, batches, progress=False)
    return model


def scales(model):
    stubs = {str(point): model.tap(point) for point in model.attached}
    return {k: (s.scale.tolist(), s.qparams.zero_point.tolist()) for k, s in stubs.items()}


def number(model, tensor: str) -> tuple[float, int]:
    stub = model.tap(ValuePoint(tensor))
    return float(stub.scale), int(stub.zero_point)


# --- from the model's own observers --------------------------------------------------------------


@pytest.mark.parametrize("method", ["minmax", "ema", "percentile", "mse", "l1", "entropy"])
def test_another_method_needs_no_second_pass(small, method: str) -> None:
    model = calibrated(small.convs(), small.batches(), method="mse", percentile=97)
    qwrap.rescale(model, method=method)
    assert scales(model) == scales(
        calibrated(small.convs(), small.batches(), method=method, percentile=97)
    )
    assert model.config.method == method


def test_another_percentile_too_and_the_models_own_settings_are_the_default(small) -> None:
    model = calibrated(small.convs(), small.batches(), method="percentile", percentile=99)
    first = scales(model)
    qwrap.rescale(model, percentile=90)
    assert (model.config.method, model.config.percentile) == ("percentile", 90)
    expected = calibrated(small.convs(), small.batches(), method="percentile", percentile=90)
    assert scales(model) == scales(expected) != first
    qwrap.rescale(model)
    assert scales(model) == scales(expected)


def test_the_users_own_config_is_not_touched(small) -> None:
    config = qwrap.QConfig(scope="kernels")
    model = qwrap.load(small.convs()).eval()
    qwrap.prepare(model, config)
    qwrap.calibrate(model, small.batches(), progress=False)
    qwrap.rescale(model, method="minmax")
    assert config.method == "mse"


def test_trained_weights_are_measured_anew(small) -> None:
    model = calibrated(small.convs(), small.batches())
    with torch.no_grad():
        model.stored("w1").mul_(2)
    before = model.tap(UsePoint("/a", 1)).scale.clone()
    qwrap.rescale(model)
    assert torch.equal(model.tap(UsePoint("/a", 1)).scale, 2 * before)


def test_modules_keep_their_training_mode(small) -> None:
    model = calibrated(small.convs(), small.batches())
    model.train()
    qwrap.rescale(model)
    assert model.training
    assert model.tap(ValuePoint("x")).training


def test_without_data_or_table_there_is_nothing_to_choose_from(small) -> None:
    with pytest.raises(ConfigError, match="not prepared"):
        qwrap.rescale(qwrap.load(small.convs()))
    model = prepared(small.convs())
    with pytest.raises(NotCalibratedError, match=r"no data ran .* or give a table"):
        qwrap.rescale(model)
    assert model.tap(ValuePoint("x")).mode == "float"


def test_a_failure_leaves_the_model_as_it_was(small) -> None:
    model = calibrated(small.convs(), small.batches(), method="minmax")
    before = scales(model)
    with pytest.raises(ConfigError, match=r"tensor '.': method 'mse' needs a Histogram"):
        qwrap.rescale(model, method="mse")
    with pytest.raises(ConfigError, match="method='best'"):
        qwrap.rescale(model, method="best")
    with pytest.raises(ConfigError, match="percentile=10"):
        qwrap.rescale(model, percentile=10)
    assert scales(model) == before
    assert model.config.method == "minmax"
    assert model.tap(ValuePoint("x")).mode == "quantize"


def test_a_failure_leaves_what_training_learned(small) -> None:
    model = calibrated(small.convs(), small.batches(), method="minmax")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01).add_(0.01)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kernels, x = dict(model.kernels), torch.from_numpy(small.batches()[0])
    expected = model(x)
    with pytest.raises(ConfigError, match=r"method 'mse' needs a Histogram"):
        qwrap.rescale(model, method="mse")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert kernels
    assert model.kernels == kernels
    assert torch.equal(model(x), expected)


# --- from statistics -----------------------------------------------------------------------------


def test_statistics_of_another_run_choose_as_if_the_model_had_seen_their_data(small) -> None:
    statistics = qwrap.Statistics.of(calibrated(small.convs(), small.batches()))
    model = prepared(small.convs())
    qwrap.rescale(model, statistics, method="percentile", percentile=95)
    wanted = calibrated(small.convs(), small.batches(), method="percentile", percentile=95)
    assert scales(model) == scales(wanted)
    qwrap.rescale(model, method="mse")  # its own observers know by now
    assert scales(model) == scales(calibrated(small.convs(), small.batches()))


def test_statistics_of_another_model_are_refused(small) -> None:
    nodes = "a = Conv(x, w) y = Conv(a, v)"
    other = small.build(nodes, {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1)})
    model = calibrated(small.convs(), small.batches())
    before = scales(model)
    with pytest.raises(StatisticsError, match="another model"):
        qwrap.rescale(model, qwrap.Statistics.of(calibrated(other, small.batches())))
    assert scales(model) == before


def test_what_statistics_bring_back_is_gone_again_after_a_failure(small) -> None:
    """No data reaches a branch; other statistics have data for it, but no samples."""
    nodes = (
        "a = Conv(x, w) m = ReduceMean<keepdims=0>(x) g = Greater(m, z) "
        "r = If (g) <then_branch = t () => (float[N,4,8,8] p) { p = Conv(a, v) }, "
        "else_branch = e () => (float[N,4,8,8] q) { q = Conv(a, u) }> "
        "y = Relu(r)"
    )
    weights = {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1), "u": (4, 6, 1, 1)}
    source = small.build(nodes, weights | {"z": np.array(5, np.float32)})
    both = calibrated(source, [small.batches()[0], small.batches()[0] + 100])
    assert {both.plan.nodes[key].role for key in ("/p", "/q")} == {"integer"}
    model = calibrated(source, small.batches(), kept_samples=0)
    before, placed = scales(model), model.plan
    assert placed.nodes["/p"].role == "float"
    with pytest.raises(NotCalibratedError, match="samples kept"):
        qwrap.rescale(model, qwrap.Statistics.of(both), method="auto")
    assert scales(model) == before
    assert model.plan is placed
    qwrap.rescale(model)  # from its own observers, as before
    assert scales(model) == before
    qwrap.rescale(model, qwrap.Statistics.of(both))
    assert scales(model) == scales(both)
    assert model.plan.nodes["/p"].role == "integer"


# --- from a table --------------------------------------------------------------------------------

RANGES = {"x": (-2.0, 3.0), "b": (0.0, 4.0), "y": (-5.0, 5.0)}


def table(**ranges) -> RangeTable:
    return RangeTable({name: TensorRange(*ends) for name, ends in ranges.items()})


def test_a_table_replaces_calibration(small, tmp_path) -> None:
    model = prepared(small.convs())
    qwrap.rescale(model, table(**RANGES))
    assert number(model, "x") == (np.float32(5 / 255), 102)
    assert number(model, "b") == (np.float32(4 / 255), 0)
    path = tmp_path / "small.onnx"
    qwrap.export(model, path)
    report = qwrap.verify(model, path, small.batches(), progress=False)
    assert report.deployed.differing == 0


def test_a_table_of_a_model_gives_another_one_its_scales(small, tmp_path) -> None:
    model = calibrated(small.convs(), small.batches(), method="percentile")
    other = prepared(small.convs())
    qwrap.rescale(other, RangeTable.of(model))
    assert scales(other) == scales(model)
    for each, name in ((model, "a"), (other, "b")):
        qwrap.export(each, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_scale_in_the_table_is_taken_as_it_is(small) -> None:
    entry = TensorRange(-10, 15.5, scale=0.1, zero_point=100, dtype=qwrap.dtypes.UINT8)
    model = prepared(small.convs())
    qwrap.rescale(model, RangeTable({**table(**RANGES), "x": entry}))
    assert number(model, "x") == (np.float32(0.1), 100)


def test_missing_tensors_are_one_error_that_lists_them(small) -> None:
    model = prepared(small.convs())
    with pytest.raises(NotCalibratedError, match=r"seen 2 of 3 tensors: 'b', 'x'; add them"):
        qwrap.rescale(model, table(y=(-5, 5)))
    assert model.tap(ValuePoint("y")).scale.isnan().all()


def test_what_a_table_lacks_comes_from_the_models_own_observers(small) -> None:
    model = calibrated(small.convs(), small.batches())
    before = number(model, "b")
    qwrap.rescale(model, table(x=(-2, 3)))
    assert number(model, "x")[0] == np.float32(5 / 255)
    assert number(model, "b") == before


def test_entries_that_fit_no_tensor_are_a_warning(small) -> None:
    extra = {"nowhere": (0, 1), "a": (-9, 9)}  # "a" is there, but not quantized
    with pytest.warns(QwrapWarning, match=r"^1 of 5 entries .*: 'nowhere'$"):
        qwrap.rescale(prepared(small.convs()), table(**RANGES, **extra))


def test_an_entry_of_a_moved_tensor_serves_its_source(small) -> None:
    nodes = "a = Conv(x, w) b = MaxPool<kernel_shape=[2,2]>(a) y = Conv(b, v)"
    model = prepared(small.build(nodes, {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1)}))
    qwrap.rescale(model, table(x=(-2, 3), b=(-1, 1), y=(-5, 5)))
    assert number(model, "a")[0] == np.float32(2 / 255)


def test_an_entry_of_a_weight_sets_its_scales(small) -> None:
    channels = np.arange(1, 7, dtype=np.float32)
    entry = TensorRange(-channels, channels, axis=0, stored=True)
    model = prepared(small.convs())
    qwrap.rescale(model, RangeTable({**table(**RANGES), "w1": entry}))
    torch.testing.assert_close(
        model.tap(UsePoint("/a", 1)).scale, torch.from_numpy(channels) / 127, rtol=1e-7, atol=0
    )


def test_an_entry_of_another_size_is_refused_by_name_and_changes_nothing(small) -> None:
    entry = TensorRange(-np.ones(5), np.ones(5), axis=0, stored=True)
    model = calibrated(small.convs(), small.batches())
    before = scales(model)
    with pytest.raises(TableError, match=r"tensor 'w1': holds 5 ranges; the tensor has 6"):
        qwrap.rescale(model, RangeTable({"x": TensorRange(-1, 1), "w1": entry}))
    assert scales(model) == before


def test_what_the_user_set_goes_before_the_table(small) -> None:
    config = qwrap.QConfig(scope="kernels")
    config.set("x", low=-1, high=1)
    model = qwrap.load(small.convs()).eval()
    qwrap.prepare(model, config)
    qwrap.rescale(model, table(**RANGES))
    assert number(model, "x")[0] == np.float32(2 / 255)


def test_a_range_below_an_absorbed_relus_zero_is_cut_to_it(small) -> None:
    model = prepared(small.convs())
    scaled = TensorRange(-4, 4, scale=8 / 255, zero_point=128, dtype=qwrap.dtypes.UINT8)
    for entry in (TensorRange(-4, 4), scaled):
        qwrap.rescale(model, RangeTable({**table(**RANGES), "b": entry}))
        assert number(model, "b") == (np.float32(4 / 255), 0)


@pytest.mark.parametrize("mask", [-3.4e38, np.nan])
def test_constants_that_hold_masks_stay_float_with_a_table_too(small, mask: float) -> None:
    nodes = "a = Conv(x, w) b = Add(a, m) c = Softmax<axis=3>(b) y = Conv(c, v)"
    array = np.where(np.arange(8) < 2, mask, 0).astype(np.float32)
    source = small.build(nodes, {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1), "m": array})
    model = prepared(source)
    qwrap.rescale(model, table(x=(-3, 3), a=(-2, 2), b=(-2, 2), y=(-2, 2), c=(0, 1)))
    assert model.plan.nodes["/b"].role == "float"
    assert model.plan.nodes["/y"].role == "integer"
