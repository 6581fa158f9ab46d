"""SmoothQuant of a prepared model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import qwrap
from qwrap.algorithms.smooth import smooth
from qwrap.errors import ConfigError, InputError
from qwrap.quant.auto.held_out import float_model

NORM = "h = LayerNormalization(x, g, b) y = MatMul(h, w) z = MatMul(h, v)"
NORM_WEIGHTS = {"g": (32,), "b": (32,), "w": (32, 8), "v": (32, 5)}
PARTS = """m = ReduceMean<axes=[-1]>(x) c = Sub(x, m) q = Mul(c, c) s = ReduceMean<axes=[-1]>(q)
    e = Add(s, tiny) d = Sqrt(e) n = Div(c, d) f = Mul(n, g) h = Add(f, b)
    y = MatMul(h, w) z = MatMul(h, v)"""
ROOT = """q = Mul(x, x) s = ReduceMean<axes=[-1]>(q) e = Add(s, tiny) d = Sqrt(e) n = Div(x, d)
    h = Mul(n, g) y = MatMul(h, w) z = MatMul(h, v)"""
HEADS = """k = MatMul(x, u) a = Reshape(k, r) t = Transpose<perm=[0,2,1,3]>(a) p = MatMul(x, xt)
    o = Softmax(p) l = Unsqueeze(o, one) i = MatMul(l, t) j = Transpose<perm=[0,2,1,3]>(i)
    f = Reshape(j, back) y = MatMul(f, w)"""


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def outlying(count: int = 32, size: float = 100.0) -> np.ndarray:
    """Gains of a normalisation, one in 16 far larger than the others."""
    gains = np.random.default_rng(2).uniform(0.5, 1, count).astype(np.float32)
    gains[::16] *= size
    return gains


WAYS: dict[str, tuple[str, dict[str, Any], str]] = {
    "LayerNormalization": (NORM, {**NORM_WEIGHTS, "g": outlying()}, "y"),
    "its parts": (PARTS, {**NORM_WEIGHTS, "g": outlying(), "tiny": np.float32(1e-5)}, "y"),
    "root mean square": (
        ROOT,
        {"g": outlying(), "w": (32, 8), "v": (32, 5), "tiny": np.float32(1e-5)},
        "y",
    ),
    "gate": (
        "u = MatMul(x, k) i = MatMul(x, l) s = Sigmoid(i) h = Mul(s, u) y = MatMul(h, w)"
        " z = MatMul(h, v)",
        {"k": outlying() * np.eye(32, dtype=np.float32), "l": (32, 32), "w": (32, 8), "v": (32, 5)},
        "y",
    ),
    "heads": (
        HEADS + " z = MatMul(f, v)",
        {
            "u": outlying() * np.eye(32, dtype=np.float32),
            "xt": (32, 6),
            "r": ints(0, 0, 4, 8),
            "one": ints(1),
            "back": ints(0, 0, 32),
            "w": (32, 8),
            "v": (32, 5),
        },
        "y",
    ),
}


def batches(count: int = 6) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(0, 1, (2, 6, 32)).astype(np.float32) for _ in range(count)]


def source(small: Any, name: str) -> onnx.ModelProto:
    nodes, weights, _ = WAYS[name]
    model: onnx.ModelProto = small.build(
        nodes, weights, "float[N,6,32] x", "float[N,6,8] y, float[N,6,5] z", opset=17
    )
    return model


def calibrated(model: onnx.ModelProto, **settings: Any) -> qwrap.WrappedModel:
    wrapped = qwrap.load(model).eval()
    qwrap.prepare(wrapped, qwrap.QConfig(scope="kernels", **settings))
    qwrap.calibrate(wrapped, batches(), progress=False)
    return wrapped


def arrays(model: qwrap.WrappedModel) -> dict[str, np.ndarray]:
    state = model.state_dict()
    return {name: state[key].numpy().copy() for key, name in model.tensor_names.items()}


@pytest.mark.parametrize("name", WAYS)
def test_outliers_go_into_weights_and_eight_bits_lose_less(small: Any, name: str) -> None:
    model = calibrated(source(small, name), method="minmax")
    kinds = [node.op_type for node in model.graph.nodes.values()]
    wanted = [float_model(model)(torch.from_numpy(x)) for x in batches()]
    outcome = smooth(model, batches())
    assert outcome.kept
    assert outcome.after < outcome.before / 2
    assert [node.op_type for node in model.graph.nodes.values()] == kinds  # no new Mul
    for x, float_outputs in zip(batches(), wanted, strict=True):
        outputs = float_model(model)(torch.from_numpy(x))
        for found, output in zip(outputs, float_outputs, strict=True):
            assert (found - output).norm() <= 1e-5 * output.norm()


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_the_divisor_is_the_formula_of_the_paper(small: Any, alpha: float) -> None:
    data = batches(1)  # one batch teaches and decides
    model = qwrap.load(source(small, "LayerNormalization")).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    before = arrays(model)
    reference, seen = float_model(model), list[torch.Tensor]()
    with torch.no_grad(), reference.watching({"h": seen.append}):
        reference(torch.from_numpy(data[0]))
    reach = seen[0].abs().amax((0, 1)).numpy()
    assert smooth(model, data, alpha=alpha)
    after = arrays(model)
    largest = np.maximum(np.abs(before["w"]).max(1), np.abs(before["v"]).max(1))
    scale = reach**alpha / largest ** (1 - alpha)
    for name, by in {
        "g": 1 / scale,
        "b": 1 / scale,
        "w": scale[:, None],
        "v": scale[:, None],
    }.items():
        np.testing.assert_allclose(after[name], before[name] * by, rtol=1e-4)


def test_the_file_runs_and_is_what_was_simulated(small: Any, tmp_path: Path) -> None:
    model = calibrated(source(small, "gate"), method="minmax")
    assert smooth(model, batches())
    qwrap.export(model, tmp_path / "s.onnx")
    found = small.run(tmp_path / "s.onnx", batches()[0])
    with torch.no_grad(), qwrap.exact(model):
        wanted = model(torch.from_numpy(batches()[0]))
    for ours, theirs in zip(wanted, found, strict=True):
        # A Sigmoid of onnxruntime and of torch may differ by one code; that is 1e-2 of the range.
        assert np.abs(ours.numpy() - theirs).max() <= 2e-2 * np.abs(theirs).max()


def test_what_does_not_help_is_undone_bit_for_bit(small: Any) -> None:
    model = calibrated(source(small, "gate"), method="minmax")
    smooth(model, batches())
    # It is smooth already; all of the difficulty in the weights is too much.
    before, graph = copy.deepcopy(model.state_dict()), model.graph
    model.train()
    random = torch.get_rng_state()
    outcome = smooth(model, batches(), alpha=0.0)
    assert not outcome.kept
    assert outcome.after > outcome.before
    assert model.graph is graph
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(), before[key].nan_to_num()), key


def test_where_nothing_can_be_divided_the_reason_is_told(small: Any) -> None:
    model = calibrated(
        small.build(
            "k = MatMul(x, u) h = Sigmoid(k) y = MatMul(h, w)",
            {"u": (32, 32), "w": (32, 8)},
            "float[N,6,32] x",
            "float[N,6,8] y",
        )
    )
    outcome = smooth(model, batches())
    assert not outcome.kept
    assert outcome.details[0] == "no channels can be smoothed"
    assert any("is read by Sigmoid" in line for line in outcome.details)


def test_it_refuses_what_it_cannot_work_with(small: Any) -> None:
    model = qwrap.load(source(small, "gate"))
    with pytest.raises(ConfigError, match="not prepared"):
        smooth(model, batches())
    qwrap.prepare(model)
    with pytest.raises(ConfigError, match=r"alpha=1.5: give a number from 0 to 1"):
        smooth(model, batches(), alpha=1.5)
    with pytest.raises(ConfigError, match="choose from"):
        smooth(model, batches(), op_types=("Mul",))
    with pytest.raises(InputError, match="no batches"):
        smooth(model, [])
