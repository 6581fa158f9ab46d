"""Sensitivity from gradients."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch

import qwrap
from qwrap.errors import ConfigError
from qwrap.mixed.choices import Choice, Group
from qwrap.mixed.loss.probes import probe
from qwrap.numerics import fake_quantize
from qwrap.quant.prepare import stubs

U8, U4 = Choice("uint8", "int8"), Choice("uint8", "int4")
FINE = Choice("uint16", "int16")


def linear(small: Any, width: int) -> onnx.ModelProto:
    weights = {"w": (6, width)}
    return small.build("y = Gemm(x, w)", weights, inputs="float[N,6] x", outputs="float[N,M] y")


def rows(small: Any, count: int = 1, size: int = 8) -> list[np.ndarray]:
    return small.batches(count, (size, 6))


def rounded(proto: onnx.ModelProto, choice: Choice, batches: Any) -> dict[str, np.ndarray]:
    """Input and weight of a linear network as they are, and as they are quantized."""
    model = qwrap.load(proto).eval()
    qwrap.prepare(
        model,
        qwrap.QConfig(activation=choice.activation, weight=choice.weight, scope="kernels"),
    )
    qwrap.calibrate(model, batches, progress=False)
    x = torch.from_numpy(np.concatenate(batches))
    w = torch.from_numpy(onnx.numpy_helper.to_array(proto.graph.initializer[0]).copy())
    found = {"x": x.double().numpy(), "w": w.double().numpy()}
    for _, stub in stubs(model):
        value = {"x": x, "w": w}.get(stub.name)
        if value is not None:
            now = fake_quantize(value, stub.scale, stub.zero_point, stub.grid)
            found[f"{stub.name}_rounded"] = now.double().numpy()
    return found


@pytest.mark.parametrize("choice", [U8, U4])
def test_a_linear_network_of_one_output_has_the_loss_of_the_formula(
    small: Any, choice: Choice
) -> None:
    proto, batches = linear(small, 1), rows(small)
    found = qwrap.sensitivity(
        qwrap.load(proto),
        batches,
        choices=[choice],
        method="fisher",
        measure="error",
        projections=1,  # the sign of one number does not change its square
        progress=False,
    )
    v = rounded(proto, choice, batches)
    dx, dw = v["x_rounded"] - v["x"], v["w_rounded"] - v["w"]
    wanted = ((dx @ v["w"] + v["x"] @ dw) ** 2).sum() / ((v["x"] @ v["w"]) ** 2).sum()
    # gradients and products of six numbers each are float32
    assert found.losses["/y", choice] == pytest.approx(wanted, rel=1e-4)


def test_a_linear_classifier_has_the_loss_of_the_formula(small: Any) -> None:
    proto, batches = linear(small, 4), rows(small, 4)
    found = qwrap.sensitivity(
        qwrap.load(proto),
        batches,
        by="tensor",
        choices=[U4],
        method="fisher",
        projections=200,
        progress=False,
    )
    v = rounded(proto, U4, batches)
    z = v["x"] @ v["w"]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    moves = {"x": (v["x_rounded"] - v["x"]) @ v["w"], "w": v["x"] @ (v["w_rounded"] - v["w"])}
    for name, dz in moves.items():
        wanted = 0.5 * ((p * dz**2).sum(1) - (p * dz).sum(1) ** 2).mean()
        # 200 x 32 products, whose squares spread by less than one and a half of their mean: the
        # standard error is below .02
        assert found.losses[name, U4] == pytest.approx(wanted, rel=0.08)


SMOOTH = """
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)
    b = Tanh(a)
    c = Conv<strides=[4,4]>(b, w2)
    d = Tanh(c)
    f = Flatten(d)
    y = Gemm(f, w3)
