"""Groups of nodes that share a choice."""

from typing import Any

import pytest

import qwrap
from qwrap.errors import ConfigError
from qwrap.mixed.choices import (
    CHOICES,
    FLOAT,
    Choice,
    Group,
    check_assignment,
    config_with,
    groups_of,
)

RESIDUAL = """
    c1 = Conv<pads=[1,1,1,1]>(x, w1)
    r1 = Relu(c1)
    c2 = Conv<pads=[1,1,1,1]>(r1, w2)
    a = Add(c2, r1)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)
    c3 = Conv(p, w3)
    c4 = Conv(p, w4)
    k = Concat<axis=1>(c3, c4)
    y = Conv(k, w5)
"""
WEIGHTS = {
    "w1": (4, 3, 3, 3),
    "w2": (4, 4, 3, 3),
    "w3": (4, 4, 1, 1),
    "w4": (4, 4, 1, 1),
    "w5": (4, 8, 1, 1),
}


def nodes_of(small: Any, by: str) -> dict[str, tuple[str, ...]]:
    model = qwrap.load(small.build(RESIDUAL, WEIGHTS))
    return {group.name: group.nodes for group in groups_of(model, by=by)}


def test_a_layer_takes_what_follows_it_and_a_concat_begins_a_group(small: Any) -> None:
    assert nodes_of(small, "layer") == {
        "/c1": ("/c1", "/r1"),
        "/c2": ("/c2", "/a"),
        "/c3": ("/c3",),
        "/c4": ("/c4",),
        "/k": ("/k",),
        "/y": ("/y",),
    }


def test_by_node_only_an_absorbed_activation_has_no_group_of_its_own(small: Any) -> None:
    assert nodes_of(small, "node") == {
        "/c1": ("/c1", "/r1"),
        "/c2": ("/c2",),
        "/a": ("/a",),
        "/c3": ("/c3",),
        "/c4": ("/c4",),
        "/k": ("/k",),
        "/y": ("/y",),
    }


def test_nodes_that_read_one_weight_share_a_group(small: Any) -> None:
    model = small.build(
        "a = Conv(x, w)\n r = Relu(a)\n b = Conv(r, v)\n y = Conv(b, w)",
        {"w": (3, 3, 1, 1), "v": (3, 3, 1, 1)},
    )
    groups = groups_of(qwrap.load(model))
    assert [g.nodes for g in groups] == [("/a", "/r", "/y"), ("/b",)]


def test_a_block_goes_to_the_first_number_of_its_path(small: Any) -> None:
    model = small.build(RESIDUAL, WEIGHTS)
    names = ["/b.0/c1/Conv", "/b.0/Relu", "/b.0/c2/Conv", "/b.0/Add", "/b.1/Pool", "/b.1/c3/Conv"]
    for node, name in zip(
        model.graph.node, [*names, "/b.1/c4/Conv", "/b.1/Cat", "/y"], strict=True
    ):
        node.name = name
    groups = groups_of(qwrap.load(model), by="block")
    assert [len(g.nodes) for g in groups] == [4, 3, 1]


def test_excluded_nodes_are_in_no_group(small: Any) -> None:
    config = qwrap.QConfig(excluded=["/c2"])
    model = qwrap.load(small.build(RESIDUAL, WEIGHTS))
    members = {key for group in groups_of(model, config) for key in group.nodes}
    assert "/c2" not in members
    assert "/c1" in members
    assert model.plan is None  # a copy was prepared


def test_what_the_user_has_settled_is_in_no_group(small: Any) -> None:
    config = qwrap.QConfig()
    config.set("/c2", activation="uint16")
    config.set("/c3", activation="float32")
    model = qwrap.load(small.build(RESIDUAL, WEIGHTS))
    members = {key for group in groups_of(model, config) for key in group.nodes}
    assert members == {"/c1", "/r1", "/a", "/c4", "/k", "/y"}
    config.set("*", activation="uint16")
    with pytest.raises(ConfigError, match="nothing to choose for"):
        groups_of(model, config)


