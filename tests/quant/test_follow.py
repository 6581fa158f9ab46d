"""Scales that go with the data, then stay."""

import pytest
import torch

from qwrap.config import QuantSpec
from qwrap.numerics import choose_qparams
from qwrap.quant.observe.observers import MinMaxObserver
from qwrap.quant.stubs import Stub

U8 = QuantSpec(dtype="uint8", symmetric=False)
W8 = QuantSpec(dtype="int8", axis=0)


def activation(x, weight=0.25):
    stub = Stub("t", U8, observer=MinMaxObserver("t", ema=weight), training_by="follow")
    stub.observer.observe(x)
    stub.set_qparams(choose_qparams(x.min(), x.max(), U8))
    stub.mode = "quantize"
    return stub


def test_an_activation_follows_the_moving_average_of_its_extremes() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 50, generator=generator) * (1 + k) for k in range(5)]
    stub = activation(batches[0])
    low, high = batches[0].min().double(), batches[0].max().double()
    for x in batches[1:]:
        stub(x)
        low, high = 0.75 * low + 0.25 * x.min(), 0.75 * high + 0.25 * x.max()
        wanted = choose_qparams(low.float(), high.float(), U8)
        torch.testing.assert_close(stub.scale, wanted.scale, rtol=1e-6, atol=0)
        assert torch.equal(stub.zero_point, wanted.zero_point)


def test_a_weight_follows_its_own_extremes() -> None:
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    stub = Stub("w", W8, (3,), stored=True, training_by="follow")
    stub.set_qparams(choose_qparams(-torch.ones(3), torch.ones(3), W8))
    stub.mode = "quantize"
    stub((3 * weight).requires_grad_())
    assert torch.equal(stub.scale, choose_qparams(*torch.aminmax(3 * weight, dim=1), W8).scale)


@pytest.mark.parametrize("stop", ["frozen", "evaluation", "float", "observe"])
def test_it_only_follows_while_it_trains_and_quantizes(stop) -> None:
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    stub = activation(x)
    if stop == "frozen":
        stub.following = False
    elif stop == "evaluation":
        stub.eval()
    else:
        stub.mode = stop
    before = stub.scale.clone()
    stub(10 * x)
    assert torch.equal(stub.scale, before)


def test_no_followed_scale_passes_its_limit() -> None:
    x = torch.rand(4, 50, generator=torch.Generator().manual_seed(0))
    stub = activation(x, weight=1.0)
    limit = float(stub.scale) * 1.5
    stub.scale_limit.fill_(limit)
    stub(10 * x)
    assert stub.scale.tolist() == stub.scale_limit.tolist()


def test_whether_it_follows_is_saved() -> None:
    x = torch.rand(4, 50)
    stub, other = activation(x), activation(x)
    stub.following = False
    other.load_state_dict(stub.state_dict())
    assert not other.following


def test_the_gradient_passes_straight_through_and_nothing_is_learned() -> None:
    x = torch.rand(4, 50, generator=torch.Generator().manual_seed(0))
    stub = activation(x)
    stub(x.requires_grad_()).backward(torch.full((4, 50), 3.0))
    assert torch.equal(x.grad, torch.full((4, 50), 3.0))
    assert not list(stub.parameters())
