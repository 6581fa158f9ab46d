"""Weights as 4-bit floats of bitsandbytes, which MatMulBnb4 reads."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.model.tensors import to_numpy
from qwrap.nbits.draft import MICROSOFT, Array, Draft, Weight
from qwrap.ops.contrib.blockwise import FP4_MAGNITUDES, NF4_VALUES

Kind = Literal["fp4", "nf4"]
KINDS: dict[Kind, int] = {"fp4": 0, "nf4": 1}
"""Attribute ``quant_type`` of MatMulBnb4."""
FP4_MIDDLES = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
"""Above which the next magnitude is nearer, to the digits that bitsandbytes' kernels have."""
AT_ONCE = 1 << 18  # weights whose temporaries are made together


def float4_arrays(matrix: Tensor, block_size: int, kind: Kind) -> tuple[Array, Array]:
    """Return what MatMulBnb4 reads of a matrix.

    The result is that of onnxruntime's ``quantize_matmul_bnb4``, bit for bit, save for the unused
    half of the last byte of an odd number of values, which is 0 here.

    Args:
        matrix: floats ``[N, K]``, outputs and inputs.
        block_size: values in a row, one row after the other, that share a scale.
        kind: the code book.

    Returns:
        Codes, uint8 ``[ceil(N * K / 2)]``, the first of two in the high bits; the largest
        magnitude of each block, ``[ceil(N * K / block_size)]``, in the dtype of the matrix.

    Source: Dettmers et al., arXiv:2305.14314.
    """
    values = matrix.contiguous().flatten()
    step = max(1, AT_ONCE // block_size) * block_size
    parts = [_encoded(part, block_size, kind) for part in torch.split(values, step)]
    codes, largest = (torch.cat(column) for column in zip(*parts, strict=True))
    array = to_numpy(F.pad(codes[: len(values)], (0, len(values) % 2)))
    return (array[::2] << np.uint8(4)) | array[1::2], to_numpy(largest.to(matrix.dtype))


def _encoded(values: Tensor, block_size: int, kind: Kind) -> tuple[Tensor, Tensor]:
    blocks = F.pad(values.float(), (0, -len(values) % block_size)).reshape(-1, block_size)
    largest = blocks.abs().amax(1, keepdim=True)
    scaled = blocks * torch.where(largest == 0, 0.0, 1.0 / largest)
    codes = (_nf4 if kind == "nf4" else _fp4)(scaled)
    return codes.flatten(), largest[:, 0]


def _nf4(x: Tensor) -> Tensor:
    levels = torch.tensor(NF4_VALUES, dtype=torch.float64)
    middles = ((levels[1:] + levels[:-1]) / 2).float()
    return torch.bucketize(x, middles, out_int32=True).to(torch.uint8)


def _fp4(x: Tensor) -> Tensor:
    order = torch.tensor(FP4_MAGNITUDES).argsort().to(torch.uint8)
    codes = order[torch.bucketize(x.abs(), torch.tensor(FP4_MIDDLES))]
    return codes + (x < 0).to(torch.uint8) * 8


def float4_node(
    draft: Draft, node: ir.Node, weight: Weight, matrix: Tensor | None, size: int, kind: Kind
) -> ir.Node:
    """Return a MatMulBnb4 for a MatMul.

    Args:
        draft: gets the initialisers.
        node: the MatMul.
        weight: its second input.
        matrix: values of the weight ``[N, K]``; None if it was quantized for another node.
        size: of a block.
        kind: the code book.
    """
    key = float4_key(weight, size, kind)
    if matrix is not None:
        arrays = float4_arrays(matrix, size, kind)
        names = f"{weight.name}_Bnb4", f"{weight.name}_absmax"
        draft.made[key] = [
            draft.constant(weight.graph, name, array)
            for name, array in zip(names, arrays, strict=True)
        ]
    inputs, outputs = weight.shape[-2:]
    attributes = {"K": inputs, "N": outputs, "block_size": size, "quant_type": KINDS[kind]}
    return draft.node(
        "MatMulBnb4",
        [node.inputs[0], *draft.made[key]],
        f"{node.outputs[0].name}_pre_reshape",
        name=f"{node.name}_Bnb4" if node.name else "",
        domain=MICROSOFT,
        attributes=attributes,
    )


def float4_key(weight: Weight, size: int, kind: Kind) -> tuple[object, ...]:
    """Return under which key a draft keeps what was made of a weight."""
    return weight.value, weight.turned, size, kind
