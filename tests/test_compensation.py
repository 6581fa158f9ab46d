"""The solver of GPTQ against closed forms."""

import torch

from qwrap.compensation import compensate


def nearest(rest: torch.Tensor, _inputs: torch.Tensor) -> torch.Tensor:
    return rest[:, 0].round()


def test_with_uncorrelated_inputs_every_weight_is_rounded_to_nearest() -> None:
    weight = torch.randn(2, 200, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    power = torch.rand(2, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    power[:, 7] = 0
    rounded = compensate(weight * 50, torch.diag_embed(power), nearest, 0.01)
    assert torch.equal(rounded, (weight * 50).round())


def test_two_correlated_inputs_are_rounded_as_worked_out_by_hand() -> None:
    weight = torch.tensor([[[0.4], [0.4]]], dtype=torch.float64)
    second = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]], dtype=torch.float64)
    # 0.4 -> 0; the second weight then wants 0.4 + 0.4 * 0.9 / 1.01 = 0.756 -> 1
    assert compensate(weight, second, nearest, 0.01).flatten().tolist() == [0.0, 1.0]


def test_inputs_that_never_change_are_left_out() -> None:
    weight = torch.tensor([[[0.4], [1.4], [0.4]]], dtype=torch.float64)
    second = torch.tensor([[[1.0, 0, 0.9], [0, 0, 0], [0.9, 0, 1.0]]], dtype=torch.float64)
    # A third of the mean power is missing, so that the damping is 0.01 * 2 / 3; as above else.
    assert compensate(weight, second, nearest, 0.01).flatten().tolist() == [0.0, 1.0, 1.0]
