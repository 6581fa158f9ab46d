"""Calls of model functions, for types that ONNX has no operators for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.dtypes import QuantType
from qwrap.errors import ExportError
from qwrap.export.functions import (
    LOWEST_IR_VERSION,
    VERSION,
    dequantizer,
    fake_quantizer,
)
from qwrap.export.quantizers import Array, Quantizers, as_array
from qwrap.graph.nodes import QUANTIZED, QUANTIZED_AS
from qwrap.numerics import QParams, along_axis
from qwrap.quant.functions import at_opset
from qwrap.quant.placement.forms import PACKED_OPSET, PRIMITIVE_OPSET

PACKED_IR_VERSION = 10


@dataclass(frozen=True, slots=True)
class Call:
    """What the calls for one tensor have in common.

    Attributes:
        spec: how the tensor is quantized.
        qparams: scale, then the zero point where there is one; both broadcast against the tensor.
        block: index of the block of each element along ``spec.axis``, None without blocks.
    """

    spec: QuantSpec
    qparams: tuple[ir.Value, ...]
    block: ir.Value | None


class FunctionCalls:
    """Makes nodes, initialisers and functions with free names for one draft."""

    def __init__(self, make: Quantizers) -> None:
        """Take names from ``make``, and give it what is made."""
        self.make, self.draft, self.opset = make, make.draft, make.opset
        self._functions: dict[tuple[object, ...], ir.Function] = {}
        self._lowest: dict[ir.DataType, ir.Value] = {}

    def parameters(
        self, name: str, qparams: QParams, spec: QuantSpec, shape: Sequence[int | None]
    ) -> Call:
        """Make the initialisers of the qparams of a tensor.

        Args:
            name: of the tensor.
            qparams: its scale and zero point.
            spec: how it is quantized.
            shape: its shape, None for what is not known; the axis of blocks has to be.

        Raises:
            ExportError: the tensor is quantized in blocks of an axis whose length is not known.
        """
        values = [
            self.make.initializer(f"{name}_scale", _broadcast(qparams.scale, spec, len(shape)))
        ]
        if spec.dtype.has_zero_point:
            dtype = np.int32 if spec.dtype.function is None else np.float32
            zero_point = _broadcast(qparams.zero_point, spec, len(shape)).astype(dtype)
            values.append(self.make.initializer(f"{name}_zero_point", zero_point))
        if spec.block_size is None or spec.axis is None:
            return Call(spec, tuple(values), None)
        length = shape[spec.axis]
        if length is None:
            raise ExportError(
                f"tensor {name!r}: blocks along axis {spec.axis}, whose length the graph does not "
                "say; give the input a fixed shape, or use one scale for the tensor"
            )
        index = np.arange(length, dtype=np.int64) // spec.block_size
        return Call(spec, tuple(values), self.make.initializer(f"{name}_block", index))

    def fake_quantize(
        self, value: ir.Value, call: Call, name: str, real: ir.DataType
    ) -> list[ir.Node]:
        """Make the nodes that quantize and dequantize ``value`` of type ``real``."""
        dtype = call.spec.dtype
        nodes, qparams = self._spread(call, name)
        if dtype.function is not None:
            return [*nodes, *self._call_of_user(value, qparams, dtype, real, name)]
        function = self._own("FakeQuantize", fake_quantizer, dtype, real)
        node = self._node(function, [value, *qparams], name)
        return [*nodes, _marked(node, name, dtype, real)]

    def codes(self, name: str, codes: Tensor, dtype: QuantType) -> ir.Value:
        """Make the initialiser of a constant's codes, of 4 bits where the opset reads them."""
        kind = dtype.onnx_type
        if dtype.torch_dtype.itemsize == 1 and dtype.bits <= 4:  # which numpy stores in bytes
            if self.opset >= PACKED_OPSET:
                self._need_ir_version(PACKED_IR_VERSION)
            else:
                kind = ir.DataType.INT8 if dtype.signed and dtype.is_integer else ir.DataType.UINT8
        return self.make.initializer(f"{name}_quantized", as_array(codes, kind))

    def dequantize(
        self, codes: ir.Value, call: Call, real: ir.DataType, name: str
    ) -> list[ir.Node]:
        """Make the nodes that make values of type ``real`` of ``codes``."""
        nodes, qparams = self._spread(call, name)
        function = self._own("Dequantize", dequantizer, call.spec.dtype, real)
        nodes.append(self._node(function, [codes, *qparams], name))
        return nodes

    def keep_apart(self, value: ir.Value, name: str, real: ir.DataType) -> ir.Node:
        """Make a node that returns ``value``, and over which onnxruntime merges no others."""
        return self._plain("Max", [value, self._nothing(real)], [], name)

    # --- functions -------------------------------------------------------------------------------

    def _own(
        self,
        what: str,
        make: Callable[[QuantType, ir.DataType, int, str], ir.Function],
        dtype: QuantType,
        real: ir.DataType,
    ) -> ir.Function:
        """Return qwrap's function for a type, made once."""
        if self.opset < PRIMITIVE_OPSET:
            raise ExportError(
                f"{dtype} needs opset {PRIMITIVE_OPSET}, but the graph imports {self.opset}; call "
                "prepare() again with that configuration"
            )
        identity = (what, dtype, real)
        if identity not in self._functions:
            of = "" if real == ir.DataType.FLOAT else f"Of{real.name.capitalize()}"
            name = f"{what}{dtype.name[:1].upper()}{dtype.name[1:]}{of}"
            name = _free(name, {f.name for f in self._functions.values()})
            self._add(identity, make(dtype, real, self.opset, name), VERSION)
        return self._functions[identity]

    def _users(self, dtype: QuantType) -> ir.Function:
        """Return the user's function, at the opset of the draft."""
        assert dtype.function is not None
        identity = (dtype.function.proto,)
        if identity in self._functions:
            return self._functions[identity]
        proto = onnx.FunctionProto.FromString(dtype.function.proto)
        others = [f for f in self._functions.values() if f.domain == proto.domain]
        proto.name = _free(proto.name, {f.name for f in others})
        self._add(identity, at_opset(proto, self.opset), 1)
        return self._functions[identity]

    def _add(self, identity: tuple[object, ...], function: ir.Function, version: int) -> None:
        self.draft.functions[function.identifier()] = function
        imports = self.draft.graph.opset_imports
        imports.setdefault(function.domain, version)
        for domain, needed in function.opset_imports.items():
            imports.setdefault(domain, needed)
        self._need_ir_version(LOWEST_IR_VERSION)
        self._functions[identity] = function

    def _need_ir_version(self, version: int) -> None:
        self.draft.ir_version = max(self.draft.ir_version, version)

    # --- nodes -----------------------------------------------------------------------------------

    def _spread(self, call: Call, name: str) -> tuple[list[ir.Node], list[ir.Value]]:
        """Return the nodes that repeat the qparams of each block, and what they return."""
        if call.block is None:
            return [], list(call.qparams)
        axis = [ir.AttrInt64("axis", call.spec.axis or 0)]
        nodes = [self._plain("Gather", [v, call.block], axis, name) for v in call.qparams]
        return nodes, [node.outputs[0] for node in nodes]

    def _call_of_user(
        self, x: ir.Value, qparams: list[ir.Value], dtype: QuantType, real: ir.DataType, name: str
    ) -> list[ir.Node]:
        """Call the user's function, between nodes over which onnxruntime merges nothing.

        It might else make a product with the scale part of a MatMul or Conv next to it, and so
        move ties.
        """
        nodes: list[ir.Node] = []

        def then(op_type: str, *more: ir.Value, **attributes: int) -> None:
            given = [ir.AttrInt64(key, value) for key, value in attributes.items()]
            value = nodes[-1].outputs[0] if nodes else x
            nodes.append(self._plain(op_type, [value, *more], given, name))

        if real != ir.DataType.FLOAT:
            then("Cast", to=ir.DataType.FLOAT.value)
        nothing = self._nothing(ir.DataType.FLOAT)
        then("Max", nothing)
        call = self._node(self._users(dtype), [nodes[-1].outputs[0], *qparams], name)
        nodes.append(_marked(call, name, dtype, ir.DataType.FLOAT))
        then("Max", nothing)
        if real != ir.DataType.FLOAT:
            then("Cast", to=real.value)
        return nodes

    def _nothing(self, real: ir.DataType) -> ir.Value:
        """Return the number of a type that is below all others."""
        if real not in self._lowest:
            lowest = np.asarray(-math.inf, dtype=real.numpy())
            self._lowest[real] = self.make.initializer("lowest", lowest)
        return self._lowest[real]

    def _plain(
        self, op_type: str, inputs: list[ir.Value], attributes: list[ir.Attr], tensor: str
    ) -> ir.Node:
        node = ir.Node("", op_type, inputs, attributes, num_outputs=1)
        return self.make.named(node, f"{tensor}_{op_type}")

    def _node(self, function: ir.Function, inputs: list[ir.Value], tensor: str) -> ir.Node:
        node = ir.Node(function.domain, function.name, inputs, num_outputs=1)
        return self.make.named(node, f"{tensor}_{function.name}")


def _marked(call: ir.Node, tensor: str, dtype: QuantType, real: ir.DataType) -> ir.Node:
    """Say at the call of a function which tensor its output of type ``real`` stands for."""
    call.metadata_props[QUANTIZED] = tensor
    call.metadata_props[QUANTIZED_AS] = dtype.name
    call.outputs[0].type = ir.TensorType(real)
    return call


def _broadcast(values: Tensor, spec: QuantSpec, rank: int) -> Array:
    """Return scales or zero points as they broadcast, but for blocks."""
    if spec.axis is None:
        values = values.reshape(())
    elif spec.block_size is None:
        values = along_axis(values, spec.axis, rank)
    array: Array = values.detach().cpu().numpy()
    return array


def _free(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        candidate, count = f"{name}_{count}", count + 1
    return candidate
