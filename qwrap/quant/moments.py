"""Mean and variance of channels: of all batches together, and of one batch on several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from qwrap.quant.observe.sync import summed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # missing where torch was built without


class Moments:
    """Adds up the mean and variance of each channel over batches, as if they were one.

    Attributes:
        count: values seen of each channel.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self._mean = torch.zeros(channels, dtype=torch.float64)
        self._squares = torch.zeros(channels, dtype=torch.float64)  # of deviations from the mean

    @torch.no_grad()
    def add(self, y: Tensor, shift: Tensor | None = None) -> None:
        """Add ``y`` ``[N, C, ...]``, and ``shift`` ``[C]`` to each of its values."""
        count = y.numel() // y.shape[1] if y.numel() else 0
        if not count:
            return
        axes = [axis for axis in range(y.dim()) if axis != 1]
        variance, mean = torch.var_mean(y.float(), axes, correction=0)
        mean = mean.double() if shift is None else mean.double() + shift.double()
        self._merge(count, mean, variance.double() * count)

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """Take in the moments of more values.

        Source: Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing
        sample variances, 1979, equation 2.1.
        """
        self._mean, self._squares = self._mean.to(mean), self._squares.to(mean)
        total = self.count + count
        difference = mean - self._mean
        self._squares += squares + difference.square() * (self.count * count / total)
        self._mean += difference * (count / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, float64 ``[C]``."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Variance of each channel, unbiased, float64 ``[C]``."""
        return self._squares / max(self.count - 1, 1)


def merge_moments(
    moments: Sequence[Moments], home: torch.device, group: ProcessGroup | None = None
) -> None:
    """Give each of ``moments`` what its counterparts on all ranks saw, in place.

    Args:
        moments: those of the same layers in the same order on every rank.
        home: the device of the model.
        group: the ranks, all if None.
    """
    for one in moments:
        sizes = torch.full_like(one._mean, one.count)
        total, sums = summed(torch.stack((sizes, one._mean * one.count)).to(home), home, group)
        mean = (sums / total.clamp(min=1)).to(one._mean)
        squares = one._squares + one.count * (one._mean - mean).square()
        one._squares = summed(squares.to(home), home, group).to(mean)
        one._mean, one.count = mean, int(total.flatten()[0]) if total.numel() else one.count


def normalized_over_ranks(
    y: Tensor, eps: float, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch with mean 0 and variance 1 in each channel over all ranks, and these two.

    Every rank has to call this; gradients go through the statistics, over all ranks.

    Args:
        y: this rank's share, ``[N, C, ...]``.
        eps: added to the variance.
        group: the ranks, all if None.

    Returns:
        The values, their mean ``[C]``, and their variance, unbiased, ``[C]``.
    """
    wide = y.float()
    axes = [axis for axis in range(y.dim()) if axis != 1]
    shape = (1, -1, *[1] * (y.dim() - 2))
    ours = wide.new_tensor([y.numel() / max(y.shape[1], 1)])
    sums = _sum_over_ranks(torch.cat((wide.sum(axes), ours)), group)
    count, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
    centred = wide - mean.reshape(shape)
    squares = _sum_over_ranks(centred.square().sum(axes), group)
    result = centred * (squares / count + eps).rsqrt().reshape(shape)
    return result.to(y.dtype), mean.detach(), (squares / (count - 1).clamp(min=1)).detach()


def _sum_over_ranks(values: Tensor, group: ProcessGroup | None) -> Tensor:
    result: Tensor = _Sum.apply(values, group)  # type: ignore[no-untyped-call]  # torch has no stub
    return result


class _Sum(torch.autograd.Function):
    """The sum over ranks of values, and of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, dist.ReduceOp.SUM, group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, dist.ReduceOp.SUM, ctx.group)
        return total, None
