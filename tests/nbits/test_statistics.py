"""Statistics of the inputs of products against closed forms over all rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from onnx import ModelProto
from torch import Tensor

import qwrap
from qwrap.errors import ConfigError, InputError
from qwrap.nbits.statistics import InputStatistics, observe

pytestmark = pytest.mark.ort(296)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_they_are_those_of_all_rows_in_memory_that_does_not_grow() -> None:
    batches = [drawn(2, 1500, 12, seed=i) + 30 for i in range(4)]
    found, sizes = InputStatistics(), set()
    for batch in batches:
        found.add(batch)
        held = [v for v in vars(found).values() if isinstance(v, Tensor)]
        sizes.add(sum(v.numel() for v in held))
    rows = torch.cat(batches, 1).reshape(-1, 12).double()
    assert sizes == {12 + 12 * 12}
    assert found.rows == len(rows) == 12000
    # Products are summed over 2048 rows in float32, which is good to some 1e-6 of them.
    torch.testing.assert_close(found.second, rows.T @ rows / 12000, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.size, rows.abs().mean(0), rtol=1e-7, atol=0)


def test_they_are_right_for_inputs_that_are_divided() -> None:
    x, scale = drawn(100, 8), drawn(8).exp()
    whole, divided = InputStatistics(), InputStatistics()
    whole.add(x)
    divided.add(x / scale)
    found = whole.divided(scale)
    assert found.rows == 100
    torch.testing.assert_close(found.second, divided.second, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.size, divided.size, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_floats_are_summed_up_as_well(dtype: torch.dtype) -> None:
    x = (100 * drawn(5000, 4)).to(dtype)
    found = InputStatistics()
    found.add(x)
    exact = x.double().T @ x.double() / 5000
    torch.testing.assert_close(found.second, exact, rtol=1e-5, atol=1e-2)  # of some 1e4


def test_what_is_not_finite_or_of_another_width_is_refused() -> None:
    found = InputStatistics()
    found.add(drawn(3, 4)[:0])
    assert found.rows == 0
    found.add(drawn(4))
    assert found.rows == 1
    with pytest.raises(InputError, match="5 inputs, and 4 before"):
        found.add(drawn(3, 5))
    with pytest.raises(InputError, match="NaN or infinite"):
        found.add(torch.full((1, 4), torch.inf))


TWO = "a = MatMul(x, w1) b = MatMul(x, w2) c = Add(a, b) y = MatMul(c, w3)"


def two(small: object) -> ModelProto:
    build: Callable[..., ModelProto] = small.build  # type: ignore[attr-defined]
    weights = {"w1": (8, 6), "w2": (8, 6), "w3": (6, 4)}
    return build(TWO, weights, "float[N,8] x", "float[N,M] y")


def test_tensors_of_a_model_are_observed_in_one_pass(small: object) -> None:
    model = qwrap.load(two(small)).train()
    batches = [drawn(7, 8, seed=i) for i in range(3)]
    found = observe(model, ["x", "c", "x"], iter(batches))
    assert list(found) == ["x", "c"]
    assert model.training
    x = torch.cat(batches).double()
    w1, w2 = (model.stored(name).detach().double() for name in ("w1", "w2"))
    c = x @ (w1 + w2)
    torch.testing.assert_close(found["x"].second, x.T @ x / 21, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["c"].second, c.T @ c / 21, rtol=1e-4, atol=1e-5)


def test_a_tensor_in_the_body_of_a_loop_counts_every_time(small: object) -> None:
    nodes = """
        y, z = Loop(three, , x) <body = inner (int64 i, bool go, float[N,8] s)
            => (bool on, float[N,8] t, float[N,8] u)
            { on = Identity(go) t = MatMul(s, w) u = Identity(t) }>
    """
    stored = {"three": np.array(3), "w": np.eye(8, dtype=np.float32) * 2}
    build = small.build  # type: ignore[attr-defined]
    proto = build(nodes, stored, "float[N,8] x", "float[N,8] y, float[M,N,8] z")
    found = observe(qwrap.load(proto), ["s"], [drawn(5, 8)])["s"]
    assert found.rows == 15
    x = drawn(5, 8).double()
    torch.testing.assert_close(found.second, (1 + 4 + 16) * x.T @ x / 15, rtol=1e-5, atol=1e-5)


def test_data_that_shows_nothing_is_refused(small: object) -> None:
    model = qwrap.load(two(small))
    with pytest.raises(InputError, match="no batches"):
        observe(model, ["x"], [])
    with pytest.raises(ConfigError, match=r"tensors \['c', 'x'\] got no values"):
        observe(model, ["c", "x"], [drawn(0, 8)])
    with pytest.raises(InputError, match="tensor 'c': values are NaN or infinite"):
        observe(model, ["c"], [torch.full((2, 8), 3e38)])
