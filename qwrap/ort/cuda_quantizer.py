"""Weights as the CUDA kernels of onnxruntime read them: MatMulNBits and QMoE, raw or prepacked.

All takes one logical matrix ``[N, K]``, outputs and inputs, and runs wherever torch does; no GPU is
needed to make the layouts, only to run them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.nbits.blocks import BlockFormat
from qwrap.nbits.packing import operator_arrays, pack
from qwrap.nbits.rtn import round_to_nearest
from qwrap.ort.errors import QuantizationError

__all__ = ["CudaQuantizer", "has_cuda_weight_prepacking"]

TINY = torch.finfo(torch.float32).eps
LEAST_SCALE = 1e-8  # of ``symmetric_blockwise_quantize``
TILE = 64  # inputs that a kernel for SM80 reads of one output before those of the next
BLOCKS = {80: (32, 64, 128), 90: (64, 128)}


def has_cuda_weight_prepacking() -> bool:
    """Whether weights can be prepacked: always, for torch does it."""
    return True


class CudaQuantizer:
    """Functions that need no state."""

    @staticmethod
    def qmoe_symmetric_per_channel_quantize(
        weights: Tensor, bits: int, *, unsigned_full_range: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return codes of an expert, uint8 ``[N, K * bits / 8]``, and scales ``[N]``.

        Args:
            weights: ``[N, K]``.
            bits: 4 or 8.
            unsigned_full_range: use the lowest code too; else codes are as many on both sides of 0.

        Raises:
            QuantizationError: other bits, or K leaves a byte incomplete (a ``ValueError``).
        """
        _check_bits(bits, "QMoE per-channel quantization only supports 4 or 8 bits")
        inputs, count = weights.shape[1], 8 // bits
        if inputs % count:
            raise QuantizationError(
                f"K ({inputs}) must be divisible by {count} for QMoE per-channel quantization."
            )
        weight = weights.detach().cpu().float()[:, None]
        codes, scale = _symmetric(weight, bits, unsigned_full_range)
        return _packed(codes[:, 0], bits), scale.flatten()

    @staticmethod
    def qmoe_per_channel_quantize(
        weights: Tensor,
        bits: int,
        prepack: bool,
        force_arch: int = 80,
        *,
        unsigned_full_range: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Return codes of an expert and scales ``[N]``; prepacked codes are ``[K, N * bits / 8]``.

        Args:
            weights: ``[N, K]``.
            bits: 4 or 8.
            prepack: for CUTLASS' kernels; else as ``qmoe_symmetric_per_channel_quantize``.
            force_arch: 80 or 90.
            unsigned_full_range: use the lowest code too.

        Raises:
            QuantizationError: sizes or bits that the layout does not have (a ``ValueError``).
        """
        packed, scale = CudaQuantizer.qmoe_symmetric_per_channel_quantize(
            weights, bits, unsigned_full_range=unsigned_full_range
        )
        if not prepack:
            return packed, scale
        outputs, inputs = weights.shape
        if outputs % (8 // bits):
            raise QuantizationError(
                f"N ({outputs}) must be divisible by {8 // bits} for CUDA QMoE prepacked weights."
            )
        return prepacked(packed, inputs, bits, force_arch).reshape(inputs, -1), scale

    @staticmethod
    def matmulnbits_blockwise_quantize(
        weights: Tensor,
        bits: int,
        block_size: int,
        *,
        symmetric: bool = True,
        return_zero_points: bool = False,
        abs_scales: bool = True,
        flatten_qweight: bool = True,
        unsigned_full_range: bool = True,
    ) -> tuple[Tensor, ...]:
        """Return codes, scales ``[N, blocks]`` and, if asked for, packed zero points.

        Args:
            weights: ``[N, K]``.
            bits: 4 or 8.
            block_size: inputs that share a scale.
            symmetric: scales by the largest magnitude, without zero points (zeros are returned).
            return_zero_points: whether they are asked for.
            abs_scales: scales that are positive; those of asymmetric codes always are.
            flatten_qweight: codes ``[N, blocks * block_size * bits / 8]``, not three-dimensional.
            unsigned_full_range: use the lowest code too.

        Raises:
            QuantizationError: other bits, or a block size below 1 (a ``ValueError``).
        """
        codes, scale, zero_point = _blockwise(
            weights, bits, block_size, symmetric, abs_scales, unsigned_full_range
        )
        codes = codes.flatten(1) if flatten_qweight else codes
        return (codes, scale, zero_point) if return_zero_points else (codes, scale)

    @staticmethod
    def matmulnbits_prepacked_blockwise_quantize(
        weights: Tensor,
        bits: int,
        block_size: int,
        force_arch: int = 80,
        *,
        symmetric: bool = True,
        return_zero_points: bool = False,
        abs_scales: bool = True,
        unsigned_full_range: bool = True,
    ) -> tuple[Tensor, ...]:
        """Return ``B`` for the attribute ``weight_prepacked``, of the shape that it always has.

        Args:
            weights: ``[N, K]``.
            bits: 4 or 8.
            block_size: 32 (80 only), 64 or 128.
            force_arch: 80 for ``weight_prepacked=1``, 90 for ``weight_prepacked=2``.
            symmetric: as for ``matmulnbits_blockwise_quantize``, like what follows.
            return_zero_points: as there.
            abs_scales: as there.
            unsigned_full_range: as there.

        Raises:
            QuantizationError: sizes or bits that the layout does not have (a ``ValueError``).
        """
        if force_arch not in BLOCKS:
            raise QuantizationError(
                f"force_arch must be 80 (SM80) or 90 (SM90), but got {force_arch}."
            )
        if block_size not in BLOCKS[force_arch]:
            raise QuantizationError(
                f"block_size must be one of {BLOCKS[force_arch]} for force_arch={force_arch}, "
                f"but got {block_size}."
            )
        inputs = _check_blocks(weights, block_size)
        codes, scale, zero_point = _blockwise(
            weights, bits, block_size, symmetric, abs_scales, unsigned_full_range
        )
        packed = prepacked(codes.flatten(1), inputs, bits, force_arch).reshape(codes.shape)
        return (packed, scale, zero_point) if return_zero_points else (packed, scale)

    @staticmethod
    def qmoe_prepacked_blockwise_quantize(
        weights: Tensor,
        bits: int,
        block_size: int,
        force_arch: int = 80,
        *,
        symmetric: bool = True,
        return_zero_points: bool = False,
        abs_scales: bool = False,
        unsigned_full_range: bool = True,
    ) -> tuple[Tensor, ...]:
        """Return codes of an expert ``[K, N * bits / 8]`` and scales ``[N, K / block_size]``.

        Args:
            weights: ``[N, K]``.
            bits: 4 or 8.
            block_size: inputs that share a scale; K is a multiple of it.
            force_arch: 80 or 90.
            symmetric: as for ``matmulnbits_blockwise_quantize``, like what follows.
            return_zero_points: as there.
            abs_scales: as there.
            unsigned_full_range: as there.

        Raises:
            QuantizationError: sizes or bits that the layout does not have (a ``ValueError``).
        """
        inputs = _check_blocks(weights, block_size)
        if bits in (4, 8) and len(weights) % (8 // bits):
            raise QuantizationError(
                f"N ({len(weights)}) must be divisible by {8 // bits} for QMoE blockwise "
                "quantization."
            )
        codes, scale, zero_point = _blockwise(
            weights, bits, block_size, symmetric, abs_scales, unsigned_full_range
        )
        packed = prepacked(codes.flatten(1), inputs, bits, force_arch).reshape(inputs, -1)
        return (packed, scale, zero_point) if return_zero_points else (packed, scale)

    @staticmethod
    def symmetric_blockwise_quantize(
        weights: Tensor, bits: int, block_size: int, *, unsigned_full_range: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return codes and scales of blocks along the last axis.

        Args:
            weights: of any shape; the last block may be short.
            bits: 4 gives unsigned codes, two to a byte; 8 gives int8.
            block_size: numbers that share a scale.
            unsigned_full_range: use the lowest code too.

        Raises:
            QuantizationError: other bits (a ``ValueError``).
        """
        _check_bits(bits, "CUDA blockwise quantization only supports 4 or 8 bits")
        weight, size = weights.detach().cpu(), weights.shape[-1]
        padded = F.pad(weight, (0, -size % block_size))
        blocks = padded.reshape(*weight.shape[:-1], -1, block_size)
        low, divisor = _ends(bits, unsigned_full_range)
        scale = (blocks.abs().amax(-1) / divisor).clamp(min=LEAST_SCALE)
        codes = (blocks / scale.unsqueeze(-1)).round_().clamp_(low, 2 ** (bits - 1) - 1)
        codes = codes.flatten(-2)[..., :size]
        if bits == 8:
            return codes.to(torch.int8), scale
        return _packed((codes + 8).to(torch.uint8), 4), scale


# --- codes ---------------------------------------------------------------------------------------


def _blockwise(
    weights: Tensor, bits: int, block_size: int, symmetric: bool, abs_scales: bool, full: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes ``[N, blocks, block_size * bits / 8]``, scales, packed zero points."""
    _check_bits(bits, "Blockwise quantization only supports 4 or 8 bits")
    if block_size <= 0:
        raise QuantizationError(
            f"Blockwise quantization requires a positive block_size, got {block_size}."
        )
    weight = weights.detach().cpu().float()
    if not symmetric:
        arrays = operator_arrays(round_to_nearest(weight, BlockFormat(bits, block_size)))
        codes, scale, zero_point = (torch.from_numpy(arrays[name]) for name in arrays)
        return codes, scale.abs() if abs_scales else scale, zero_point
    blocks = F.pad(weight, (0, -weight.shape[1] % block_size))
    codes, scale = _symmetric(blocks.reshape(len(weight), -1, block_size), bits, full)
    count = -(-scale.shape[1] * bits // 8)
    return _packed(codes, bits), scale, torch.zeros(len(weight), count, dtype=torch.uint8)


def _symmetric(blocks: Tensor, bits: int, full: bool) -> tuple[Tensor, Tensor]:
    """Return uint8 codes of float32 ``[N, blocks, block_size]``, and scales."""
    low, divisor = _ends(bits, full)
    scale = (blocks.abs().amax(-1) / divisor).clamp(min=TINY)
    codes = (blocks / scale.unsqueeze(-1)).round_().clamp_(low, 2 ** (bits - 1) - 1)
    return (codes + 2 ** (bits - 1)).to(torch.uint8), scale


def _ends(bits: int, full: bool) -> tuple[int, int]:
    """Return the lowest signed code, and by what the largest magnitude is divided."""
    middle = 2 ** (bits - 1)
    return (-middle, middle) if full else (1 - middle, middle - 1)


def _packed(codes: Tensor, bits: int) -> Tensor:
    return torch.from_numpy(pack(codes.contiguous().numpy(), bits))


def _check_bits(bits: int, words: str) -> None:
    if bits not in (4, 8):
        raise QuantizationError(f"{words}, got {bits}.")


def _check_blocks(weights: Tensor, block_size: int) -> int:
    inputs = int(weights.shape[1])
    if inputs % block_size:
        raise QuantizationError(
            f"K ({inputs}) must be divisible by block_size ({block_size}) for CUDA-prepacked "
            "weights."
        )
    return inputs


# --- layouts -------------------------------------------------------------------------------------


def prepacked(packed: Tensor, inputs: int, bits: int, force_arch: int) -> Tensor:
    """Return codes in the order in which kernels for 16-bit activations read them, flat.

    Tensor cores take the inputs of an output in an order of their own, which is laid down here
    within groups of 128 bits. For SM80 the tiles of several outputs lie behind each other. Last,
    codes change places within 32 bits, as the conversion to 16-bit floats wants them.

    Args:
        packed: uint8 ``[N, K * bits / 8]``.
        inputs: K.
        bits: 4 or 8.
        force_arch: 80 or 90.

    Raises:
        QuantizationError: the layout does not have such sizes (a ``ValueError``).

    Source: the results of ``pack_weights_for_cuda_mixed_gemm`` of onnxruntime.
    """
    if force_arch not in BLOCKS:
        raise QuantizationError(f"force_arch must be 80 (SM80) or 90 (SM90), got {force_arch}.")
    outputs, group = len(packed), 128 // bits
    if inputs % group or outputs % (64 // bits):
        raise QuantizationError(
            f"[N, K] = [{outputs}, {inputs}] does not fit mixed-GEMM packing: K must be a multiple "
            f"of {group}, N of {64 // bits}"
        )
    if force_arch == 80 and inputs % TILE:
        raise QuantizationError(f"K ({inputs}) must be a multiple of {TILE} for force_arch=80")
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes = ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)
    # Pairs of each 8 inputs first: [0, 1, 8, 9, ..., 2, 3, 10, 11, ...]
    codes = codes.reshape(outputs, -1, group // 8, 4, 2).transpose(2, 3).flatten(1)
    if force_arch == 80:
        together = 16 // bits  # outputs
        codes = codes.reshape(outputs // together, together, -1, TILE).transpose(1, 2)
    words = codes.reshape(-1, 16 // bits, 2)
    return _packed(words.transpose(1, 2).flatten(), bits)
