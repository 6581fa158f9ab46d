"""High-bias absorption."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import qwrap
from qwrap.algorithms.absorption import absorb_biases
from qwrap.errors import ConfigError, InputError
from qwrap.quant.auto.held_out import float_model

HIGH = np.array([0, 50, 0, 80, 3, 0], np.float32)  # two are above all that comes
PAIR = "h = Conv(x, w, b) r = Relu(h) y = Conv(r, v, c)"
WEIGHTS: dict[str, Any] = {"w": (6, 3, 3, 3), "b": HIGH, "v": (4, 6, 2, 2), "c": (4,)}
IMAGE, OUT = "float[N,3,8,8] x", "float[N,M,H,W] y"

FORMS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "pair": (PAIR, WEIGHTS, IMAGE, OUT),
    "groups": (PAIR.replace("y = Conv", "y = Conv<group=2>"), {**WEIGHTS, "v": (4, 3, 2, 2)},
               IMAGE, OUT),
    "two readers": (
        "h = Conv(x, w, b) r = Relu(h) k = Conv(r, v, c) l = Conv(r, u, d) y = Mul(k, l)",
        {**WEIGHTS, "u": (4, 6, 2, 2), "d": (4,)}, IMAGE, OUT,
    ),
    "pools and moves": (
        "h = Conv(x, w, b) r = LeakyRelu(h) m = MaxPool<kernel_shape=[2,2],pads=[1,1,1,1]>(r)"
        " a = AveragePool<kernel_shape=[2,2],pads=[1,1,1,1]>(m) f = Flatten(a)"
        " y = Gemm<transB=1,alpha=0.5,beta=2.0>(f, v, c)",
        {**WEIGHTS, "v": (4, 384)}, IMAGE, "float[N,M] y",
    ),
    "transposed": ("h = ConvTranspose(x, w, b) r = Relu(h) y = Conv(r, v, c)",
                   {**WEIGHTS, "w": (3, 6, 3, 3)}, IMAGE, OUT),
    "Gemm": (
        "h = Gemm<beta=2.0>(x, w, b) r = Relu(h) y = Gemm<alpha=3.0>(r, v, c)",
        {"w": (12, 6), "b": HIGH / 2, "v": (6, 4), "c": (4,)}, "float[N,12] x", "float[N,M] y",
    ),
    "one dimension": (PAIR, {**WEIGHTS, "w": (6, 3, 3), "v": (4, 6, 2)}, "float[N,3,9] x",
                      "float[N,M,W] y"),
    "three dimensions": (PAIR, {**WEIGHTS, "w": (6, 3, 2, 2, 2), "v": (4, 6, 1, 2, 1)},
                         "float[N,3,4,4,4] x", "float[N,M,A,B,C] y"),
}  # fmt: skip
LEFT: dict[str, tuple[str, dict[str, Any], str]] = {  # and the reason
    "padded": (PAIR.replace("y = Conv", "y = Conv<pads=[1,1,1,1]>"), WEIGHTS, "is padded"),
    "read otherwise": (
        f"{PAIR.replace('y = ', 'k = ')} s = ReduceMax<axes=[1,2,3]>(r) y = Add(k, s)",
        WEIGHTS, "is not followed, or has to stay",
    ),
    "no bias behind": (
        "h = Conv(x, w, b) r = Relu(h) y = Conv(r, v)",
        {k: v for k, v in WEIGHTS.items() if k != "c"},
        "a layer behind it has no bias",
    ),
    "graph output": (PAIR, WEIGHTS, "has to stay"),
    "sum": (
        "h = Conv(x, w, b) r = Relu(h) t = Add(r, r) y = Conv(t, v, c)", WEIGHTS, "takes no shift",
    ),
}  # fmt: skip


def batches(inputs: str, count: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shape = [2 if n == "N" else int(n) for n in inputs[6 : inputs.index("]")].split(",")]
    return [rng.normal(0, 1, shape).astype(np.float32) for _ in range(count)]


def calibrated(source: onnx.ModelProto, inputs: str) -> qwrap.WrappedModel:
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="all", method="minmax"))
    qwrap.calibrate(model, batches(inputs), progress=False)
    return model


def arrays(model: qwrap.WrappedModel) -> dict[str, np.ndarray]:
    state = model.state_dict()
    return {name: state[key].numpy().copy() for key, name in model.tensor_names.items()}


@pytest.mark.parametrize("name", FORMS)
def test_what_is_always_exceeded_goes_into_the_next_bias(small: Any, name: str) -> None:
    nodes, weights, inputs, outputs = FORMS[name]
    model = calibrated(small.build(nodes, weights, inputs, outputs), inputs)
    data = [torch.from_numpy(x) for x in batches(inputs)]
    before = arrays(model)
    reference, seen = float_model(model), list[torch.Tensor]()
    with reference.watching({"h": seen.append}):
        wanted = [reference(x) for x in data]
    outcome = absorb_biases(model, batches(inputs))
    assert outcome.kept
    assert outcome.after < outcome.before
    for x, output in zip(data, wanted, strict=True):
        assert (float_model(model)(x) - output).norm() <= 1e-5 * output.norm()
    rows = torch.cat([h.detach().movedim(1, 0).flatten(1) for h in seen], 1).double()
    spread = rows.mean(1) - 3 * rows.std(1, correction=0)
    amount = torch.minimum(rows.amin(1), spread).clamp(min=0).numpy()
    assert (amount > 0).sum() in (2, 3)
    beta = 2.0 if name == "Gemm" else 1.0
    wanted_bias = before["b"] - amount / beta
    np.testing.assert_allclose(arrays(model)["b"], wanted_bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LEFT)
def test_what_takes_no_shift_is_left_alone_and_the_reason_told(small: Any, name: str) -> None:
    nodes, weights, reason = LEFT[name]
    outputs = OUT + (", float[N,6,I,J] r" if name == "graph output" else "")
    model = calibrated(small.build(nodes, weights, IMAGE, outputs), IMAGE)
    before = arrays(model)
    outcome = absorb_biases(model, batches(IMAGE))
    assert not outcome.kept
    assert any(reason in line for line in outcome.details)
    for key, array in arrays(model).items():
        np.testing.assert_array_equal(array, before[key])


def test_what_does_not_help_is_undone_bit_for_bit(small: Any) -> None:
    nodes, weights, inputs, outputs = FORMS["pair"]
    model = calibrated(small.build(nodes, {**weights, "b": HIGH * 0}, inputs, outputs), inputs)
    before, graph = copy.deepcopy(model.state_dict()), model.graph
    model.train()
    random = torch.get_rng_state()
    assert not absorb_biases(model, batches(inputs))
    assert model.graph is graph
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(), before[key].nan_to_num()), key


def test_the_file_runs_and_is_what_was_simulated(small: Any, tmp_path: Path) -> None:
    nodes, weights, inputs, outputs = FORMS["pair"]
    model = calibrated(small.build(nodes, weights, inputs, outputs), inputs)
    assert absorb_biases(model, batches(inputs))
    qwrap.export(model, tmp_path / "a.onnx")
    (found,) = small.run(tmp_path / "a.onnx", batches(inputs)[0])
    with torch.no_grad(), qwrap.exact(model):
        wanted = model(torch.from_numpy(batches(inputs)[0])).numpy()
    np.testing.assert_array_equal(found, wanted)


def test_it_refuses_what_it_cannot_work_with(small: Any) -> None:
    model = qwrap.load(small.convs())
    with pytest.raises(ConfigError, match="not prepared"):
        absorb_biases(model, small.batches())
    qwrap.prepare(model)
    with pytest.raises(ConfigError, match="deviations=-1"):
        absorb_biases(model, small.batches(), deviations=-1)
    with pytest.raises(InputError, match="no batches"):
        absorb_biases(model, [])
