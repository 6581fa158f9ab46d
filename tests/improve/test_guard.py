"""The guard returns to float, or raises to 16 bits, the fewest layers that the outputs need."""

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

import qwrap
from qwrap.errors import ConfigError, InputError
from qwrap.improve.guard import guard
from qwrap.model.points import UsePoint, ValuePoint

NODES = """
    a = Conv<pads=[1,1,1,1]>(x, w1, b1) b = Relu(a)
    c = Conv<pads=[1,1,1,1]>(b, w2, b2) d = Relu(c)
    e = Conv<pads=[1,1,1,1]>(d, w3, b3) f = Relu(e)
    y = Conv<pads=[1,1,1,1]>(f, w4, b4)
"""
WEIGHTS = {f"w{i}": (6, 6, 3, 3) for i in range(1, 5)} | {f"b{i}": (6,) for i in range(1, 5)}
INPUTS = "float[N,6,8,8] x"


def calibrated(small, spoil=None, **settings):
    """Four convolutions; ``spoil`` makes their quantization bad."""
    source = small.build(NODES, WEIGHTS, INPUTS)
    batches = small.batches(6, (4, 6, 8, 8))
    config = qwrap.QConfig(**{"scope": "kernels", **settings})
    if spoil:
        spoil(config)
    model = qwrap.load(source).eval()
    qwrap.prepare(model, config)
    qwrap.calibrate(model, batches, progress=False)
    return source, model, batches


def coarse(*tensors):
    """Scales so large that little is left of these tensors."""

    def spoil(config) -> None:
        for tensor in tensors:
            config.set(tensor, scale=1.0, zero_point=0)

    return spoil


def sqnr(model, source, batches) -> float:
    """In dB, of the simulated outputs, beside those of onnx's reference."""
    opened = ReferenceEvaluator(source)
    wanted = np.concatenate([opened.run(None, {"x": b})[0] for b in batches])
    with torch.no_grad():
        found = torch.cat([model(torch.from_numpy(b)) for b in batches]).numpy()
    return 10 * np.log10(np.square(wanted).sum() / np.square(found - wanted).sum())


def test_one_layer_that_ruins_all_becomes_float(small, tmp_path) -> None:
    source, model, batches = calibrated(small, coarse("w2"))
    deciding = batches[1::2]
    before = sqnr(model, source, deciding)
    assert before < 15
    outcome = guard(model, batches, min_sqnr=25.0, progress=False)
    assert outcome.kept
    assert sqnr(model, source, deciding) >= 25
    assert model.plan.nodes["/c"].role == "float"
    assert [model.plan.nodes[k].role for k in ("/a", "/e", "/y")] == ["integer"] * 3
    assert "1 of 4 layers raised: /c to float32" in model.plan.summary()
    assert f"{before:.1f} dB to" in outcome.line()
    qwrap.export(model, tmp_path / "q.onnx")
    assert qwrap.verify(model, tmp_path / "q.onnx", batches, progress=False).deployed.differing == 0


def test_as_few_layers_are_raised_as_the_bound_needs(small) -> None:
    counts = []
    for bound in (5.0, 15.0, 25.0, 60.0):
        source, model, batches = calibrated(small, coarse("w1", "w2", "w3"))
        guard(model, batches, min_sqnr=bound, progress=False)
        assert sqnr(model, source, batches[1::2]) >= bound
        counts.append(sum(node.role == "float" for node in model.plan.nodes.values()))
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_a_bound_that_no_integers_reach_leaves_nothing_quantized(small) -> None:
    source, model, batches = calibrated(small)
    assert guard(model, batches, min_sqnr=200.0, progress=False)
    assert {node.role for node in model.plan.nodes.values()} == {"float"}
    with torch.no_grad():
        x = torch.from_numpy(batches[0])
        assert torch.equal(model(x), qwrap.load(source)(x))


