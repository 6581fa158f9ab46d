"""LSTM, with weights in 8 bits and measured scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qwrap.ort.numbers.initializers import quantize_channels, tensor_proto_to_array
from qwrap.ort.numbers.weight_params import channel_params
from qwrap.ort.operators.base_operator import QuantOperatorBase
from qwrap.ort.operators.floats import float32_inputs, float32_outputs
from qwrap.ort.quant_utils import TENSOR_NAME_QUANT_SUFFIX, ms_domain

if TYPE_CHECKING:
    from qwrap.ort.onnx_quantizer import ONNXQuantizer

__all__ = ["LSTMQuant"]

_BATCH_FIRST = {"X": [1, 0, 2], "Y": [2, 0, 1, 3], "state": [1, 0, 2]}
"""Permutations to the kernel's order ``[sequence, batch, ...]`` and ``[direction, batch, ...]``."""


class LSTMQuant(QuantOperatorBase):
    """LSTM as DynamicQuantizeLSTM; with ``layout=1``, which it has not, between Transposes."""

    def quantize(self) -> None:
        """Emit the node, or leave it float."""
        node, quantizer = self.node, self.quantizer
        weights = [quantizer.find_initializer(name) for name in node.input[1:3]]
        if any(w is None or len(w.dims) != 3 for w in weights) or not all(
            quantizer.is_valid_quantize_weight(name) for name in node.input[1:3]
        ):
            self.keep("its weights are not constants of three axes")
            return
        inputs = [*node.input, *[""] * (8 - len(node.input))]
        floats = float32_inputs(quantizer, [inputs[0], inputs[3], *inputs[5:8]])
        x, bias, hidden, cell, peepholes = floats
        w, w_zero, w_scale = recurrent_codes(quantizer, inputs[1])
        r, r_zero, r_scale = recurrent_codes(quantizer, inputs[2])
        batch_first = self.attribute("layout", 0) == 1
        if batch_first:
            x = self._transposed(x, "X")
            hidden, cell = (self._transposed(name, "state") for name in (hidden, cell))
        outputs, casts = float32_outputs(quantizer, list(node.output))
        after = [*self._restored(outputs), *casts] if batch_first else casts
        made = helper.make_node(
            "DynamicQuantizeLSTM",
            [x, w, r, bias, inputs[4], hidden, cell, peepholes, w_scale, w_zero, r_scale, r_zero],
            outputs,
            self.quantized_name,
            domain=ms_domain,
            **{name: v for name, v in self.attributes().items() if name != "layout"},
        )
        quantizer.new_nodes += [made, *after]

    def _transposed(self, name: str, what: str) -> str:
        """Append a Transpose to the kernel's order, and return its output."""
        if not name:
            return ""
        made = self.quantizer.free_name(f"{name}_Transposed")
        self.quantizer.add_new_nodes([_transpose(name, made, _BATCH_FIRST[what])])
        return made

    def _restored(self, outputs: list[str]) -> list[NodeProto]:
        """Rename the kernel's outputs, in place, and return Transposes to the names they had."""
        nodes = []
        for index, name in enumerate(outputs):
            if name:
                outputs[index] = self.quantizer.free_name(f"{name}_sequence_first")
                permutation = _BATCH_FIRST["Y" if index == 0 else "state"]
                nodes.append(_transpose(outputs[index], name, permutation))
        return nodes


def _transpose(source: str, made: str, permutation: list[int]) -> NodeProto:
    return helper.make_node("Transpose", [source], [made], f"{made}_Transpose", perm=permutation)


def recurrent_codes(quantizer: ONNXQuantizer, name: str) -> tuple[str, str, str]:
    """Add int8 codes of a weight ``[directions, 4 * hidden, K]`` as ``[.., K, 4 * hidden]``, once.

    There is one scale for each direction, or for each row where the quantizer is asked for them.

    Returns:
        Names of the codes, of the zero points and of the scales.
    """
    owner = quantizer.find_owner(name) or quantizer
    known: tuple[str, str, str] | None = owner.recurrent_weights.get(name)
    if known is not None:
        return known
    weight = owner.model.get_initializer(name)
    assert weight is not None
    values = tensor_proto_to_array(weight).astype(np.float32)
    directions, rows, _ = values.shape
    grouped = values.reshape(directions * rows, -1) if owner.is_per_channel() else values
    zeros, scales = channel_params(
        grouped,
        TensorProto.INT8,
        0,
        [{"axis": 0}],
        symmetric=True,  # the kernel has no zero points
        reduce_range=owner.reduce_range,
        min_real_range=owner.min_real_range,
    )
    codes = quantize_channels(grouped, TensorProto.INT8, zeros, scales, 0)
    codes = np.ascontiguousarray(codes.reshape(values.shape).transpose(0, 2, 1))
    if owner.is_per_channel():
        zeros, scales = zeros.reshape(directions, rows), scales.reshape(directions, rows)
    suffixes = TENSOR_NAME_QUANT_SUFFIX, "_zero_point", "_scale"
    first, second, third = (owner.free_name(name + suffix) for suffix in suffixes)
    for array, stored in ((codes, first), (zeros, second), (scales, third)):
        owner.model.add_initializer(numpy_helper.from_array(array, stored))
    owner.recurrent_weights[name] = first, second, third
    return first, second, third
