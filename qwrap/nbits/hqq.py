"""Half-quadratic quantization: zero points that suit most weights of a block, found without data.

Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwrap.errors import ConfigError
from qwrap.nbits.blocks import BlockFormat, Blocks
from qwrap.nbits.split import codes_of, join, split, stored_scale

NORM = 0.7  # below 1: few large errors count less than many small ones
BETA = 10.0  # how hard the errors set aside are held to those there are, at first
KAPPA = 1.01  # and how much harder from one step to the next
STEPS = 20


@torch.no_grad()
def hqq(
    weight: Tensor,
    form: BlockFormat,
    _statistics: object = None,
    *,
    axis: int = 1,
    norm: float = NORM,
    beta: float = BETA,
    kappa: float = KAPPA,
    steps: int = STEPS,
) -> Blocks:
    """Return a matrix as codes with float zero points that minimise the norm of the errors.

    A block's scale spreads the codes from its smallest to its largest value, which need not lie on
    both sides of 0. Its zero point starts there too, and then moves by turns with a sparse part of
    the errors that is set aside: the few that are large, which are to steer nothing. Each block
    keeps the zero point with which the norm of its errors was least. ``form.symmetric`` means
    nothing here.

    Args:
        weight: floats ``[N, K]``, outputs and inputs.
        form: bits and block size.
        axis: what blocks lie along: 1, the inputs, as in MatMulNBits, or 0, the outputs; then what
            is returned are the codes of the transposed matrix, ``[K, N]``.
        norm: exponent of the errors, above 0 and at most 1.
        beta: above 0.
        kappa: 1 or more.
        steps: of the solver; 0 leaves the zero points where they start.

    Raises:
        ConfigError: an argument is none of these.

    Source: section 2 of the paper, with its defaults.
    """
    if axis not in (0, 1):
        raise ConfigError(f"axis={axis}: blocks lie along axis 0 (outputs) or 1 (inputs)")
    if not (0 < norm <= 1 and beta > 0 and kappa >= 1 and steps >= 0):
        raise ConfigError(
            f"norm={norm}, beta={beta}, kappa={kappa}, steps={steps}: expected 0 < norm <= 1, "
            "beta > 0, kappa >= 1, steps >= 0"
        )
    weight = weight if axis == 1 else weight.t()
    blocks, present = split(weight.float(), form.block_size)
    low, high = torch.aminmax(blocks, dim=-1, keepdim=True)
    top = 2**form.bits - 1
    width = (high - low) / top
    scale = stored_scale(torch.where(width > 0, width, low.abs()), weight.dtype)
    solver = _Solver(top, norm, beta, kappa, steps)
    zero_point = solver.zero_point(blocks, present, scale, -low / scale).to(weight.dtype)
    codes = codes_of(blocks, scale, zero_point.float(), top)
    return Blocks(
        join(codes, weight.shape[1]),
        scale[..., 0].to(weight.dtype),
        zero_point[..., 0],
        replace(form, symmetric=False),
    )


@dataclass(frozen=True, slots=True)
class _Solver:
    """The settings of ``hqq``, and the largest code."""

    top: int
    norm: float
    beta: float
    kappa: float
    steps: int

    def zero_point(self, blocks: Tensor, present: Tensor, scale: Tensor, start: Tensor) -> Tensor:
        """Return the best zero point of each block that is met from ``start`` on."""
        best, least, zero_point = start, torch.full_like(start, torch.inf), start
        count, beta = present.sum(-1, keepdim=True), self.beta
        for _ in range(self.steps + 1):
            codes = codes_of(blocks, scale, zero_point, self.top)
            rounded = (codes - zero_point) * scale
            error = blocks - rounded
            cost = (error.abs().pow(self.norm) * present).sum(-1, keepdim=True)
            best, least = torch.where(cost < least, zero_point, best), torch.minimum(cost, least)
            kept = error - shrink(error, beta, self.norm)
            wanted = codes - (rounded + kept) / scale
            zero_point = (wanted * present).sum(-1, keepdim=True) / count
            beta *= self.kappa
        return best


def shrink(x: Tensor, beta: float, norm: float) -> Tensor:
    """Return, but for an approximation, what minimises ``|y|^norm + beta / 2 * (y - x)^2``.

    Source: the generalised soft thresholding of Badri and Yahia, "A Non-Local Low-Rank Approach to
    Enforce Integrability", IEEE TIP 2016, as cited by the paper.
    """
    size = x.abs()
    return x.sign() * (size - (size + 1e-8).pow(norm - 1) / beta).clamp(min=0)
