"""A weight is rounded once for each value it has, and never once too seldom."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qwrap.config import QuantSpec
from qwrap.numerics import choose_qparams, fake_quantize
from qwrap.quant import held
from qwrap.quant.stubs import Stub

SPEC = QuantSpec(dtype="int8", axis=0, narrow_range=True)


@pytest.fixture
def roundings(monkeypatch):
    """Counts how often a constant is rounded."""
    calls = []

    def counted(*args, **settings):
        calls.append(None)
        return rounded(*args, **settings)

    rounded = held.rounded
    monkeypatch.setattr(held, "rounded", counted)
    return calls


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 300))
        self.stub = Stub("w", SPEC, (8,), stored=True, training_by="lsq")
        ends = self.weight.detach().abs().amax(1)
        self.stub.set_qparams(choose_qparams(-ends, ends, SPEC))
        self.stub.mode = "quantize"

    def forward(self):
        return self.stub(self.weight)


def fresh(layer):
    return fake_quantize(layer.weight.detach(), layer.stub.scale, layer.stub.zero_point, SPEC)


def test_it_is_rounded_once_for_a_step_of_many_forward_passes(roundings) -> None:
    layer = Layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        for _ in range(4):
            result = layer()
            assert torch.equal(result, fresh(layer))
            result.square().sum().backward()
        assert len(roundings) == step + 1
        optimizer.step()


def written_in_place(layer):
    layer.weight.data.mul_(0.5)


def replaced(layer):
    layer.weight.data = layer.weight.data + 0.1


def one_element_written(layer):
    with torch.no_grad():
        layer.weight[3, 7] += 0.5


def loaded(layer):
    other = Layer()
    with torch.no_grad():
        other.weight.mul_(2)
        other.stub.get_parameter("gain").add_(0.3)
    layer.load_state_dict(other.state_dict())


def scaled(layer):
    with torch.no_grad():
        layer.stub.get_parameter("gain").sub_(0.2)


def calibrated(layer):
    layer.stub.set_qparams(choose_qparams(-torch.ones(8), torch.ones(8), SPEC))


def frozen(layer):
    scaled(layer)
    layer.stub.learning = False


@pytest.mark.parametrize(
    "change",
    [written_in_place, replaced, one_element_written, loaded, scaled, calibrated, frozen],
)
def test_it_is_rounded_again_after_a_change(change) -> None:
    layer = Layer()
    before = layer().detach().clone()
    change(layer)
    assert torch.equal(layer(), fresh(layer))
    assert not torch.equal(layer(), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_rounds_its_own_weight(copied) -> None:
    layer = Layer()
    layer()
    other = copied(layer)
    with torch.no_grad():
        other.weight.neg_()
    assert torch.equal(other(), fresh(other))
    assert torch.equal(layer(), fresh(layer))


def test_what_is_handed_out_can_be_used_in_two_graphs() -> None:
    layer = Layer()
    first, second = layer(), layer()
    (first.sum() + 2 * second.sum()).backward()
    assert torch.equal(layer.weight.grad, torch.full((8, 300), 3.0))


def test_without_gradients_nothing_is_held() -> None:
    layer = Layer()
    layer()
    with torch.no_grad():
        layer()
    assert layer.stub._held is None


def test_a_state_dict_restores_scales_bit_for_bit_through_a_file(tmp_path) -> None:
    layer, other = Layer(), Layer()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        layer().square().sum().backward()
        optimizer.step()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(other.stub.scale, layer.stub.scale)
    assert torch.equal(other(), layer())


def test_in_float_mode_parameters_stay_in_the_graph_with_no_gradient() -> None:
    layer = Layer()
    layer.stub.mode = "float"
    result = layer()
    assert torch.equal(result, layer.weight)
    result.sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones(8, 300))
    assert torch.equal(layer.stub.get_parameter("gain").grad, torch.zeros(8))