def test_each_group_has_the_types_of_its_choice(small: Any) -> None:
    model = qwrap.load(small.build(RESIDUAL, WEIGHTS))
    groups = groups_of(model)
    assignment = {group.name: CHOICES[0] for group in groups}
    assignment |= {"/c2": CHOICES[1], "/k": FLOAT}
    plan = qwrap.prepare(model, config_with(qwrap.QConfig(), groups, assignment))
    assert {key: node.dtype for key, node in plan.nodes.items()} == {
        "/c1": "uint8",
        "/r1": "uint8",
        "/c2": "uint16",
        "/a": "uint16",
        "/p": "uint8",
        "/c3": "uint8",
        "/c4": "uint8",
        "/k": "",
        "/y": "uint8",
    }


def test_types_of_the_config_keep_all_that_it_says_of_them(small: Any) -> None:
    config = qwrap.QConfig(weight=qwrap.QuantSpec(dtype="int8", reduce_range=True))
    groups = groups_of(qwrap.load(small.build(RESIDUAL, WEIGHTS)))
    result = config_with(config, groups, {group.name: CHOICES[0] for group in groups})
    assert [region.weight for region in result.regions] == [config.weight] * len(groups)
    assert not config.regions


def test_a_group_has_the_choices_that_the_target_runs(small: Any) -> None:
    model = qwrap.load(small.build(RESIDUAL, WEIGHTS))
    choices = [*CHOICES[:2], Choice("uint16", "int4"), Choice("uint16", "int16")]
    config = qwrap.QConfig.for_target("qnn")
    found = {group.name: group.choices for group in groups_of(model, config, choices)}
    assert found["/c1"] == tuple(choices[:3])
    config = qwrap.QConfig.for_target("openvino")
    found = {group.name: group.choices for group in groups_of(model, config, choices)}
    assert found["/c1"] == (choices[0],)
    with pytest.raises(
        ConfigError, match=r"'openvino' runs it in none of uint16/int8, uint16/int4"
    ):
        groups_of(model, config, choices[1:])


def test_without_a_weight_choices_that_differ_in_its_type_alone_are_one(small: Any) -> None:
    choices = [Choice("uint8", "int4"), Choice("uint8", "int8"), Choice("float32", "int8"), FLOAT]
    model = qwrap.load(small.build(RESIDUAL, WEIGHTS))
    found = {group.name: group.choices for group in groups_of(model, choices=choices)}
    assert found["/c1"] == tuple(choices)
    assert found["/k"] == (choices[0], FLOAT)


@pytest.mark.parametrize(
    "choice", [*CHOICES, Choice("float32", "int8"), Choice("float16", "float16")]
)
def test_a_choice_is_read_as_it_is_written(choice: Choice) -> None:
    assert Choice.parse(str(choice)) == choice


def test_a_choice_of_an_unknown_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="word8"):
        Choice("word8", "int8")
    with pytest.raises(ConfigError, match="choose float16/float16"):
        Choice("float16", "int4")
    with pytest.raises(ConfigError, match="give the types of activations and weights"):
        Choice.parse("uint8")


def test_one_choice_is_no_choice(small: Any) -> None:
    model = qwrap.load(small.build("y = Conv(x, w)", {"w": (3, 3, 1, 1)}))
    with pytest.raises(ConfigError, match="give two or more"):
        groups_of(model, choices=[FLOAT, FLOAT])
    with pytest.raises(ConfigError, match="by='row'"):
        groups_of(model, by="row")  # type: ignore[arg-type]


def test_an_assignment_gives_every_group_one_of_its_choices() -> None:
    groups = [Group("a", ("a",), CHOICES), Group("b", ("b",), (CHOICES[0], FLOAT))]
    check_assignment(groups, {"a": FLOAT, "b": FLOAT})
    with pytest.raises(ConfigError, match="no group 'c'"):
        check_assignment(groups, {"a": FLOAT, "b": FLOAT, "c": FLOAT})
    with pytest.raises(ConfigError, match="group 'b': None is none of its choices"):
        check_assignment(groups, {"a": FLOAT})
    with pytest.raises(ConfigError, match="group 'b': uint16/int8"):
        check_assignment(groups, {"a": FLOAT, "b": CHOICES[1]})
