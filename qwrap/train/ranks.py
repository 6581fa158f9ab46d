"""Training by several processes, each with data of its own: the same step on all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qwrap.quant.observe.sync import is_distributed

BUCKET = 2**24  # numbers averaged at once, so that packing them takes 64 MiB at most


class Ranks:
    """All ranks of torch.distributed, or this process alone.

    Every method has to be called by all ranks.

    Args:
        home: device of the model.
    """

    def __init__(self, home: torch.device) -> None:
        self.is_many = is_distributed()
        on_cpu = home.type == "cpu" and self.is_many and dist.get_backend() == "nccl"
        self._home = torch.device("cuda") if on_cpu else home
        self.is_first = not self.is_many or dist.get_rank() == 0

    def total(self, *numbers: float) -> list[float]:
        """Return the sum over all ranks of each number."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def least(self, *numbers: float) -> list[float]:
        """Return the least over all ranks of each number."""
        return self._reduced(numbers, dist.ReduceOp.MIN)

    def _reduced(self, numbers: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        if not self.is_many:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64, device=self._home)
        dist.all_reduce(values, how)
        found: list[float] = values.tolist()
        return found

    @torch.no_grad()
    def spread(self, module: nn.Module) -> None:
        """Give every rank the parameters and buffers of the first, in place."""
        if self.is_many:
            for tensor in (*module.parameters(), *module.buffers()):
                received = tensor.detach().clone()
                dist.broadcast(received, 0)
                tensor.copy_(received)  # which counts as a change, for whoever holds on to values

    @torch.no_grad()
    def average(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradient of every parameter by the mean over all ranks, in place.

        A rank whose batches did not reach a parameter counts as one with a gradient of zero.
        """
        if not self.is_many:
            return
        every = list(parameters)
        for parameter in every:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        bucket: list[Tensor] = []
        size = 0
        for parameter in every:
            assert parameter.grad is not None
            bucket.append(parameter.grad)
            size += parameter.numel()
            if size >= BUCKET:
                _average(bucket)
                bucket, size = [], 0
        if bucket:
            _average(bucket)


def _average(gradients: Sequence[Tensor]) -> None:
    packed = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(packed)
    packed /= dist.get_world_size()
    start = 0
    for gradient in gradients:
        end = start + gradient.numel()
        gradient.copy_(packed[start:end].view_as(gradient))
        start = end