def test_nothing_is_touched_where_the_bound_holds(small) -> None:
    _, model, batches = calibrated(small)
    before = {key: value for key, value in model.state_dict().items() if torch.is_tensor(value)}
    plan = model.plan.to_dict()
    outcome = guard(model, batches, min_sqnr=10.0, progress=False)
    assert not outcome
    assert outcome.line().endswith("dB hold the bound")
    assert model.plan.to_dict() == plan
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_what_stays_quantized_keeps_its_scales_and_codes(small) -> None:
    _, model, batches = calibrated(small, coarse("w2"), weight="int4")
    qwrap.round_weights(model, batches)
    kept = [UsePoint("/a", 1), UsePoint("/y", 1), ValuePoint("x"), ValuePoint("b")]
    scales = {point: model.tap(point).scale.clone() for point in kept}
    codes = {key: model.stored(key).clone() for key in ("w1", "w4")}
    # An odd scale, as learning would leave it; calibration would not choose it again.
    model.tap(ValuePoint("b")).initial_scale.mul_(1.01)
    scales[ValuePoint("b")] = model.tap(ValuePoint("b")).scale.clone()
    assert guard(model, batches, min_sqnr=15.0, progress=False)
    assert model.plan.nodes["/c"].role == "float"
    for point, scale in scales.items():
        if point in model.attached:
            assert torch.equal(model.tap(point).scale, scale), point
    for key, values in codes.items():
        if model.plan.nodes[{"w1": "/a", "w4": "/y"}[key]].role != "float":
            assert torch.equal(model.stored(key), values)


def test_weights_of_raised_layers_are_the_float_ones_again(small) -> None:
    source, model, batches = calibrated(small, coarse("w2"), weight="int4")
    with torch.no_grad():  # as an algorithm would have rounded them
        model.stored("w2").round_()
        model.stored("b2").add_(1)
    guard(model, batches, min_sqnr=15.0, progress=False)
    assert model.plan.nodes["/c"].role == "float"
    arrays = {t.name: numpy_helper.to_array(t) for t in source.graph.initializer}
    for key in ("w2", "b2"):
        np.testing.assert_array_equal(model.stored(key).detach().numpy(), arrays[key])


def on_qnn(small, spoil):
    source = small.build(NODES, WEIGHTS, INPUTS)
    batches = small.batches(6, (4, 6, 8, 8))
    config = qwrap.QConfig.for_target("qnn")
    spoil(config)
    model = qwrap.load(source).eval()
    qwrap.prepare(model, config)
    qwrap.calibrate(model, batches, progress=False)
    return source, model, batches


def test_accelerators_get_16_bits(small, tmp_path) -> None:
    # A range that 8 bits are too few for, and 16 are not.
    source, model, batches = on_qnn(small, lambda config: config.set("d", low=-999, high=999))
    outcome = guard(model, batches, min_sqnr=25.0, progress=False)
    assert outcome
    assert "to uint16/int8" in outcome.line()
    assert "float32" not in outcome.line()
    assert model.plan.nodes["/c"].dtype == "uint16"
    assert sqnr(model, source, batches[1::2]) >= 25
    qwrap.export(model, tmp_path / "q.onnx")


def test_accelerators_get_floats_where_16_bits_are_too_few(small) -> None:
    source, model, batches = on_qnn(small, coarse("d"))
    outcome = guard(model, batches, min_sqnr=30.0, progress=False)
    assert "to float32" in outcome.line()
    assert sqnr(model, source, batches[1::2]) >= 30


def test_ranges_from_a_table_are_enough(small) -> None:
    """Nothing was observed, so what is placed anew is calibrated on the batches."""
    source, calibrated_model, batches = calibrated(small, coarse("w2"))
    table = qwrap.RangeTable.of(calibrated_model)
    model = qwrap.load(source).eval()
    config = qwrap.QConfig(scope="kernels")
    coarse("w2")(config)
    qwrap.prepare(model, config)
    qwrap.rescale(model, table)
    assert guard(model, batches, min_sqnr=25.0, progress=False)
    assert sqnr(model, source, batches[1::2]) >= 25


def test_it_refuses_what_it_cannot_work_with(small) -> None:
    _, model, batches = calibrated(small)
    with pytest.raises(InputError, match="no batches"):
        guard(model, [])
    with pytest.raises(ConfigError, match="min_sqnr=nan"):
        guard(model, batches, min_sqnr=float("nan"))
