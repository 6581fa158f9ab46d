"""AWQ: the weights that large inputs meet get finer steps, by scales that the model takes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.errors import ConfigError
from qwrap.graph.channels import divide, find_products, weight_view
from qwrap.graph.constants import Constants
from qwrap.nbits.blocks import BlockFormat, Blocks
from qwrap.nbits.rtn import round_to_nearest, spread
from qwrap.nbits.split import codes_of, dequantize, join, split
from qwrap.nbits.statistics import InputStatistics

EXPONENTS = tuple(i / 20 for i in range(20))
CLIPS = tuple(1 - i / 40 for i in range(20))
LEAST = 1e-4  # of the mean size of all inputs: what counts as the size of one at least

Seen = Mapping[ir.Node, InputStatistics]


@torch.no_grad()
def rescale(
    model: ir.Model, forms: Mapping[ir.Node, BlockFormat], seen: Seen
) -> dict[ir.Node, InputStatistics]:
    """Divide the inputs of products, and multiply their weights, so that these quantize better.

    Input j is divided by a power of its mean size, the same for all products of one input. That
    power, from 0 to 0.95, is taken with which weights rounded to nearest change the outputs least.
    The divisor goes into what makes the input, where that is exact, or else into a Mul.

    Args:
        model: changed in place; computes what it did, up to rounding.
        forms: MatMul and Gemm nodes, of a constant matrix, that are to be quantized.
        seen: statistics of their inputs.

    Returns:
        Statistics of the inputs as they are now.

    Source: Lin et al., arXiv:2306.00978, section 3.2.
    """
    constants, found = Constants(model), dict(seen)
    for products in find_products(model, ("MatMul", "Gemm")):
        chosen = tuple(n for n in products.nodes if n in forms and n in seen)
        matrices = [matrix for n in chosen if (matrix := _matrix(constants, n)) is not None]
        if not chosen or len(matrices) < len(chosen):
            continue
        statistics = seen[chosen[0]]
        scale = _best(matrices, [forms[n] for n in chosen], statistics)
        if scale is None:
            continue
        divide(constants, replace(products, nodes=chosen), scale.cpu().numpy())
        found |= dict.fromkeys(chosen, statistics.divided(scale))
    return found


def _matrix(constants: Constants, node: ir.Node) -> Tensor | None:
    """Return the weight of a MatMul as float32 ``[N, K]``, None if it is several matrices."""
    view = weight_view(constants, node)
    if view is None or any(n != 1 for n in view.values.shape[:-2]):
        return None
    columns = view.columns(view.values)[0].astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(columns.T))


def _best(
    matrices: list[Tensor], forms: list[BlockFormat], statistics: InputStatistics
) -> Tensor | None:
    """Return what to divide each input by, float64 ``[K]``; None for 1."""
    second = statistics.second.float().to(matrices[0].device)
    size = statistics.size.to(second.device)
    size = size.clamp(min=LEAST * float(size.mean()))
    if not float(size.sum()):
        return None
    best, least = None, torch.inf
    for exponent in EXPONENTS:
        scale = size.pow(exponent)
        scale = scale / (scale.amax() * scale.amin()).sqrt()
        loss = 0.0
        for matrix, form in zip(matrices, forms, strict=True):
            factor = scale.float()
            rounded = dequantize(round_to_nearest(matrix * factor, form)) / factor
            error = rounded - matrix
            loss += float((error @ second * error).sum())
        if loss < least:
            best, least = (scale if exponent else None), loss
    return best


@torch.no_grad()
def clip(weight: Tensor, form: BlockFormat, statistics: InputStatistics | None) -> Blocks:
    """Return a matrix as codes over ranges that change its products with the inputs least.

    For each block ranges are tried from its whole one to half of it, by the error that the block
    alone makes.

    Args:
        weight: floats ``[N, K]``.
        form: bits, block size, symmetry.
        statistics: of the inputs.

    Raises:
        ConfigError: there are no statistics, or they are of another number of inputs.

    Source: the authors' code, ``auto_clip``; there with inputs and not their second moments.
    """
    if statistics is None:
        raise ConfigError('method "awq" needs calibration data')
    second = statistics.second.float().to(weight.device)
    if len(second) != weight.shape[1]:
        raise ConfigError(f"{weight.shape[1]} inputs, but statistics of {len(second)}")
    blocks, _ = split(weight.float(), form.block_size)
    moments = _of_blocks(second, blocks.shape[1], blocks.shape[2])
    low, high = torch.aminmax(blocks, dim=-1, keepdim=True)
    top = 2**form.bits - 1
    scale, zero_point = spread(low, high, form, weight.dtype)
    least = torch.full_like(low, torch.inf)
    for share in CLIPS:
        tried, zero = spread(low * share, high * share, form, weight.dtype)
        steps = torch.where(tried == 0, 1.0, tried.float())
        error = (codes_of(blocks, steps, zero, top) - zero) * steps - blocks
        cost = torch.einsum("nbi,bij,nbj->nb", error, moments, error)[..., None]
        better = cost < least
        least = torch.where(better, cost, least)
        scale, zero_point = torch.where(better, tried, scale), torch.where(better, zero, zero_point)
    codes = codes_of(blocks, torch.where(scale == 0, 1.0, scale.float()), zero_point, top)
    return Blocks(
        join(codes, weight.shape[1]),
        scale[..., 0],
        None if form.symmetric else zero_point[..., 0].to(torch.uint8),
        form,
    )


def _of_blocks(second: Tensor, count: int, size: int) -> Tensor:
    """Return the second moments within each block, ``[count, size, size]``; 0 beyond the inputs."""
    rest = count * size - len(second)
    filled = F.pad(second, (0, rest, 0, rest)).reshape(count, size, count, size)
    return filled.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
