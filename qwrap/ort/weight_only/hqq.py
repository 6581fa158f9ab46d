"""Half-quadratic quantization: tensors, and single nodes of a message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from onnx import GraphProto, NodeProto
from torch import Tensor

from qwrap.nbits.hqq import BETA, KAPPA, NORM, STEPS, shrink
from qwrap.ort.weight_only.configs import HQQWeightOnlyQuantConfig
from qwrap.ort.weight_only.default import quantized_node

LARGEST_INVERSE = 2e4  # of a scale


class HQQWeightOnlyQuantizer:
    """Quantizes weights so that few errors are large, with float zero points."""

    def __init__(self, config: HQQWeightOnlyQuantConfig) -> None:
        """Take the settings."""
        self.config = config

    @staticmethod
    def optimize_weights(
        tensor: Tensor,
        scale: Tensor,
        zero: Tensor,
        min_max: Sequence[int],
        axis: int = 0,
        opt_params: Mapping[str, Any] | None = None,
        verbose: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return inverse scales, as they came, and better zero points.

        Stops when the mean error of all blocks no longer falls, with the zero points before that.

        Args:
            tensor: blocks along ``axis``.
            scale: inverse scales; a code is ``tensor * scale + zero``.
            zero: zero points to start from.
            min_max: smallest and largest code.
            axis: of a block.
            opt_params: ``lp_norm``, ``beta``, ``kappa`` and ``iters``.
            verbose: nothing; how it goes is not printed.
        """
        del verbose
        options: dict[str, Any] = {"lp_norm": NORM, "beta": BETA, "kappa": KAPPA, "iters": STEPS}
        options.update(opt_params or {})
        weight, inverse, zero = tensor.float(), scale.float(), zero.float()
        least, best, beta = torch.inf, zero, options["beta"]
        for _ in range(options["iters"]):
            codes = (weight * inverse + zero).round_().clamp_(*min_max)
            error = weight - (codes - zero) / inverse
            size = float(error.abs().mean())
            if size >= least:
                break
            least, best = size, zero
            aside = shrink(error, beta, options["lp_norm"])
            zero = (codes - (weight - aside) * inverse).mean(axis, keepdim=True)
            beta *= options["kappa"]
        return inverse, best

    @staticmethod
    def pack_on_row_fast_248bit(pack_tensor: Tensor, ori_int_tensor: Tensor, bits: int) -> None:
        """Put codes into the bytes of ``pack_tensor``, in place, the first in the lowest bits.

        Args:
            pack_tensor: zeros, with ``8 / bits`` times fewer rows, or else columns, than
            ori_int_tensor: the codes.
            bits: 2, 4 or 8.

        Raises:
            NotImplementedError: other bits.
        """
        if bits not in (2, 4, 8):
            raise NotImplementedError("Only 2,4,8 bits are supported.")
        if pack_tensor.shape[0] == ori_int_tensor.shape[0]:
            pack_tensor, ori_int_tensor = pack_tensor.T, ori_int_tensor.T
        count = pack_tensor.element_size() * 8 // bits
        for i in range(count):
            pack_tensor |= (ori_int_tensor[i::count] << (bits * i)).to(pack_tensor.dtype)

    def quantize_internal(
        self,
        tensor: Tensor,
        bits: int = 4,
        channel_wise: bool = True,
        group_size: int = 64,
        optimize: bool = True,
        round_zero: bool = True,
        axis: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return int32 codes, scales and zero points of a matrix.

        Args:
            tensor: ``[N, K]``.
            bits: of a code.
            channel_wise: False: one scale for all.
            group_size: values of a block; the matrix is filled up with zeros.
            optimize: whether zero points are looked for, after the range has been divided.
            round_zero: whether they start at integers.
            axis: that blocks lie along.
        """
        weight = tensor.float()
        rest = -weight.shape[axis] % group_size
        weight = F.pad(weight, (0, rest) if axis == 1 else (0, 0, 0, rest))
        shape, top = weight.shape, 2**bits - 1
        if channel_wise:
            weight = weight.reshape(-1, group_size) if axis == 1 else weight.reshape(group_size, -1)
            low, high = torch.aminmax(weight, dim=axis, keepdim=True)
        else:
            low, high = torch.aminmax(weight)
        width = torch.where(high == low, float(top), high - low)
        inverse = (top / width).clamp(max=LARGEST_INVERSE)
        zero = -low * inverse
        zero = zero.round() if round_zero else zero
        if optimize and channel_wise:
            inverse, zero = self.optimize_weights(weight, inverse, zero, [0, top], axis)
        codes = (weight * inverse + zero).round_().clamp_(0, top).reshape(shape).int()
        size = (shape[0], -1) if axis == 1 else (-1, shape[-1])
        if not channel_wise:
            size = (1, 1)
        scale, zero = (1.0 / inverse).reshape(size), zero.reshape(size)
        return codes, scale.to(tensor.dtype), zero.to(tensor.dtype)

    def quantize(self, node: NodeProto, graph_stack: Sequence[GraphProto]) -> list[NodeProto]:
        """Return the nodes that take the place of one node, the node itself if none do.

        Args:
            node: with a constant weight, or any other.
            graph_stack: the graphs that the node is in, outermost first. The one with the weight
                gets what the new nodes read, in place.

        Raises:
            QuantizationError: the settings do not fit the node (a ``ValueError``).
            NotImplementedError: a Gather.
        """
        return quantized_node(self.config, node, graph_stack)
