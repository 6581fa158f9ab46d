"""Small calibrated models to train."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest

import qwrap


@pytest.fixture
def calibrated(small) -> Callable[..., qwrap.WrappedModel]:
    """``calibrated(source=None, batches=None, **settings)``: everything quantized."""

    def calibrated(
        source: onnx.ModelProto | None = None,
        batches: Sequence[object] | None = None,
        **settings: object,
    ) -> qwrap.WrappedModel:
        model = qwrap.load(source or small.convs())
        qwrap.prepare(model, qwrap.QConfig(**{"scope": "kernels", **settings}))
        qwrap.calibrate(model, batches or small.batches(), progress=False)
        return model

    return calibrated


@pytest.fixture
def tokens(small) -> onnx.ModelProto:
    """Token vectors under a mask: ids and mask ``[N, L]`` to hidden states ``[N, L, 8]``."""
    nodes = """
        e = Gather(table, ids) k = Cast<to=1>(attention_mask) axes = Constant<value_ints=[2]>()
        u = Unsqueeze(k, axes) m = Mul(e, u) h = MatMul(m, w1) r = Relu(h)
        hidden = MatMul(r, w2)
    """
    return small.build(
        nodes,
        {"table": (20, 8), "w1": (8, 8), "w2": (8, 8)},
        inputs="int64[N,L] ids, int64[N,L] attention_mask",
        outputs="float[N,L,8] hidden",
    )


@pytest.fixture
def texts() -> list[dict[str, np.ndarray]]:
    """Batches for ``tokens``, the second half of each row padding."""
    rng = np.random.default_rng(0)
    mask = np.repeat([[1, 1, 1, 0, 0, 0]], 4, 0)
    return [{"ids": rng.integers(0, 20, (4, 6)), "attention_mask": mask} for _ in range(3)]


@pytest.fixture(scope="session")
def residual(small) -> onnx.ModelProto:
    """Blocks of a residual network; the bias in one has its scale from another one."""
    nodes = """
        a = Conv<pads=[1,1,1,1]>(x, w1, b1) b = Relu(a)
        c = Conv<pads=[1,1,1,1]>(b, w2, b2) d = Relu(c)
        e = Conv<pads=[1,1,1,1]>(d, w3, b3) f = Add(b, e)
        y = Conv(f, w4, b4)
    """
    weights = {"w1": (6, 3, 3, 3), "w2": (6, 6, 3, 3), "w3": (6, 6, 3, 3), "w4": (4, 6, 1, 1)}
    biases = {f"b{name[1]}": shape[:1] for name, shape in weights.items()}
    model = small.build(nodes, weights | biases)
    scopes = {"stem": "ab", "body/0": "cd", "body/1": "e", "body/2": "f", "head": "y"}
    for node in model.graph.node:
        scope = next(s for s, names in scopes.items() if node.output[0] in names)
        node.name = f"/{scope}/{node.op_type}"
    return model
