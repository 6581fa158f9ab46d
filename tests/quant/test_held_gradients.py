"""When a constant is rounded again, and when the rounded one is taken once more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qwrap.config import QuantSpec
from qwrap.numerics import QParams, fake_quantize
from qwrap.quant import held
from qwrap.quant.stubs import Stub

SPEC = QuantSpec(dtype="int8", axis=0)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one each time a constant is rounded."""
    counted: list[int] = []
    plain = held.rounded

    def counting(*arguments: object, **settings: object) -> object:
        counted.append(len(counted))
        return plain(*arguments, **settings)

    monkeypatch.setattr(held, "rounded", counting)
    return counted


def weight(size: int = 200, training: str = "lsq") -> tuple[Stub, nn.Parameter]:
    stub = Stub("w", SPEC, shape=(2,), stored=True, training_by=training)
    scale = torch.tensor([0.25, 0.5])
    stub.set_qparams(QParams(scale, torch.zeros(2, dtype=torch.int32), 0))
    stub.mode = "quantize"
    generator = torch.Generator().manual_seed(0)
    return stub, nn.Parameter(torch.randn(2, size, generator=generator))


def is_right(stub: Stub, w: Tensor) -> bool:
    expected = fake_quantize(w.detach(), stub.scale, stub.zero_point, SPEC)
    return torch.equal(stub(w), expected)


def step(stub: Stub, w: Tensor, x: float = 1.0) -> None:
    (stub(w) * x).square().sum().backward()


def test_gradients_that_accumulate_round_once(rounds) -> None:
    stub, w = weight()
    for _ in range(4):
        step(stub, w)
    assert is_right(stub, w)
    assert len(rounds) == 1
    optimizer = torch.optim.AdamW([w, *stub.parameters()], lr=0.1)
    optimizer.step()
    optimizer.zero_grad()
    for _ in range(3):
        step(stub, w)
    assert is_right(stub, w)
    assert len(rounds) == 2


def test_forward_passes_before_one_backward_pass_round_once(rounds) -> None:
    stub, w = weight()
    (stub(w) + stub(w)).sum().backward()
    assert is_right(stub, w)
    assert len(rounds) == 1


def through_data(w: nn.Parameter) -> None:
    w.data[0, 1] += 1  # none of the values that are compared


def behind_the_counter(w: nn.Parameter) -> None:
    """What FSDP does when it gathers the shards that an optimizer has changed."""
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(w):
        w[0, 1] += 1


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("write", [through_data, behind_the_counter])
def test_what_no_version_counts_is_seen_by_the_gradient_that_was_reset(
    write: Callable[[nn.Parameter], None], to_none: bool
) -> None:
    stub, w = weight()
    optimizer = torch.optim.SGD([w, *stub.parameters()], lr=0.0)
    for _ in range(3):
        step(stub, w)
        write(w)
        optimizer.zero_grad(set_to_none=to_none)
        assert is_right(stub, w)


def test_a_scale_changed_behind_the_counter_is_seen() -> None:
    stub, w = weight()
    step(stub, w)
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(stub.gain):
        stub.gain += 0.5
    w.grad = stub.gain.grad = None
    assert is_right(stub, w)


def test_another_tensor_in_the_same_memory_is_another_one() -> None:
    stub, w = weight()
    stub(w)
    with torch.no_grad():
        other = nn.Parameter(w.detach())  # as torch.func.functional_call hands them in
        with torch.autograd._unsafe_preserve_version_counter(other):
            other[0, 1] += 1
    assert is_right(stub, other)


def test_a_computed_weight_is_not_held(rounds) -> None:
    stub, w = weight()
    assert is_right(stub, w * 2)
    assert not rounds


def test_a_frozen_weight_with_a_learned_scale_is_right_in_every_step() -> None:
    stub, w = weight()
    w.requires_grad_(False)
    optimizer = torch.optim.SGD(stub.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        step(stub, w)
        optimizer.step()
        assert is_right(stub, w)
