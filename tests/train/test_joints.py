"""The tensors chosen for comparison, on graphs whose joints are known."""

import qwrap
from qwrap.train.joints import joints


def found(source, **settings) -> list[str]:
    return joints(qwrap.load(source).layout, **settings)


def test_a_chain_has_a_joint_behind_each_layer_but_the_last(small) -> None:
    assert found(small.convs()) == ["b"]  # the Relu's, not the Conv's


def residual(small, blocks: int):
    nodes, x = "", "x"
    for i in range(blocks):
        nodes += f"a{i} = Conv<pads=[1,1,1,1]>({x}, w{i}) r{i} = Relu(a{i}) "
        nodes += f"c{i} = Conv<pads=[1,1,1,1]>(r{i}, v{i}) s{i} = Add(c{i}, {x}) "
        x = f"s{i}"
    nodes += f"y = Conv({x}, w)"
    shapes = {f"{k}{i}": (3, 3, 3, 3) for k in "wv" for i in range(blocks)}
    return small.build(nodes, shapes | {"w": (4, 3, 1, 1)})


def test_residual_blocks_are_joined_at_their_ends(small) -> None:
    # The graph input is no activation that depends on weights, so the first block is a chain.
    assert found(residual(small, 4)) == ["r0", "s0", "s1", "s2", "s3"]


def test_of_many_joints_evenly_spaced_ones_are_taken(small) -> None:
    # r0, s0, s1, … s8 are joints; every third of them, counted from the end.
    assert found(residual(small, 9), most=4) == ["r0", "s2", "s5", "s8"]


def test_a_long_skip_lets_activations_beside_it_count(small) -> None:
    nodes = "a = Conv<pads=[1,1,1,1]>(x, w0) "
    for i, x in enumerate(["a", "b0", "b1", "b2", "b3", "b4"]):
        nodes += f"b{i} = Conv<pads=[1,1,1,1]>({x}, w{i + 1}) "
    nodes += "s = Add(a, b5) y = Conv(s, w)"
    weights = {f"w{i}": (3, 3, 3, 3) for i in range(7)} | {"w": (4, 3, 1, 1)}
    chosen = found(small.build(nodes, weights))
    assert chosen == ["a", "b0", "b1", "b2", "b3", "b4", "s"]


def test_a_mask_computed_without_weights_is_no_activation(small) -> None:
    nodes = """
        m = Cast<to=1>(mask) a = Conv<pads=[1,1,1,1]>(x, w1) b = Mul(a, m)
        c = Conv<pads=[1,1,1,1]>(b, w2) d = Mul(c, m) y = Conv(d, w3)
    """
    source = small.build(
        nodes,
        {"w1": (3, 3, 3, 3), "w2": (3, 3, 3, 3), "w3": (4, 3, 1, 1)},
        inputs="float[N,3,8,8] x, int64[N,1,8,8] mask",
    )
    assert found(source) == ["b", "d"]


def test_values_moved_behind_a_joint_are_left_to_those_computed(small) -> None:
    nodes = "a = Conv(x, w1) b = Relu(a) c = Flatten(b) y = MatMul(c, w2)"
    source = small.build(nodes, {"w1": (2, 3, 1, 1), "w2": (128, 4)}, outputs="float[N,4] y")
    assert found(source) == ["b"]


def test_a_graph_of_one_layer_has_none(small) -> None:
    assert found(small.build("y = Conv(x, w)", {"w": (4, 3, 1, 1)})) == []
    assert found(small.build("y = Relu(x)", {})) == []
