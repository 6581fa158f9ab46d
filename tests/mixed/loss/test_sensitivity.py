"""How much quantizing one part of a model hurts, measured."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import qwrap
from qwrap.errors import ConfigError, InputError, NotCalibratedError, StatisticsError
from qwrap.mixed.choices import FLOAT, Choice, Group
from qwrap.mixed.loss import measured

CHAIN = """
    c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r1 = Relu(c1)
    c2 = Conv<pads=[1,1,1,1]>(r1, w2)
    r2 = Relu(c2)
    c3 = Conv<strides=[4,4]>(r2, w3)
    f = Flatten(c3)
    y = Gemm(f, w4, b4)
"""
WEIGHTS = {
    "w1": (8, 3, 3, 3),
    "b1": (8,),
    "w2": (8, 8, 3, 3),
    "w3": (8, 8, 4, 4),
    "w4": (32, 5),
    "b4": (5,),
}
ALL = ["/c1", "/r1", "/c2", "/r2", "/c3", "/y"]
U8, U4 = Choice("uint8", "int8"), Choice("uint8", "int4")
FINE = Choice("uint16", "int16")


def chain(small: Any, **weights: Any) -> onnx.ModelProto:
    return small.build(CHAIN, {**WEIGHTS, **weights}, outputs="float[N,M] y")


def data(small: Any) -> list[np.ndarray]:
    return small.batches(3, (8, 3, 8, 8))  # of 8: smaller ones are joined when they are measured


def config(choice: Choice) -> qwrap.QConfig:
    return qwrap.QConfig(activation=choice.activation, weight=choice.weight, scope="kernels")


def run_all(model: qwrap.WrappedModel, batches: list[np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate([model(torch.from_numpy(x)).numpy() for x in batches])


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def kl(found: np.ndarray, wanted: np.ndarray) -> float:
    p, q = softmax(wanted), softmax(found)
    return float((p * np.log(p / q)).sum(1).mean())


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    return float(((found - wanted) ** 2).sum() / (wanted**2).sum())


def alone(proto: onnx.ModelProto, nodes: tuple[str, ...], choice: Choice, batches: Any) -> Any:
    """Outputs of a model prepared anew with all other nodes excluded."""
    asked = config(choice)
    asked.exclude(*(key for key in ALL if key not in nodes))
    model = qwrap.load(proto).eval()
    qwrap.prepare(model, asked)
    qwrap.calibrate(model, batches, progress=False)
    return run_all(model, batches)


@pytest.mark.parametrize(("measure", "formula"), [("kl", kl), ("error", error)])
def test_losses_are_those_of_models_prepared_with_all_else_excluded(
    small: Any, measure: Any, formula: Any
) -> None:
    proto, batches = chain(small), data(small)
    found = qwrap.sensitivity(
        qwrap.load(proto), batches, choices=[U8, U4], measure=measure, progress=False
    )
    wanted = run_all(qwrap.load(proto).eval(), batches)
    assert [group.name for group in found.groups] == ["/c1", "/c2", "/c3", "/y"]
    for group in found.groups:
        for choice in (U8, U4):
            loss = formula(alone(proto, group.nodes, choice, batches), wanted)
            # the same float32 outputs; sums are taken in another order
            assert found.losses[group.name, choice] == pytest.approx(loss, rel=1e-9), group.name
        assert found.losses[group.name, FLOAT] == 0


def test_everything_is_the_loss_of_the_quantized_model(small: Any) -> None:
    proto, batches = chain(small), data(small)
    model = qwrap.load(proto).eval()
    wanted = run_all(model, batches)
    qwrap.prepare(model, config(U8))
    qwrap.calibrate(model, batches, progress=False)
    found = qwrap.sensitivity(model, batches, measure="error", progress=False)
    assert found.everything[U8] == pytest.approx(error(run_all(model, batches), wanted), rel=1e-9)


def test_with_the_rest_quantized_a_loss_is_what_leaving_the_part_in_float_wins(small: Any) -> None:
    proto, batches = chain(small), data(small)
    model = qwrap.load(proto)
    found = qwrap.sensitivity(
        model, batches, choices=[U8], rest="quantized", measure="error", progress=False
    )
    wanted = run_all(qwrap.load(proto).eval(), batches)
    total = error(alone(proto, tuple(ALL), U8, batches), wanted)
    for group in found.groups:
        others = tuple(key for key in ALL if key not in group.nodes)
        left = error(alone(proto, others, U8, batches), wanted)
        assert found.losses[group.name, U8] == pytest.approx(total - left, rel=1e-6, abs=1e-12)


def test_decibels_are_those_of_the_error(small: Any) -> None:
    model, batches = qwrap.load(chain(small)), data(small)
    errors, decibels = (
        qwrap.sensitivity(model, batches, choices=[U8], measure=m, progress=False).losses
        for m in ("error", "sqnr")
    )
    assert decibels["/c2", U8] == pytest.approx(10 * np.log10(errors["/c2", U8]))
    assert decibels["/c2", FLOAT] == -np.inf


@pytest.mark.parametrize("by", ["layer", "node", "block", "tensor"])
@pytest.mark.parametrize("method", ["measured", "fisher"])
def test_a_planted_sensitive_layer_is_ranked_first(small: Any, by: Any, method: Any) -> None:
    rng = np.random.default_rng(1)
    planted = rng.normal(0, 0.02, (8, 8, 3, 3))
    planted[:, 0, 0, 0] = 20.0  # so that int8 has few codes for all else
    proto = chain(small, w2=planted)
    found = qwrap.sensitivity(
        qwrap.load(proto), data(small), choices=[U8], by=by, method=method, progress=False
    )
    assert found.ranking()[0] == ("w2" if by == "tensor" else "/c2")


def test_the_model_stays_as_it_was(small: Any) -> None:
    batches = data(small)
    model = qwrap.load(chain(small)).eval()
    qwrap.prepare(model, config(U8))
    qwrap.calibrate(model, batches, progress=False)
    before, state = run_all(model, batches), copy.deepcopy(model.state_dict())
    qwrap.sensitivity(model, batches, progress=False)
    qwrap.sensitivity(model, batches, method="fisher", progress=False)
    assert np.array_equal(run_all(model, batches), before)
    assert all(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, state[name]), name


def test_a_tensor_alone_is_what_its_stub_alone_does(small: Any) -> None:
    batches = data(small)
    model = qwrap.load(chain(small)).eval()
    wanted = run_all(model, batches)
    qwrap.prepare(model, config(U8))
    qwrap.calibrate(model, batches, progress=False)
    found = qwrap.sensitivity(model, batches, by="tensor", measure="error", progress=False)
    assert {"x", "r1", "r2", "w1", "w2", "w3", "w4"} <= {name for name, _ in found.losses}
    for module in model.modules():
        if hasattr(module, "mode"):
            module.mode = "quantize" if module.name == "r1" else "float"
    loss = error(run_all(model, batches), wanted)
    assert found.losses["r1", U8] == pytest.approx(loss, rel=1e-9)


def test_a_tensor_has_a_loss_for_each_type_that_it_may_have(small: Any) -> None:
    found = qwrap.sensitivity(
        qwrap.load(chain(small)), data(small), by="tensor", choices=[U8, U4], progress=False
    )
    assert [c for n, c in found.losses if n == "w2"] == [U8, U4]
    assert [c for n, c in found.losses if n == "r1"] == [U8]


def test_a_metric_is_called_with_each_model_and_its_fall_is_the_loss(small: Any) -> None:
    proto, batches = chain(small), data(small)
    wanted = run_all(qwrap.load(proto).eval(), batches)

    def closeness(model: qwrap.WrappedModel) -> float:
        return 3.0 - error(run_all(model, batches), wanted)

    model = qwrap.load(proto)
    found = qwrap.sensitivity(model, batches, choices=[U8], metric=closeness, progress=False)
    same = qwrap.sensitivity(model, batches, choices=[U8], measure="error", progress=False)
    for key, loss in same.losses.items():
        assert found.losses[key] == pytest.approx(loss, abs=1e-12)  # 3 - error is rounded
    assert found.measure == "metric"


def test_groups_of_the_users_own_have_their_own_choices(small: Any) -> None:
    proto, batches = chain(small), data(small)
    groups = [Group("front", ("/c1", "/r1", "/c2", "/r2"), (U8, FLOAT)), Group("y", ("/y",), (U4,))]
    found = qwrap.sensitivity(
        qwrap.load(proto), batches, groups=groups, measure="error", progress=False
    )
    assert [*found.losses] == [("front", U8), ("front", FLOAT), ("y", U4)]
    wanted = run_all(qwrap.load(proto).eval(), batches)
    loss = error(alone(proto, groups[0].nodes, U8, batches), wanted)
    assert found.losses["front", U8] == pytest.approx(loss, rel=1e-9)


def test_all_batches_are_calibrated_with_and_as_many_measured_as_asked_for(small: Any) -> None:
    proto, batches = chain(small), data(small)
    found = qwrap.sensitivity(
        qwrap.load(proto), iter(batches), choices=[U8], samples=8, measure="error", progress=False
    )
    wanted = run_all(qwrap.load(proto).eval(), batches)
    loss = error(alone(proto, ("/c2", "/r2"), U8, batches)[:8], wanted[:8])
    assert found.samples == 8
    assert found.losses["/c2", U8] == pytest.approx(loss, rel=1e-9)


# --- interrupted ---------------------------------------------------------------------------------


def test_an_interrupted_analysis_goes_on_where_it_was(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = qwrap.load(chain(small)), data(small)
    kwargs: dict[str, Any] = {"choices": [U8, U4], "measure": "error", "progress": False}
    whole = qwrap.sensitivity(model, batches, **kwargs)
    runs, real = 0, measured._distances

    def counted(*args: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == 17:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(measured, "_distances", counted)
    file = tmp_path / "sensitivity.json"
    with pytest.raises(KeyboardInterrupt):
        qwrap.sensitivity(model, batches, resume=file, **kwargs)
    again = qwrap.sensitivity(model, batches, resume=file, **kwargs)
    assert again == whole
    assert runs == 1 + 3 * (2 * (1 + 4))  # batches x choices x (everything and four layers)


def test_what_was_measured_otherwise_is_not_taken_up(small: Any, tmp_path: Path) -> None:
    model, batches, file = qwrap.load(chain(small)), data(small), tmp_path / "s.json"
    qwrap.sensitivity(model, batches, choices=[U8], resume=file, progress=False)
    with pytest.raises(StatisticsError, match=r"another analysis, by measure"):
        qwrap.sensitivity(
            model, batches, choices=[U8], resume=file, measure="error", progress=False
        )
    with pytest.raises(StatisticsError, match=r"another analysis, by samples, scales"):
        qwrap.sensitivity(model, batches[:2], choices=[U8], resume=file, progress=False)
    other = qwrap.load(chain(small, w4=(32, 5), b4=np.ones(5, np.float32)))
    with pytest.raises(StatisticsError, match=r"another analysis, by model"):
        qwrap.sensitivity(other, batches, choices=[U8], resume=file, progress=False)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "version": 1}', "nothing"])
def test_a_broken_file_is_refused(small: Any, tmp_path: Path, text: str) -> None:
    file = tmp_path / "s.json"
    file.write_text(text)
    with pytest.raises(StatisticsError, match="cannot be taken up again"):
        qwrap.sensitivity(
            qwrap.load(chain(small)), data(small), choices=[U8], resume=file, progress=False
        )


def test_a_file_of_another_kind_is_refused(small: Any, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    kind = {"format": "x", "version": 1, "settings": {}, "tallies": []}
    file.write_text(json.dumps(kind))
    with pytest.raises(StatisticsError, match="no analysis that this qwrap began"):
        qwrap.sensitivity(
            qwrap.load(chain(small)), data(small), choices=[U8], resume=file, progress=False
        )


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "row"}, "by='row': choose one of"),
        ({"method": "guessed"}, "method='guessed': choose one of"),
        ({"rest": "gone"}, "rest='gone': choose one of"),
        ({"measure": "cosine"}, "measure='cosine': choose one of"),
        ({"measure": {"z": "kl"}}, "no outputs .'z'. in the graph"),
        ({"measure": {"y": "sharpness"}}, "output 'y': no measure 'sharpness'"),
        ({"measure": "metric"}, "measure='metric' and metric= go together"),
        ({"measure": "kl", "metric": lambda _: 1.0}, "go together"),
        ({"samples": 0}, "samples=0"),
        ({"choices": []}, "give one or more that quantize"),
        ({"choices": ["float32"]}, "give one or more that quantize"),
        ({"choices": ["octet/int8"]}, "octet"),
        ({"groups": []}, "groups: give one or more"),
        ({"groups": [Group("a", ("/c9",), (U8,))]}, "no node '/c9'; the nearest are '/c3'"),
        ({"groups": [Group("a", ("/c1",), (U8,))] * 2}, "two are called 'a'"),
        ({"method": "fisher", "rest": "quantized"}, "fisher' knows no rest='quantized'"),
        ({"method": "fisher", "resume": "x.json"}, "fisher' knows no resume"),
        ({"method": "fisher", "metric": lambda _: 1.0}, "fisher' knows no metric"),
    ],
)
def test_a_wrong_setting_is_refused(small: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        qwrap.sensitivity(qwrap.load(chain(small)), data(small), progress=False, **settings)


def test_no_data_is_refused(small: Any) -> None:
    with pytest.raises(InputError, match="no batches"):
        qwrap.sensitivity(qwrap.load(chain(small)), [], progress=False)


def test_a_prepared_model_without_scales_is_refused(small: Any) -> None:
    model = qwrap.load(chain(small))
    qwrap.prepare(model, config(U8))
    with pytest.raises(NotCalibratedError, match="has no scale yet"):
        qwrap.sensitivity(model, data(small), progress=False)


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "is nan"), ("good", "'good'")])
def test_a_metric_that_is_no_finite_number_is_refused(
    small: Any, value: object, message: str
) -> None:
    with pytest.raises(InputError, match=f"the float model: .*{message}"):
        qwrap.sensitivity(
            qwrap.load(chain(small)), data(small), metric=lambda _: value, progress=False
        )


def test_a_metric_that_fails_for_one_group_is_named(small: Any) -> None:
    values = iter([1.0, 1.0, float("nan")])  # float, everything, the first group
    with pytest.raises(InputError, match="group '/c1' in uint8/int8: the metric is nan"):
        qwrap.sensitivity(
            qwrap.load(chain(small)),
            data(small),
            choices=[U8],
            metric=lambda _: next(values),
            progress=False,
        )


def test_fine_types_lose_less_than_coarse_ones(small: Any) -> None:
    found = qwrap.sensitivity(
        qwrap.load(chain(small)), data(small), choices=[U4, U8, FINE], progress=False
    )
    for group in found.groups:
        losses = [found.losses[group.name, choice] for choice in (U4, U8, FINE)]
        assert losses == sorted(losses, reverse=True)
    assert replace(found, samples=1).samples == 1  # a plain value


def test_half_precision_is_measured_too(small: Any) -> None:
    pytest.importorskip("qwrap.quant.half")
    half = Choice("float16", "float16")
    model, batches = qwrap.load(chain(small)), data(small)
    found = qwrap.sensitivity(model, batches, choices=[half, U8], measure="error", progress=False)
    for group in found.groups:
        assert 0 < found.losses[group.name, half] < found.losses[group.name, U8]
    wanted = run_all(qwrap.load(chain(small)).eval(), batches)
    asked = config(U8)
    asked.exclude("/c1", "/r1", "/c3", "/y")
    asked.set(["/c2", "/r2"], activation="float16")
    alone_ = qwrap.load(chain(small)).eval()
    qwrap.prepare(alone_, asked)
    qwrap.calibrate(alone_, batches, progress=False)
    loss = error(run_all(alone_, batches), wanted)
    assert found.losses["/c2", half] == pytest.approx(loss, rel=1e-6)
    with pytest.raises(ConfigError, match="method='fisher' knows no half precision"):
        qwrap.sensitivity(model, batches, choices=[half], method="fisher", progress=False)


def with_a_region(small: Any, batches: list[np.ndarray]) -> qwrap.WrappedModel:
    """The chain with its second layer in 16 bit, so that two tensors are converted."""
    asked = config(U8)
    asked.set(["/c2", "/r2"], activation="uint16", weight="int4")
    model = qwrap.load(chain(small)).eval()
    plan = qwrap.prepare(model, asked)
    assert [key for key, _ in plan.conversions()]
    qwrap.calibrate(model, batches, progress=False)
    return model


@pytest.mark.parametrize("by", ["layer", "tensor"])
def test_a_model_of_several_types_is_looked_at_as_it_is(small: Any, by: Any) -> None:
    batches = data(small)
    model = with_a_region(small, batches)
    wanted = run_all(qwrap.load(chain(small)).eval(), batches)
    found = qwrap.sensitivity(model, batches, by=by, measure="error", progress=False)
    assert found.everything[U8] == pytest.approx(error(run_all(model, batches), wanted), rel=1e-9)
    names = ["/c1", "/c2", "/c3", "/y"] if by == "layer" else ["r1", "r2", "w2"]
    assert all(found.losses[name, U8] > 0 for name in names)


def test_what_reads_a_conversion_is_quantized_with_it_and_its_tensor(small: Any) -> None:
    batches = data(small)
    model = with_a_region(small, batches)
    found = qwrap.sensitivity(model, batches, measure="error", progress=False)
    wanted = run_all(qwrap.load(chain(small)).eval(), batches)
    used = {"r1", "r1_convert", "r2", "w2"}
    names = {m.name for m in model.modules() if hasattr(m, "mode")}
    assert used <= names, names
    for module in model.modules():
        if hasattr(module, "mode"):
            module.mode = "quantize" if module.name in used else "float"
    loss = error(run_all(model, batches), wanted)
    assert found.losses["/c2", U8] == pytest.approx(loss, rel=1e-9)


def test_gradients_know_conversions(small: Any) -> None:
    batches = data(small)
    model = with_a_region(small, batches)
    settings: dict[str, Any] = {"by": "tensor", "measure": "error", "progress": False}
    measured = qwrap.sensitivity(model, batches, **settings)
    found = qwrap.sensitivity(model, batches, method="fisher", projections=32, **settings)
    for name in ("x", "r1", "w1", "w3", "w4"):  # not the weight of 4 bits: that is no small error
        # 32 x 24 products, whose squares spread by one and a half of their mean
        assert found.losses[name, U8] == pytest.approx(measured.losses[name, U8], rel=0.3), name


def test_a_quantized_file_is_looked_at_with_the_scales_it_has(small: Any, tmp_path: Path) -> None:
    batches = data(small)
    model = qwrap.load(chain(small)).eval()
    qwrap.prepare(model, config(U8))
    qwrap.calibrate(model, batches, progress=False)
    qwrap.export(model, tmp_path / "chain.onnx")
    again = qwrap.load(tmp_path / "chain.onnx").eval()
    mine, its = (
        qwrap.sensitivity(m, batches, by="tensor", measure="error", progress=False)
        for m in (model, again)
    )
    for name in ("x", "r1", "r2"):  # weights in the file are rounded for good
        assert its.losses[name, U8] == pytest.approx(mine.losses[name, U8], rel=0.2)
