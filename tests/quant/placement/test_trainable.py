"""Which scales are learned, by default and when the user says so."""

import pytest

import qwrap


@pytest.mark.parametrize(
    ("activation", "training", "asked", "expected"),
    [
        ("uint8", "lsq", None, "fixed"),  # the data of an input stay as they were calibrated
        ("uint8", "lsq+", None, "fixed"),
        ("uint8", "follow", None, "follow"),
        ("uint8", "lsq", "lsq+", "lsq+"),
        ("uint4", "lsq", None, "lsq"),  # with few codes every one of them counts
    ],
)
def test_the_scale_of_a_graph_input_is_learned_when_asked_for_or_coarse(
    small, activation, training, asked, expected
) -> None:
    weights = {"w1": (8, 3, 3, 3), "w2": (4, 8, 3, 3)}
    model = qwrap.load(small.build("a = Conv(x, w1) y = Conv(a, w2)", weights, opset=21))
    config = qwrap.QConfig(activation=activation, training=training, scope="kernels")
    if asked is not None:
        config.set("x", training=asked)
    plan = qwrap.prepare(model, config)
    assert plan.tensors["x"].training == expected
    assert plan.tensors["a"].training == training
