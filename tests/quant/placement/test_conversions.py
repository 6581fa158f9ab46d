"""Which types tensors have between nodes of several types."""

from __future__ import annotations

from typing import Any

import qwrap


def test_nothing_is_moved_in_fewer_bits_than_its_readers_ask_for(small: Any) -> None:
    nodes = (
        "a = Conv<pads=[1,1,1,1]>(x, w1) y = Conv(a, w2) m = MaxPool<kernel_shape=[2,2]>(a) "
        "z = Conv(m, w3)"
    )
    weights = {"w1": (6, 3, 3, 3), "w2": (4, 6, 3, 3), "w3": (4, 6, 3, 3)}
    model = qwrap.load(small.build(nodes, weights, outputs="float[N,4,6,6] y, float[N,4,5,5] z"))
    config = qwrap.QConfig(scope="all")
    config.set("/y", activation="int4")
    config.set("/z", activation="uint16")
    plan = qwrap.prepare(model, config)
    kinds = {key: str(tensor.spec.dtype) for key, tensor in plan.tensors.items()}
    assert kinds["m"] in ("uint8", "uint16")  # through int4 it would cost as many conversions