"""


def smooth(small: Any, outputs: int = 1) -> onnx.ModelProto:
    weights = {"w1": (4, 3, 3, 3), "b1": (4,), "w2": (4, 4, 4, 4), "w3": (16, outputs)}
    return small.build(SMOOTH, weights, outputs="float[N,M] y")


@pytest.mark.parametrize("by", ["layer", "tensor"])
def test_where_rounding_is_fine_it_is_what_is_measured(small: Any, by: Any) -> None:
    model, batches = qwrap.load(smooth(small)), small.batches(2, (8, 3, 8, 8))
    settings: dict[str, Any] = {
        # a layer of weights alone: of activations it takes other rounding errors
        "choices": [Choice("float32" if by == "layer" else "uint16", "int8")],
        "by": by,
        "measure": "error",
        "progress": False,
    }
    measured = qwrap.sensitivity(model, batches, **settings)
    found = qwrap.sensitivity(model, batches, method="fisher", projections=1, **settings)
    for key, loss in measured.losses.items():
        if loss > 1e-8:  # below, float32 sums are what is measured
            # what is left out is of the order of the rounding errors, 1/256 and less
            assert found.losses[key] == pytest.approx(loss, rel=0.05), key


def test_all_choices_come_of_the_same_passes(small: Any) -> None:
    model, batches = qwrap.load(smooth(small)), small.batches(2, (8, 3, 8, 8))
    together = qwrap.sensitivity(
        model, batches, choices=[U8, U4, FINE], method="fisher", progress=False
    )
    for choice in (U8, U4, FINE):
        alone = qwrap.sensitivity(model, batches, choices=[choice], method="fisher", progress=False)
        for key, loss in alone.losses.items():
            assert together.losses[key] == loss, key


def test_samples_in_one_batch_count_as_samples_in_many(small: Any) -> None:
    proto = smooth(small)
    batches = small.batches(2, (8, 3, 8, 8))
    single = [x[i : i + 1] for x in batches for i in range(8)]
    losses = [
        qwrap.sensitivity(
            qwrap.load(proto), data, choices=[U8], method="fisher", measure="error",
            projections=1, progress=False,
        ).losses
        for data in (batches, single)
    ]  # fmt: skip
    for key, loss in losses[0].items():
        # float32 sums in another order; ranges from batches are the same
        assert losses[1][key] == pytest.approx(loss, rel=1e-4), key


def test_a_seed_repeats_what_was_found(small: Any) -> None:
    model, batches = qwrap.load(smooth(small, 5)), small.batches(1, (8, 3, 8, 8))
    settings: dict[str, Any] = {"choices": [U8], "method": "fisher", "progress": False}
    first, again, other = (
        qwrap.sensitivity(model, batches, seed=seed, **settings) for seed in (3, 3, 4)
    )
    assert first == again
    assert first.losses != other.losses


def test_a_table_is_rounded_once(small: Any) -> None:
    table = np.random.default_rng(0).normal(0, 1, (20_000, 6)).astype(np.float32)
    proto = small.build(
        "e = Gather(t, x) y = MatMul(e, w)",
        {"t": table, "w": (6, 1)},
        inputs="int64[N] x",
        outputs="float[N,M] y",
    )
    batches = [np.arange(8, dtype=np.int64)]
    groups = [Group("table", ("/e",), (U8,))]
    measured, found = (
        qwrap.sensitivity(
            qwrap.load(proto), batches, groups=groups, method=m, measure="error", progress=False
        ).losses["table", U8]
        for m in ("measured", "fisher")
    )
    assert found > 0
    assert found == pytest.approx(measured, rel=1e-3)  # linear, but for float32


def test_a_probe_sees_the_gradient_of_autograd_and_changes_nothing() -> None:
    x = torch.arange(4.0, requires_grad=True)
    seen: list[torch.Tensor] = []
    y = probe(x, lambda gradient, value: seen.append(gradient * value))
    (y * y).sum().backward()
    assert torch.equal(y, x)
    assert x.grad is not None
    assert torch.equal(seen[0], x.grad * x)


def test_what_reaches_no_float_output_has_no_loss(small: Any) -> None:
    proto = small.build(
        "z = Gemm(x, w) a = ArgMax<axis=1>(z) y = Cast<to=1>(a)",
        {"w": (6, 4)},
        inputs="float[N,6] x",
        outputs="float[N,1] y",
    )
    found = qwrap.sensitivity(
        qwrap.load(proto), rows(small), choices=[U8], method="fisher", progress=False
    )
    assert found.losses["/z", U8] == 0


def test_outputs_without_gradient_are_refused(small: Any) -> None:
    proto = small.build(
        "z = Gemm(x, w) y = ArgMax<axis=1>(z)",
        {"w": (6, 4)},
        inputs="float[N,6] x",
        outputs="int64[N,1] y",
    )
    with pytest.raises(ConfigError, match="no output is a float tensor"):
        qwrap.sensitivity(
            qwrap.load(proto), rows(small), choices=[U8], method="fisher", progress=False
        )
