"""AWQ: the function stays, scales suit the data, and outputs come closer than without."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

import qwrap
from qwrap.errors import ConfigError, InputError
from qwrap.graph.index import walk_nodes
from qwrap.graph.load import read_model
from qwrap.nbits.awq import CLIPS, clip, rescale
from qwrap.nbits.blocks import BlockFormat
from qwrap.nbits.inputs import observe_inputs
from qwrap.nbits.rtn import round_to_nearest
from qwrap.nbits.split import dequantize
from qwrap.nbits.statistics import InputStatistics

pytestmark = pytest.mark.ort(297, "G71")

Array = np.ndarray[Any, Any]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uneven(*shape: int, seed: int = 0) -> Array:
    """One channel in 8 is 30 times as large as the others."""
    x = drawn(*shape, seed=seed)
    x[..., ::8] *= 30
    return x.numpy()


def run(model: onnx.ModelProto, x: Array) -> list[Array]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: list[Array] = session.run(None, {"x": x})
    return found


BEFORE = {  # operators before the products -> weights, and whether the scales go into them
    "LayerNormalization": ("h = LayerNormalization(x, g, b)", {"g": (64,), "b": (64,)}, True),
    "previous product": ("c = MatMul(x, p) h = Relu(c)", {"p": (64, 64)}, True),
    "Mul": ("h = Mul(x, g)", {"g": (64,)}, True),
    "input": ("h = Identity(x)", {}, False),
    "another reader": ("h = Mul(x, g) u = Sigmoid(h)", {"g": (64,)}, False),
}


def model_of(small: Any, name: str) -> onnx.ModelProto:
    nodes, weights, _ = BEFORE[name]
    stored = {**weights, "w": (64, 24), "v": (64, 40)}
    if "g" in weights:  # uneven channels that a normalisation makes
        stored["g"] = np.where(np.arange(64) % 8 == 0, 30, 1).astype(np.float32)
    outputs = "float[N,24] y, float[N,40] z" + (", float[N,64] u" if "u =" in nodes else "")
    model: onnx.ModelProto = small.build(
        f"{nodes} y = MatMul(h, w) z = MatMul(h, v)", stored, "float[N,64] x", outputs, opset=17
    )
    return model


def relative_errors(model: onnx.ModelProto, other: onnx.ModelProto, x: Array) -> list[float]:
    pairs = zip(run(model, x), run(other, x), strict=True)
    return [float(np.square(a - b).sum() / np.square(a).sum()) for a, b in pairs]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", BEFORE)
def test_outputs_come_closer_than_rounded_to_nearest(
    small: Any, name: str, symmetric: bool
) -> None:
    model, exclude = model_of(small, name), ["/c"] if name == "previous product" else []
    settings: dict[str, Any] = {"block_size": 32, "symmetric": symmetric, "exclude": exclude}
    batches = [uneven(40, 64, seed=i) for i in range(4)]
    nearest = qwrap.quantize_weights(model, **settings)
    own = qwrap.quantize_weights(model, method="awq", batches=batches, **settings)
    assert nearest is not None
    assert own is not None
    muls = [n.name for n in own.graph.node if n.name.endswith("_smooth_mul")]
    assert muls == ([] if BEFORE[name][2] else ["h_smooth_mul"])
    onnx.checker.check_model(own)
    x = uneven(200, 64, seed=9)
    found, plain = (relative_errors(model, m, x)[:2] for m in (own, nearest))
    assert max(f / p for f, p in zip(found, plain, strict=True)) < 0.8
    assert sum(found) < (0.75 if name == "previous product" else 0.5) * sum(plain)


@pytest.mark.parametrize("name", BEFORE)
def test_scaling_alone_changes_nothing_but_rounding(small: Any, name: str) -> None:
    model = model_of(small, name)
    draft = read_model(model).clone()
    nodes = [n for n in walk_nodes(draft.graph) if n.name in ("/y", "/z")]
    seen = observe_inputs(draft, nodes, [uneven(99, 64)])
    after = rescale(draft, dict.fromkeys(nodes, BlockFormat(4, 32)), seen)
    scaled = onnx.ModelProto.FromString(_bytes(draft))
    for before, now in zip(run(model, uneven(50, 64, seed=3)),
                           run(scaled, uneven(50, 64, seed=3)), strict=True):  # fmt: skip
        assert np.abs(now - before).max() <= 1e-5 * np.abs(before).max()
    new = observe_inputs(draft, nodes, [uneven(99, 64)])
    for node in nodes:
        assert not torch.allclose(seen[node].second, after[node].second, rtol=0.1)
        torch.testing.assert_close(after[node].second, new[node].second, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(after[node].size, new[node].size, rtol=1e-4, atol=1e-5)


def _bytes(draft: ir.Model) -> bytes:
    data: bytes = ir.to_proto(draft).SerializeToString()
    return data


def test_the_scale_is_the_power_of_the_mean_size_that_loses_least(small: Any) -> None:
    model, x = model_of(small, "input"), uneven(500, 64)
    draft = read_model(model).clone()
    nodes = [n for n in walk_nodes(draft.graph) if n.name in ("/y", "/z")]
    form = BlockFormat(4, 32)
    rescale(draft, dict.fromkeys(nodes, form), observe_inputs(draft, nodes, [x]))
    arrays = {t.name: numpy_helper.to_array(t)
              for t in onnx.ModelProto.FromString(_bytes(draft)).graph.initializer}  # fmt: skip
    found = 1 / torch.from_numpy(arrays["h_smooth_scale"].copy())
    weights = [torch.from_numpy(numpy_helper.to_array(t).T.copy()) for t in model.graph.initializer]
    sizes, losses = torch.from_numpy(x).abs().mean(0), []
    for i in range(20):
        scale = sizes ** (i / 20)
        scale /= (scale.max() * scale.min()).sqrt()
        errors = [dequantize(round_to_nearest(w * scale, form)) / scale - w for w in weights]
        loss = sum(float((torch.from_numpy(x) @ e.T).square().sum()) for e in errors)
        losses.append((loss, i, scale))
    loss, best, scale = min(losses, key=lambda item: item[0])
    assert 0 < best < 20
    assert loss < 0.5 * losses[0][0]
    torch.testing.assert_close(found, scale, rtol=1e-4, atol=0)


def statistics_of(x: Tensor) -> InputStatistics:
    statistics = InputStatistics()
    statistics.add(x)
    return statistics


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ranges_are_those_with_the_least_error_of_a_block_on_its_inputs(
    bits: int, symmetric: bool
) -> None:
    x, weight, form = drawn(300, 80) @ drawn(80, 80), drawn(6, 80), BlockFormat(bits, 32, symmetric)
    own = clip(weight, form, statistics_of(x))
    assert own.scale.shape == (6, 3)
    assert (own.zero_point is None) == symmetric
    best = torch.full((6, 3), torch.inf)
    for share in CLIPS:
        for k in range(3):
            part, inputs = weight[:, 32 * k : 32 * k + 32], x[:, 32 * k : 32 * k + 32]
            scale = round_to_nearest(part * share, form)  # has the scale of the smaller range
            zero = 2 ** (bits - 1) if scale.zero_point is None else scale.zero_point
            codes = (part / scale.scale + zero).round().clamp(0, 2**bits - 1)
            errors = ((codes - zero) * scale.scale - part) @ inputs.T
            best[:, k] = torch.minimum(best[:, k], errors.square().mean(1))
    error = dequantize(own) - weight
    found = torch.stack(
        [
            (e @ i.T).square().mean(1)
            for e, i in zip(error.split(32, 1), x.split(32, 1), strict=True)
        ],
        1,
    )
    torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-6)
    whole = dequantize(round_to_nearest(weight, form)) - weight
    assert (x @ error.T).square().sum() <= (x @ whole.T).square().sum() * 1.02


def test_inputs_that_are_nothing_do_no_harm(small: Any) -> None:
    model, x = model_of(small, "input"), uneven(50, 64)
    x[:, 8:40] = 0
    own = qwrap.quantize_weights(model, method="awq", batches=[x], block_size=32)
    assert own is not None
    assert max(relative_errors(model, own, x)) < 0.01
    nothing = qwrap.quantize_weights(model, method="awq", batches=[0 * x], block_size=32)
    assert nothing is not None
    assert [n.op_type for n in nothing.graph.node] == ["Identity", "MatMulNBits", "MatMulNBits"]


def test_a_weight_of_two_inputs_is_scaled_for_each(small: Any) -> None:
    nodes = "h = Mul(x, g) y = MatMul(h, w) z = MatMul(x, w)"
    stored = {"g": np.linspace(0.1, 9, 64, dtype=np.float32), "w": (64, 24)}
    model = small.build(nodes, stored, "float[N,64] x", "float[N,24] y, float[N,24] z")
    own = qwrap.quantize_weights(model, method="awq", batches=[uneven(99, 64)], block_size=32)
    assert own is not None
    assert max(relative_errors(model, own, uneven(99, 64, seed=2))) < 0.01


def test_it_refuses_what_it_cannot_work_with(small: Any) -> None:
    model = model_of(small, "input")
    with pytest.raises(ConfigError, match='"awq" needs data'):
        qwrap.quantize_weights(model, method="awq")
    with pytest.raises(InputError, match="no batches"):
        qwrap.quantize_weights(model, method="awq", batches=[])
    with pytest.raises(ConfigError, match="needs calibration data"):
        clip(drawn(4, 64), BlockFormat(4, 32), None)
    with pytest.raises(ConfigError, match="64 inputs, but statistics of 32"):
        clip(drawn(4, 64), BlockFormat(4, 32), statistics_of(drawn(9, 32)))
