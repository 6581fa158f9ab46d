"""GPTQ: codes whose errors cancel on the inputs that the data shows."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from qwrap.compensation import BLOCK, compensate
from qwrap.errors import ConfigError, QwrapWarning
from qwrap.nbits.blocks import BlockFormat, Blocks
from qwrap.nbits.rtn import spread
from qwrap.nbits.statistics import InputStatistics

SHRINKS = 80  # ranges tried in search of the best, each by a hundredth smaller than the last
NORM = 2.4  # of their errors


@torch.no_grad()
def gptq(
    weight: Tensor,
    form: BlockFormat,
    statistics: InputStatistics | None,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    search: bool = True,
    per_channel: bool = True,
    block: int = BLOCK,
) -> Blocks:
    """Return a matrix as codes that keep its products with the observed inputs.

    The rounding error of one input is made good by the inputs still to round, as far as they were
    correlated in the data. Scales are chosen when the first input of their block is to be rounded,
    from what its weights have become by then; with ``act_order``, where inputs of all blocks are
    rounded by turns, from the weights as they were. Inputs that are always 0 are rounded to
    nearest.

    Args:
        weight: floats ``[N, K]``, outputs and inputs; of a grouped convolution one group after
            the other.
        form: bits, block size, symmetry. Symmetric: as in rounding to nearest, the largest value in
            magnitude gets the lowest code. Asymmetric: codes span the block's extremes and 0.
        statistics: of the inputs.
        damping: what is added to each input's power, relative to the mean. Where the moments are
            not positive definite with it, as of inputs that follow from others, it is raised
            tenfold until they are, and a ``QwrapWarning`` says so.
        act_order: round the inputs in order of falling power.
        search: try smaller ranges too, and take that with the least sum of absolute errors to the
            power of 2.4, each weighted with the power of its input.
        per_channel: a scale for each output; else all outputs share those of a block of inputs.
        block: inputs whose errors are spread over the later ones in one product. It changes
            nothing but the time, save that it is at least as large as a block of the form.

    Raises:
        ConfigError: there are no statistics, they are of another number of inputs, or ``damping``
            or ``block`` is not above 0.

    Source: Frantar et al., arXiv:2210.17323, and the authors' code for what is optional.
    """
    if statistics is None:
        raise ConfigError('method "gptq" needs calibration data')
    if not (damping > 0 and block > 0):
        raise ConfigError(f"damping={damping}, block={block}: expected more than 0")
    second = statistics.second.to(weight.device)
    if second.shape[-1] != weight.shape[1]:
        raise ConfigError(f"{weight.shape[1]} inputs, but statistics of {second.shape[-1]}")
    second = second if second.dim() == 3 else second[None]
    matrix = weight.double().reshape(len(second), -1, weight.shape[1]).mT.contiguous()
    power = second.diagonal(dim1=1, dim2=2) if search else None
    grid = _Grid(matrix, form, weight.dtype, power, per_channel=per_channel)
    grid.is_live = not act_order
    size = grid.size
    # A multiple of the form's blocks: at the first input of one, all of it is up to date.
    block = max(block // size, 1) * size
    compensate(
        matrix, second, grid, damping, in_order=not act_order, block=block, told=_warn_of(damping)
    )
    return grid.blocks()


def _warn_of(damping: float) -> Callable[[float], None]:
    def warn(raised: float) -> None:
        warnings.warn(
            f"the products of a layer's inputs are not positive definite with damping={damping:g}; "
            f"{raised:g} was taken",
            QwrapWarning,
            stacklevel=2,
        )

    return warn


class _Grid:
    """Rounds one input of each group, for all outputs, after another; remembers the codes.

    Attributes:
        size: inputs of a block.
        is_live: whether scales are chosen when a block begins, and not beforehand.
    """

    def __init__(
        self,
        matrix: Tensor,
        form: BlockFormat,
        dtype: torch.dtype,
        power: Tensor | None,
        *,
        per_channel: bool,
    ) -> None:
        self.form, self.is_live = form, False
        inputs = matrix.shape[1]
        self.size = min(form.block_size or inputs, inputs)
        self._dtype, self._power, self._per_channel = dtype, power, per_channel
        self._codes = torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device)
        self._groups = torch.arange(len(matrix), device=matrix.device)
        starts = range(0, inputs, self.size)
        found = [self._choose(matrix[:, k : k + self.size], k) for k in starts]
        # [G, blocks, R]
        self._scale, self._zero_point = (torch.stack(each, 1) for each in zip(*found, strict=True))

    def __call__(self, rest: Tensor, inputs: Tensor) -> Tensor:
        if self.is_live and int(inputs[0]) % self.size == 0:
            k = int(inputs[0])
            index, values = k // self.size, rest[:, : self.size]
            self._scale[:, index], self._zero_point[:, index] = self._choose(values, k)
        place = self._groups, inputs // self.size
        scale, zero_point = self._scale[place], self._zero_point[place]
        codes = self._round(rest[:, 0], scale, zero_point)
        self._codes[self._groups, inputs] = codes.to(torch.uint8)
        return (codes - zero_point) * scale

    def blocks(self) -> Blocks:
        """Return what was rounded."""
        codes, scale, zero_point = (
            each.mT.flatten(0, 1).contiguous()
            for each in (self._codes, self._scale.to(self._dtype), self._zero_point)
        )
        zeros = None if self.form.symmetric else zero_point.to(torch.uint8)
        return Blocks(codes, scale, zeros, self.form)

    def _round(self, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return (values / scale).round_().add_(zero_point).clamp_(0, 2**self.form.bits - 1)

    def _choose(self, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Return scales and zero points ``[G, R]`` for ``[G, size, R]`` values of a block."""
        low, high = torch.aminmax(values, dim=1)
        if not self._per_channel:
            low, high = (end.expand_as(low) for end in (low.amin(), high.amax()))
        best = self._spread(low, high)
        if self._power is None:
            return best
        power = self._power[:, start : start + values.shape[1], None]
        least = self._cost(values, power, *best)
        for i in range(1, SHRINKS):
            tried = self._spread(low * (1 - i / 100), high * (1 - i / 100))
            cost = self._cost(values, power, *tried)
            better = cost < least
            least = torch.where(better, cost, least)
            best = (torch.where(better, tried[0], best[0]), torch.where(better, tried[1], best[1]))
        return best

    def _cost(self, values: Tensor, power: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        scale, zero_point = scale[:, None], zero_point[:, None]
        error = (self._round(values, scale, zero_point) - zero_point) * scale - values
        cost = error.abs_().pow_(NORM).mul_(power).sum(1)
        return cost if self._per_channel else cost.sum().expand_as(cost)

    def _spread(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales, as they can be stored, and zero points of ranges."""
        scale, zero_point = spread(low.float(), high.float(), self.form, self._dtype)
        return torch.where(scale == 0, 1.0, scale.double()), zero_point.double()
