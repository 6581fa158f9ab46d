import copy
import io
import weakref

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader

import qwrap
from qwrap.errors import ConfigError, InputError, NotCalibratedError
from qwrap.model.points import UsePoint, ValuePoint


def prepared(source, **settings):
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", **settings))
    return model


def scales(model):
    return {
        (p.value if isinstance(p, ValuePoint) else (p.node, p.index)): (
            model.tap(p).scale.clone(),
            getattr(model.tap(p), "zero_point", None),
        )
        for p in model.attached
    }


def calibrated(source, batches, **settings):
    model = prepared(source, **settings)
    qwrap.calibrate(model, batches, progress=False)
    return model


def assert_same_scales(a, b) -> None:
    first, second = scales(a), scales(b)
    assert first.keys() == second.keys()
    for key, (scale, _) in first.items():
        assert torch.equal(scale, second[key][0]), key


class Reader(CalibrationDataReader):
    def __init__(self, batches) -> None:
        self.batches = iter(batches)

    def get_next(self):
        return next(({"x": b} for b in self.batches), None)


KINDS = {
    "arrays": lambda b: b,
    "tensors": lambda b: [torch.from_numpy(x) for x in b],
    "tuples with labels": lambda b: [(x, np.zeros(2)) for x in b],
    "mappings": lambda b: [{"x": x} for x in b],
    "generator": iter,
    "reader": Reader,
    "loader": lambda b: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.from_numpy(np.concatenate(b)), torch.zeros(6)), 2
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_batches_gives_the_same_scales(small, kind: str) -> None:
    expected = calibrated(small.convs(), small.batches())
    assert_same_scales(calibrated(small.convs(), KINDS[kind](small.batches())), expected)


