"""Which parameters an optimizer treats alike."""

import pytest
import torch
from torch import nn

import qwrap
from qwrap.errors import ConfigError


class User(nn.Module):
    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models, self.head, self.norm = nn.ModuleList(models), nn.Linear(4, 2), nn.LayerNorm(4)


@pytest.fixture
def make(small):
    def make(training="lsq", **settings):
        source = small.convs()
        model = qwrap.load(source)
        config = qwrap.QConfig(scope="kernels", training=training, **settings)
        if training == "lsq+":
            config.set("b", training="pact")
        qwrap.prepare(model, config)
        qwrap.calibrate(model, small.batches(), progress=False)
        return model

    return make


def by_name(groups):
    return {group["name"]: group for group in groups}


def names(model, group):
    known = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
    return sorted(known[id(p)] for p in group["params"])


def test_groups_hold_what_their_names_say(make) -> None:
    model = User(make("lsq+"))
    groups = by_name(qwrap.param_groups(model))
    assert set(groups) == {"weights", "no_decay", "scales", "zero_points", "clips"}
    assert set(names(model, groups["scales"])) == {"gain"}
    assert names(model, groups["zero_points"]) == ["shift"]  # y; x is given
    assert names(model, groups["clips"]) == ["alpha"]
    assert all(p.dim() > 1 for p in groups["weights"]["params"])
    assert names(model, groups["weights"]) == ["w1", "w2", "weight"]
    assert names(model, groups["no_decay"]) == ["b1", "b2", "bias", "bias", "weight"]


def test_scales_of_weights_are_a_group_of_their_own_where_they_have_a_rate(make) -> None:
    model = make("lsq")
    groups = by_name(qwrap.param_groups(model, lr=1.0, scale_lr=0.5, weight_scale_lr=0.25))
    shapes = {name: sorted(p.numel() for p in groups[name]["params"]) for name in groups}
    # One for each channel; that of the graph input is not learned unless asked for.
    assert (shapes["scales"], shapes["weight_scales"]) == ([1, 1], [4, 6])
    assert {name: group["lr"] for name, group in groups.items()} == {
        "weights": 1.0,
        "no_decay": 1.0,
        "scales": 0.5,
        "weight_scales": 0.25,
    }


@pytest.mark.parametrize("way", ["fixed", "follow", "lsq", "lsq+", "pact"])
def test_every_trainable_parameter_is_in_one_group_once(make, way) -> None:
    model = User(make(way), make("lsq"))
    model.head.bias.requires_grad_(False)
    grouped = [id(p) for group in qwrap.param_groups(model) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_shared_parameter_is_there_once(make) -> None:
    model = make()
    user = User(model, model)
    user.head.weight = user.norm.weight  # tied, as an embedding and its output are
    grouped = [id(p) for group in qwrap.param_groups(user) for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(user.parameters()))


def test_only_weights_and_clips_decay(make) -> None:
    groups = by_name(qwrap.param_groups(User(make("lsq+")), weight_decay=0.1))
    decays = {name: group["weight_decay"] for name, group in groups.items()}
    assert decays == {
        "weights": 0.1,
        "clips": 0.1,
        "no_decay": 0.0,
        "scales": 0.0,
        "zero_points": 0.0,
    }


def test_rates_fall_back_on_the_more_general_one(make) -> None:
    model = User(make("lsq+"))

    def rates(**settings):
        return {n: g.get("lr") for n, g in by_name(qwrap.param_groups(model, **settings)).items()}

    assert set(rates().values()) == {None}
    assert set(rates(lr=0.1).values()) == {0.1}
    given = rates(lr=0.1, scale_lr=0.01)
    assert given == {
        "weights": 0.1, "no_decay": 0.1, "scales": 0.01, "clips": 0.01, "zero_points": 0.01,
    }  # fmt: skip
    assert rates(lr=0.1, scale_lr=0.01, zero_point_lr=0.0)["zero_points"] == 0.0
    assert rates(scale_lr=0.01)["weights"] is None


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_any_optimizer_takes_them(make, kind) -> None:
    optimizer = kind(qwrap.param_groups(make(), scale_lr=1e-4), lr=0.1)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
        "weights": 0.1,
        "no_decay": 0.1,
        "scales": 1e-4,
    }


def test_a_compiled_model_has_the_same_groups(make) -> None:
    model = make("lsq+")
    compiled = torch.compile(model, backend="eager")
    plain, wrapped = qwrap.param_groups(model), qwrap.param_groups(compiled)
    assert [[id(p) for p in g["params"]] for g in plain] == [
        [id(p) for p in g["params"]] for g in wrapped
    ]


def test_a_model_with_nothing_to_train_is_an_error(make) -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        qwrap.param_groups(make().requires_grad_(False))


@pytest.mark.parametrize(
    "name", ["lr", "weight_decay", "scale_lr", "zero_point_lr", "weight_scale_lr"]
)
@pytest.mark.parametrize("value", [-1e-4, float("nan")])
def test_a_rate_below_zero_is_an_error(make, name, value) -> None:
    with pytest.raises(ConfigError, match=rf"{name}=.*expected 0 or more"):
        qwrap.param_groups(make(), **{name: value})
