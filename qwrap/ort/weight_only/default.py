"""Rounding to nearest: arrays, tables, and single nodes of a message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto

from qwrap.nbits.blocks import BlockFormat
from qwrap.nbits.gather import rounded_table
from qwrap.nbits.one_node import rewrite_node
from qwrap.nbits.packing import operator_arrays, pack, pair_arrays
from qwrap.nbits.rtn import round_to_nearest
from qwrap.ort.enums import QuantFormat
from qwrap.ort.errors import QuantizationError
from qwrap.ort.weight_only.configs import DefaultWeightOnlyQuantConfig
from qwrap.ort.weight_only.requests import Requests

Array = NDArray[Any]


class DefaultWeightOnlyQuantizer:
    """Rounds weights to nearest."""

    def __init__(self, config: DefaultWeightOnlyQuantConfig) -> None:
        """Take the settings."""
        self.config = config

    def qbits_block_quant(self, fp32weight: Array) -> tuple[Array, Array, Array]:
        """Return packed codes, scales and packed zero points of a matrix ``[K, N]``.

        In QOperator format ``[N, blocks, block * bits / 8]``, ``[N, blocks]`` and
        ``[N, blocks * bits / 8]``; in QDQ format the codes of ``[K, N]`` flat, scales
        ``[blocks, N]`` and zero points flat. Those of symmetric codes are zeros, and not used.

        Raises:
            QuantizationError: it is no matrix (a ``ValueError``).
        """
        if fp32weight.ndim != 2:
            raise QuantizationError(
                f"Current int4 block quantization only supports 2D tensors! got {fp32weight.shape}"
            )
        config = self.config
        size = 0 if config.channel_wised_quantize else config.block_size
        form = BlockFormat(config.bits, size, config.is_symmetric)
        matrix = torch.from_numpy(np.ascontiguousarray(fp32weight)).T
        if config.quant_format == QuantFormat.QOperator:
            arrays = operator_arrays(round_to_nearest(matrix, form))
            count = -(-arrays["scale"].shape[1] * config.bits // 8)
            none = np.zeros((len(matrix), count), np.uint8)
            return arrays["codes"], arrays["scale"], arrays.get("zero_point", none)
        pairs = pair_arrays(round_to_nearest(matrix, form, around_zero=True))
        scale = pairs["scale"]
        none = np.zeros(-(-scale.size * config.bits // 8), np.uint8)
        zero_point = self._flat(pairs["zero_point"]) if "zero_point" in pairs else none
        return self._flat(pairs["codes"]), scale, zero_point

    def _flat(self, codes: Array) -> Array:
        few = codes.astype(np.int8).view(np.uint8) & np.uint8(2**self.config.bits - 1)
        return pack(few.reshape(-1), self.config.bits)

    @staticmethod
    def quant_slice_symmetric(data: Array) -> tuple[Array, Array]:
        """Return int8 codes of 4 bits and scales ``[M, 1, N]`` of one block ``[M, block, N]``.

        The value that is largest in magnitude gets the code -8.
        """
        form = BlockFormat(4, data.shape[1], symmetric=True)
        codes, scale, _ = rounded_table(data, 1, form)
        return codes.astype(np.int8), scale

    @staticmethod
    def quant_slice_asymmetric(data: Array) -> tuple[Array, Array, Array]:
        """Return uint8 codes of 4 bits, scales and zero points of one block ``[M, block, N]``."""
        codes, scale, zero_point = rounded_table(data, 1, BlockFormat(4, data.shape[1]))
        return codes.astype(np.uint8), scale, zero_point.astype(np.uint8)

    @staticmethod
    def pack_int8_to_int4(data: Array) -> Array:
        """Return 4-bit numbers, one to a byte, as two to a byte, the first in the low bits."""
        return pack(data.astype(np.int8, copy=False).view(np.uint8).reshape(-1) & np.uint8(15), 4)

    @staticmethod
    def quantize_ndarray(
        data: Array, quantize_axis: int, block_size: int, is_symmetric: bool
    ) -> tuple[Array, Array, Array | None]:
        """Return packed 4-bit codes, flat, scales, and packed zero points of blocks along an axis.

        Args:
            data: floats of any shape.
            quantize_axis: the axis.
            block_size: any; the last block may be short.
            is_symmetric: there are no zero points then.
        """
        form = BlockFormat(4, block_size, is_symmetric)
        axis = quantize_axis % data.ndim
        codes, scale, zero_point = rounded_table(data, axis, form)
        packed = DefaultWeightOnlyQuantizer.pack_int8_to_int4
        return packed(codes), scale, None if is_symmetric else packed(zero_point)

    def quantize_matmul(
        self, node: NodeProto, graph_stack: Sequence[GraphProto]
    ) -> list[NodeProto]:
        """Return the nodes for a MatMul; see ``quantize``."""
        return self.quantize(node, graph_stack)

    def quantize_gather(
        self, node: NodeProto, graph_stack: Sequence[GraphProto]
    ) -> list[NodeProto]:
        """Return the nodes for a Gather; see ``quantize``."""
        return self.quantize(node, graph_stack)

    def quantize(self, node: NodeProto, graph_stack: Sequence[GraphProto]) -> list[NodeProto]:
        """Return the nodes that take the place of one node, the node itself if none do.

        The graph with the weight gets what they read, in place; the opset of the model is left
        alone.

        Args:
            node: with a constant weight, or any other.
            graph_stack: the graphs that the node is in, outermost first.

        Raises:
            QuantizationError: the settings do not fit the node (a ``ValueError``).
        """
        return quantized_node(self.config, node, graph_stack)


def quantized_node(
    config: Any, node: NodeProto, graph_stack: Sequence[GraphProto]
) -> list[NodeProto]:
    """Return the nodes that a configuration makes of one node of a message."""
    if node.op_type not in ("MatMul", "Gather") or node.domain not in ("", "ai.onnx"):
        return [node]
    form = BlockFormat(config.bits, config.block_size)
    request = Requests(config, form, getattr(config, "accuracy_level", None) or 0)
    return rewrite_node(node, list(graph_stack), request.of(node.name, node.op_type))