def test_the_scale_of_an_input_is_its_range_over_255(small) -> None:
    batches = small.batches()
    model = calibrated(small.convs(), batches, method="minmax")
    low, high = (float(f(batches)) for f in (np.min, np.max))
    stub = model.tap(ValuePoint("x"))
    np.testing.assert_allclose(stub.scale, (high - low) / 255, rtol=1e-6)  # float32 of float64
    assert int(stub.zero_point) == round(-low / float(stub.scale))


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_scales_depend_neither_on_order_nor_on_size_of_batches(small, method: str) -> None:
    batches = small.batches(4, (2, 3, 20, 20))  # long enough to be sampled
    expected = calibrated(small.convs(), batches, method=method)
    assert_same_scales(calibrated(small.convs(), batches[::-1], method=method), expected)
    # One batch may be summed in another order than four: scales agree to float32 rounding.
    whole = calibrated(small.convs(), [np.concatenate(batches)], method=method)
    for key, (scale, _) in scales(expected).items():
        torch.testing.assert_close(scales(whole)[key][0], scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_with_values_that_are_not_finite_is_refused(small, value: float) -> None:
    batches = small.batches()
    batches[1][0, 0, 0, 0] = value
    model = prepared(small.convs())
    with pytest.raises(InputError, match=r"batch 1: input 'x': 1 of 384 values are NaN"):
        qwrap.calibrate(model, batches, progress=False)
    assert_float(model)


def assert_float(model) -> None:
    """The model computes what the float model does, and cannot be exported."""
    program = model.program
    assert all(getattr(tap, "mode", "float") == "float" for tap in program.taps.values())
    with pytest.raises(NotCalibratedError, match="has no scale yet"):
        qwrap.export(model, "never.onnx")
    with pytest.raises(NotCalibratedError, match="has no scale yet"), qwrap.exact(model):
        pass


def test_no_batches_are_refused(small) -> None:
    model = prepared(small.convs())
    with pytest.raises(InputError, match="no batches"):
        qwrap.calibrate(model, [], progress=False)
    assert_float(model)


def test_an_empty_calibration_loop_is_refused(small) -> None:
    model = prepared(small.convs())
    with pytest.raises(NotCalibratedError, match="no data ran"), qwrap.calibrating(model):
        pass
    assert_float(model)


def test_a_model_that_is_not_prepared_is_refused(small) -> None:
    with pytest.raises(ConfigError, match="not prepared"):
        qwrap.calibrate(qwrap.load(small.convs()), small.batches(), progress=False)


def test_an_interrupted_calibration_leaves_the_model_float(small) -> None:
    model = calibrated(small.convs(), small.batches())

    def interrupted():
        yield small.batches()[0] * 100
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qwrap.calibrate(model, interrupted(), progress=False)
    assert_float(model)
    x = torch.from_numpy(small.batches()[0])
    torch.testing.assert_close(model(x), qwrap.load(small.convs())(x), rtol=0, atol=0)
    qwrap.calibrate(model, small.batches(), progress=False)  # nothing of the wide batch is left
    assert_same_scales(model, calibrated(small.convs(), small.batches()))


def test_calibrating_again_starts_afresh(small) -> None:
    model = calibrated(small.convs(), [b * 50 for b in small.batches()])
    qwrap.calibrate(model, small.batches(), progress=False)
    assert_same_scales(model, calibrated(small.convs(), small.batches()))


def test_the_users_own_loop_calibrates_too(small) -> None:
    model = prepared(small.convs())
    with qwrap.calibrating(model):
        for batch in small.batches():
            model(torch.from_numpy(batch))
    assert_same_scales(model, calibrated(small.convs(), small.batches()))


@pytest.mark.parametrize("value", [0.0, 1.5, -2.0])
def test_a_constant_tensor_gets_a_scale_and_runs_exactly(small, quantized, value: float) -> None:
    result = quantized(small.convs(), [np.full((2, 3, 8, 8), value, np.float32)])
    report = result.verify()
    assert report.deployed.differing == report.specification.differing == 0
    stub = result.model.tap(ValuePoint("x"))
    on_grid = (round(value / float(stub.scale))) * float(stub.scale)
    assert on_grid == pytest.approx(value, rel=1e-6)


def test_a_layer_of_zeros_runs_exactly(small, quantized) -> None:
    source = small.convs()
    zeros = np.zeros((6, 3, 3, 3), np.float32)
    source.graph.initializer[0].CopyFrom(qwrap_tensor(zeros, "w1"))
    report = quantized(source).verify()
    assert report.deployed.differing == 0


def qwrap_tensor(array, name):
    return onnx.numpy_helper.from_array(array, name)


def test_a_bias_beyond_int32_gets_a_wider_weight_scale(small, quantized) -> None:
    weights = {"w1": (6, 3, 3, 3), "b1": np.full(6, 3e4, np.float32), "w2": (4, 6, 3, 3)}
    weights["w1"] = np.full((6, 3, 3, 3), 1e-9, np.float32)
    nodes = "a = Conv(x, w1, b1) b = Relu(a) y = Conv(b, w2)"
    result = quantized(small.build(nodes, weights))
    scale = result.model.tap(UsePoint("/a", 1)).scale * result.model.tap(ValuePoint("x")).scale
    assert (3e4 / scale <= 2**30 * (1 + 1e-6)).all()
    assert result.verify().deployed.differing == 0


def test_memory_does_not_grow_with_batches(small, monkeypatch) -> None:
    model = prepared(small.convs())
    live: list[weakref.ref] = []
    peaks: list[int] = []
    forward = type(model).forward

    def counted(self, *args, **kwargs):
        result = forward(self, *args, **kwargs)
        live.extend(weakref.ref(t) for t in (*args, *kwargs.values(), result))
        peaks.append(sum(r() is not None for r in live))
        return result

    monkeypatch.setattr(type(model), "forward", counted)
    qwrap.calibrate(model, (b for b in small.batches(20)), progress=False)
    assert len(peaks) == 20
    assert max(peaks[2:]) <= max(peaks[:2])


def test_the_training_mode_of_every_module_is_restored(small) -> None:
    model = prepared(small.convs())
    model.train()
    tap = model.tap(ValuePoint("x"))
    tap.eval()
    qwrap.calibrate(model, small.batches(), progress=False)
    assert not tap.training
    assert model.training
    assert model.tap(ValuePoint("y")).training


def test_buffers_keep_their_identity(small) -> None:
    model = prepared(small.convs())
    before = dict(model.named_buffers())
    qwrap.calibrate(model, small.batches(), progress=False)
    after = dict(model.named_buffers())
    assert before.keys() == after.keys()
    assert all(after[name] is buffer for name, buffer in before.items())


@pytest.mark.parametrize("method", ["mse", "minmax", "percentile"])
def test_a_state_dict_carries_the_calibration(small, tmp_path, method: str) -> None:
    model = calibrated(small.convs(), small.batches(), method=method)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = prepared(small.convs(), method=method)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.from_numpy(small.batches()[0])
    assert torch.equal(model(x), other(x))
    with qwrap.exact(model), qwrap.exact(other):
        assert torch.equal(model(x), other(x))
    for m, name in ((model, "a"), (other, "b")):
        qwrap.export(m, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_copy_of_a_calibrated_model_is_independent(small) -> None:
    model = calibrated(small.convs(), small.batches())
    x = torch.from_numpy(small.batches()[0])
    with qwrap.exact(model):
        expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with qwrap.exact(other):
            assert torch.equal(other(x), expected)
        with torch.no_grad():
            other.stored("w1").zero_()
        with qwrap.exact(other):
            assert not torch.equal(other(x), expected)
        with qwrap.exact(model):
            assert torch.equal(model(x), expected)


ATTENTION = (
    "q = MatMul(x, wq) k0 = MatMul(x, wk) k = Transpose<perm=[0,2,1]>(k0) a = MatMul(q, k) "
    "b = Add(a, m) s = Softmax<axis=-1>(b) v = MatMul(x, wv) c = MatMul(s, v) y = MatMul(c, wo)"
)


@pytest.mark.parametrize("mask", [-3.4e38, -np.inf])
def test_an_attention_mask_stretches_no_range(small, quantized, mask: float) -> None:
    rng = np.random.default_rng(5)
    # Scores of a few units: with larger ones the Softmax is a switch that one code may throw.
    weights = {f"w{n}": rng.normal(0, 0.1, (32, 32)).astype(np.float32) for n in "qkvo"}
    weights["m"] = np.where(np.tri(5, dtype=bool), 0, mask).astype(np.float32)
    source = small.build(ATTENTION, weights, "float[N,5,32] x", "float[N,5,32] y")
    batches = small.batches(shape=(2, 5, 32))
    # This softmax magnifies what clipping costs; the extremes show whether the mask is left out.
    result = quantized(source, batches, qwrap.QConfig(scope="kernels", method="minmax"))
    for key, (scale, _) in scales(result.model).items():
        assert (scale < 1).all(), key  # the largest value is about 10: 10 / 255
    (expected,) = onnxruntime.InferenceSession(source.SerializeToString()).run(
        None, {"x": batches[0]}
    )
    (found,) = small.run(result.path, batches[0])
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert result.verify().deployed.worst_step <= 1


def test_what_works_on_masks_is_float_with_the_reason(small) -> None:
    nodes = "a = Conv(x, w) b = Add(a, m) d = Max(b, z) y = Conv(d, v)"
    weights = {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1), "z": np.full(1, -9, np.float32)}
    mask = np.zeros((8, 8), np.float32)
    mask[0] = -3.4e38
    nodes = "a = Conv(x, w) b = Add(a, m) c = Mul(b, o) d = Max(c, z) y = Conv(d, v)"
    weights |= {"m": mask, "o": np.ones((6, 1, 1), np.float32)}
    model = calibrated(small.build(nodes, weights), small.batches())
    plan = model.plan
    assert {plan.nodes[k].role for k in ("/a", "/y")} == {"integer"}
    assert {plan.nodes[k].role for k in ("/b", "/c")} == {"float"}


def test_the_summary_says_how_many_values_of_which_tensor_were_not_finite(small) -> None:
    weights = {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1)}
    source = small.build("a = Conv(x, w) b = Sqrt(a) y = Conv(b, v)", weights)
    batches = small.batches()
    model = calibrated(source, batches)
    w = onnx.numpy_helper.to_array(source.graph.initializer[0])[:, :, 0, 0]
    negative = sum((np.einsum("oc,nchw->nohw", w, batch) < 0).sum() for batch in batches)
    reason = f"works on {negative} values that are NaN or infinite (tensor 'b')"
    assert model.plan.nodes["/y"].reason == reason
    assert f"Conv: {reason} [/y]" in model.plan.summary()


