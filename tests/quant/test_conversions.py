"""Tensors that some of their readers get in another type."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import qwrap
from qwrap.config import QuantSpec
from qwrap.model.points import UsePoint, ValuePoint
from qwrap.quant.prepare import observers, place_without, set_mode, stub_at, stubs
from qwrap.quant.stubs import Stub

NODES = (
    "a = Conv<pads=[1,1,1,1]>(x, w1, b1) b = Relu(a) y = Conv<pads=[1,1,1,1]>(b, w2, b2) "
    "u = Mul(b, b) m = MaxPool<kernel_shape=[2,2]>(b) z = Conv(m, w3)"
)
WEIGHTS = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (4, 6, 3, 3), "b2": (4,), "w3": (4, 6, 3, 3)}
OUTPUTS = "float[N,4,8,8] y, float[N,6,8,8] u, float[N,4,5,5] z"


@pytest.fixture
def mixed(small: Any, quantized: Callable[..., Any]) -> Callable[..., Any]:
    """``mixed(**settings)``: two layers behind one of 8 bits compute in 16, one behind a pool."""

    def mixed(**settings: Any) -> Any:
        config = qwrap.QConfig(**{"scope": "all", **settings})
        config.set(["/y", "/z", "/m"], activation="uint16")
        config.set("*", training=config.training)
        source = small.build(NODES, WEIGHTS, outputs=OUTPUTS, opset=21)
        return quantized(source, config=config)

    return mixed


def scales(model: qwrap.WrappedModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {key: stub_at(model, model.plan.point_of(key)) for key in model.plan.scales()}
    return {key: (stub.scale.clone(), stub.zero_point.clone()) for key, stub in found.items()}


def same(some: dict[str, Any], others: dict[str, Any]) -> bool:
    return some.keys() == others.keys() and all(
        all(map(torch.equal, some[key], others[key])) for key in some
    )


def disturb(model: qwrap.WrappedModel) -> None:
    with torch.no_grad():
        for _, stub in stubs(model):
            for parameter in stub.trained().values():
                parameter.add_(0.1)


def test_what_sits_on_several_points_is_listed_once(mixed: Callable[..., Any]) -> None:
    model = mixed().model
    (conversion,) = model.plan.tensors["b"].conversions
    assert {*conversion.consumers} == {("/y", 0), ("/m", 0)}
    first, second = (stub_at(model, UsePoint(*use)) for use in conversion.consumers)
    assert first is second
    assert sum(stub is first for _, stub in stubs(model)) == 1
    assert model.plan.tensors["m"].source == "b_convert"


def test_each_code_is_held_exactly_by_a_type_of_twice_the_bits(mixed: Callable[..., Any]) -> None:
    model = mixed().model
    base, wide = (stub_at(model, model.plan.point_of(key)) for key in ("b", "b_convert"))
    codes = (torch.arange(256) - base.zero_point) * base.scale
    # 65535 is 257 times 255, and the scale of the wide type is rounded to float32.
    assert (wide(codes) - codes).abs().max() <= 2**-22 * codes.abs().max()


# --- scales of files, tables and states ----------------------------------------------------------


def test_a_file_is_calibrated_anew(mixed: Callable[..., Any], small: Any) -> None:
    made = mixed()
    model = qwrap.load(made.path).eval()
    before = scales(model)
    batches = [2 * batch for batch in small.batches(seed=4)]
    qwrap.calibrate(model, batches, progress=False)
    assert all(not torch.equal(scales(model)[key][0], before[key][0]) for key in before)
    path = made.path.with_suffix(".again.onnx")
    qwrap.export(model, path)
    report = qwrap.verify(model, path, batches, progress=False)
    for tensor in report.specification.tensors:
        # sums of products in another order: of 16 bits a tie may fall elsewhere
        allowed = 0.005 * tensor.elements if tensor.dtype.endswith("16") else 0
        assert tensor.differing <= allowed


def test_a_file_is_rescaled_from_its_own_table(mixed: Callable[..., Any]) -> None:
    made = mixed()
    model = qwrap.load(made.path).eval()
    before, table = scales(model), qwrap.RangeTable.of(model)
    assert {"b_convert", "m"} <= set(table)
    config = qwrap.QConfig(training="lsq")
    other = qwrap.load(made.path, config=config).eval()
    disturb(other)
    assert not same(scales(other), before)
    qwrap.rescale(other, table)
    assert same(scales(other), before)


def test_a_table_without_scales_gives_conversions_their_ranges(mixed: Callable[..., Any]) -> None:
    model = mixed().model
    table = dict(qwrap.RangeTable.of(model))
    table["b_convert"] = qwrap.TensorRange(0.0, 1.5)
    qwrap.rescale(model, qwrap.RangeTable(table))
    stub = stub_at(model, model.plan.point_of("b_convert"))
    assert float(stub.scale) == np.float32(1.5) / np.float32(65535)


def test_the_user_says_how_a_tensor_is_converted(mixed: Callable[..., Any]) -> None:
    made = mixed()
    config = qwrap.QConfig(training="lsq")
    config.set("b_convert", scale=0.001, zero_point=7)
    model = qwrap.load(made.path, config=config)
    conversion = model.plan.scales()["b_convert"]
    assert conversion.fixed == (float(np.float32(0.001)), 7)
    assert (conversion.training, model.plan.tensors["b"].training) == ("fixed", "lsq")
    stub = stub_at(model, model.plan.point_of("b_convert"))
    assert (float(stub.scale), int(stub.zero_point)) == conversion.fixed
    qwrap.export(model, path := made.path.with_suffix(".said.onnx"))
    held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    assert held["b_scale_convert"] == np.float32(0.001)
    assert held["b_zero_point_convert"] == 7


@pytest.mark.parametrize("imported", [True, False])
def test_a_state_holds_conversions_once(
    mixed: Callable[..., Any], tmp_path: Path, *, imported: bool
) -> None:
    made = mixed(training="lsq")
    load = lambda: qwrap.load(made.path, config=learning())  # noqa: E731 -- for both ways
    model = load() if imported else made.model
    other = load() if imported else copy.deepcopy(made.model)
    disturb(model)
    assert not same(scales(model), scales(other))
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert same(scales(model), scales(other))


def learning() -> qwrap.QConfig:
    config = qwrap.QConfig(training="lsq")
    config.set("*", training="lsq")
    return config


def test_what_was_moved_from_a_conversion_keeps_what_was_observed(
    mixed: Callable[..., Any],
) -> None:
    model = mixed().model
    seen = observers(model)["b"].seen
    place_without(model, {"/m": "a test"})
    assert model.plan.tensors["m"].source == "m"
    assert stub_at(model, ValuePoint("m")).observer.seen == seen


def test_scales_that_follow_the_data_go_with_that_of_the_tensor(
    mixed: Callable[..., Any], small: Any
) -> None:
    model = mixed(training="follow").model
    base, wide = (stub_at(model, model.plan.point_of(key)) for key in ("b", "b_convert"))
    before = float(wide.scale)
    model.train()
    model(torch.from_numpy(3 * small.batches(1)[0]))
    assert float(wide.scale) > before
    # the wide type has the ends of the codes before it
    low, high = base.reach()
    assert float(wide.scale) == pytest.approx(float(high - low) / 65535, rel=1e-6)


# --- gradients -----------------------------------------------------------------------------------


def relaxed(stub: Stub, x: torch.Tensor) -> tuple[Callable[..., torch.Tensor], torch.Tensor]:
    """Rounding to a grid as a function of input and scale, its errors held; and what is inside."""
    scale, zero = stub.scale.double(), stub.zero_point.double()
    t = x / scale
    low, high = stub.grid.qmin - zero, stub.grid.qmax - zero
    inside = (t.round() >= low) & (t.round() <= high)
    residual = torch.where(inside, t.round() - t, 0.0)

    def of(values: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        return size * (values / size + residual).clamp(low, high)

    return of, inside


def at_end(stub: Stub, x: torch.Tensor) -> torch.Tensor:
    """Whether there is one derivative to the left and another one to the right."""
    codes = (x / stub.scale.double()).round() + stub.zero_point
    return (codes == stub.grid.qmin) | (codes == stub.grid.qmax)


def test_gradients_are_those_of_one_rounding_after_the_other(small: Any, tmp_path: Path) -> None:
    nodes = (
        "xc = QuantizeLinear(x, xs, xz) xd = DequantizeLinear(xc, xs, xz) "
        "vc = QuantizeLinear(xd, vs, vz) vd = DequantizeLinear(vc, vs, vz) "
        "p = Mul(vd, k1) q = Mul(vd, k2) r = Mul(xd, k3)"
    )
    factors = dict(zip(("k1", "k2", "k3"), np.float32([0.7, -1.3, 0.4]), strict=True))
    constants = {k: np.asarray(v) for k, v in factors.items()} | {
        "xs": np.array(0.031, np.float32),
        "xz": np.array(70, np.uint8),
        "vs": np.array(0.0193, np.float32),
        "vz": np.array(-2, np.int8),
    }
    outputs = ", ".join(f"float[N,3,8,8] {name}" for name in "pqr")
    path = tmp_path / "made.onnx"
    onnx.save(small.build(nodes, constants, outputs=outputs, opset=21), path)
    model = qwrap.load(path, config=learning())
    base, other = (stub_at(model, model.plan.point_of(key)) for key in ("x", "x_convert"))
    x = torch.from_numpy(3 * small.batches(1)[0]).requires_grad_()
    first, inside = relaxed(base, x.detach().double())
    rounded = first(x.detach().double(), base.scale.double())
    second, inside_too = relaxed(other, rounded)
    at_ends = at_end(base, x.detach().double()) | at_end(other, rounded)
    drawn = (torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i in range(3))
    ups = [up * ~at_ends for up in drawn]
    sum((o * up).sum() for o, up in zip(model(x), ups, strict=True)).backward()
    k = [float(v) for v in factors.values()]

    def loss(values: torch.Tensor, s1: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        b = first(values, s1)
        v = second(b, s2)
        return ((k[0] * ups[0] + k[1] * ups[1]) * v + k[2] * ups[2] * b).sum()

    at = [x.detach().double(), base.scale.double(), other.scale.double()]
    features = x[0].numel()
    for stub, index in ((base, 1), (other, 2)):
        step = 1e-7 * at[index]
        ends = [
            loss(*(v + sign * step * (i == index) for i, v in enumerate(at))) for sign in (1, -1)
        ]
        slope = float((ends[0] - ends[1]) / (2 * step))
        low, high = stub.grid.qmin - stub.zero_point, stub.grid.qmax - stub.zero_point
        balance = 1 / np.sqrt(features * float(torch.maximum(-low, high)))  # g of LSQ
        wanted = balance / float(stub.scale) * slope
        # residuals are kept to 1/252 of a step
        total = sum(float(up.abs().sum()) for up in ups)
        slack = balance / float(stub.scale) * total / 504 + 1e-5 * abs(wanted)
        assert float(stub.trained()["scale"].grad) == pytest.approx(wanted, abs=slack)
    through = (k[0] * ups[0] + k[1] * ups[1]) * inside_too + k[2] * ups[2]
    torch.testing.assert_close(x.grad, through * inside, rtol=1e-6, atol=1e-7)


def test_a_float_pass_rounds_nothing(mixed: Callable[..., Any]) -> None:
    made = mixed()
    model, x = made.model, torch.from_numpy(made.batches[0])
    set_mode(model, "float")
    wanted = qwrap.load(made.source).eval()
    with torch.no_grad():
        for mine, other in zip(model(x), wanted(x), strict=True):
            assert torch.equal(mine, other)


def test_a_conversion_has_a_spec_of_its_own() -> None:
    stub = Stub("t_convert", QuantSpec(dtype=qwrap.dtypes.UINT16, symmetric=False))
    base = Stub("t", QuantSpec(symmetric=False))
    stub.convert(base)
    assert [*stub.children()] == []  # or a state would hold the tensor's scale twice
    assert copy.deepcopy({"base": base, "made": stub})["made"].name == "t_convert"
