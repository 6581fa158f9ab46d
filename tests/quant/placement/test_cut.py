"""What is worth an integer kernel, on layers at both ends of the scale."""

import qwrap
from qwrap.quant.placement.nodes import TOO_DEAR


def roles(small, nodes: str, weights: dict, **config: object) -> dict[str, str]:
    model = qwrap.load(small.build(nodes, weights))
    plan = qwrap.prepare(model, qwrap.QConfig(**config))
    return {
        key: (node.role if node.role != "float" else node.reason)
        for key, node in plan.nodes.items()
    }


WIDE = "a = Conv(x, w) b = Conv(a, v) y = Conv(b, u)"
WIDE_WEIGHTS = {"w": (256, 3, 1, 1), "v": (256, 256, 3, 3), "u": (64, 256, 1, 1)}
NARROW = "y = Conv(x, w)"
NARROW_WEIGHTS = {"w": (4, 3, 1, 1)}


def test_a_wide_convolution_pays_for_its_conversions(small) -> None:
    assert roles(small, WIDE, WIDE_WEIGHTS)["/b"] == "integer"


def test_a_lone_narrow_one_does_not_and_says_so(small) -> None:
    assert roles(small, NARROW, NARROW_WEIGHTS) == {"/y": TOO_DEAR}
    assert roles(small, NARROW, NARROW_WEIGHTS, scope="kernels") == {"/y": "integer"}


def test_a_narrow_one_joins_the_wide_ones_around_it(small) -> None:
    """Float in between would cost two conversions of a wide tensor."""
    nodes = "a = Conv(x, w) b = Conv(a, v) c = Conv<group=256>(b, d) y = Conv(c, u)"
    found = roles(small, nodes, WIDE_WEIGHTS | {"d": (256, 1, 3, 3)})
    assert [found[key] for key in ("/a", "/b", "/c", "/y")] == ["integer"] * 4