def test_a_mask_between_integers_leaves_its_neighbours_float(small) -> None:
    mask = np.where(np.arange(8) < 2, -3.4e38, 0).astype(np.float32)
    nodes = "a = Conv(x, w) b = Add(a, m) c = Softmax<axis=3>(b) y = Conv(c, v)"
    weights = {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1), "m": mask}
    model = calibrated(small.build(nodes, weights), small.batches())
    plan = model.plan
    assert {plan.nodes[k].role for k in ("/a", "/y")} == {"integer"}
    assert {plan.nodes[k].role for k in ("/b", "/c")} == {"float"}
    assert "mask values" in plan.nodes["/b"].reason


def test_a_tensor_that_loses_its_source_keeps_what_was_observed(small) -> None:
    """The Add goes for its mask; what Slice moved out of it is still known to be small."""
    mask = np.zeros((8, 8), np.float32)
    nodes = "a = Conv(x, w) b = Where(m, a, c) d = Slice(b, s, e, i) y = Conv(d, v)"
    mask = np.arange(8).reshape(8, 1) < 2
    weights = {
        "w": (6, 3, 1, 1),
        "v": (4, 6, 1, 1),
        "c": (6, 8, 8),
        "m": mask,
        "s": np.array([1]),
        "e": np.array([7]),
        "i": np.array([2]),
    }
    config = {"excluded": ["Where"]}
    model = calibrated(small.build(nodes, weights), small.batches(), **config)
    assert model.plan.nodes["/y"].role == "integer"
    assert model.plan.tensors["d"].source == "d"


def test_a_branch_that_no_data_reaches_stays_float(small, quantized) -> None:
    nodes = (
        "a = Conv(x, w) m = ReduceMean<keepdims=0>(x) g = Greater(m, z) "
        "r = If (g) <then_branch = t () => (float[N,4,8,8] p) { p = Conv(a, v) }, "
        "else_branch = e () => (float[N,4,8,8] q) { q = Conv(a, u) }> "
        "y = Relu(r)"
    )
    weights = {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1), "u": (4, 6, 1, 1)}
    source = small.build(nodes, weights | {"z": np.array(1e9, np.float32)})
    result = quantized(source)
    plan = result.model.plan
    other = prepared(source)
    other.load_state_dict(result.model.state_dict())  # the placement travels with it
    assert other.plan.nodes == plan.nodes
    x = torch.from_numpy(small.batches()[0])
    assert torch.equal(other(x), result.model(x))
    assert plan.nodes["/q"].role == "integer"
    assert plan.nodes["/p"].role == "float"
    assert "no calibration data reached it (tensor" in plan.nodes["/p"].reason
    assert result.verify().deployed.differing == 0
    found = result.operators()
    assert found["QLinearConv"] == 2, found
