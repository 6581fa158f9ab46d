"""The nodes and initialisers of quantization, in the form that carries each format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.dtypes import QuantType
from qwrap.errors import ExportError
from qwrap.graph.constants import Constants
from qwrap.graph.index import opset_of, walk_nodes
from qwrap.numerics import QParams, outer_scale
from qwrap.quant.placement.forms import (
    CONTRIB,
    DEQUANTIZE,
    QUANTIZE,
    Format,
    domain_for,
    lowest_opset,
)

Array = npt.NDArray[Any]
ZERO_POINT = 2  # index of the input
EIGHT_BITS = 8
OUTPUT_DTYPE_OPSET = 21  # QuantizeLinear-21 brought ``output_dtype``
PRECISION_OPSET = 23  # QuantizeLinear-23 brought ``precision``


@dataclass(slots=True, eq=False)
class Parameters:
    """The qparams of one tensor, as initialisers.

    Attributes:
        spec: how it is quantized.
        real: type of the tensor.
        scale: as stored.
        zero_point: None where there is none.
        outer: what ``scale``, of float8, is multiplied with: NVFP4.
    """

    spec: QuantSpec
    real: ir.DataType
    scale: ir.Value
    zero_point: ir.Value | None
    outer: ir.Value | None = None

    @property
    def format(self) -> Format:
        """The types that meet at its nodes."""
        return Format.of(self.spec, self.real)


class Quantizers:
    """Makes nodes and initialisers with free names for one draft.

    Attributes:
        initializers: the constants of the draft.
        written: every format and operator that was made.
    """

    def __init__(self, draft: ir.Model) -> None:
        self.draft, self.opset = draft, opset_of(draft, "")
        self.initializers = Constants(draft)
        self.written: dict[tuple[Format, str, str], None] = {}
        self._names = {node.name for node in walk_nodes(draft.graph)}

    def initializer(self, name: str, array: Array) -> ir.Value:
        """Make an initialiser of the outermost graph."""
        return self.initializers.add(self.draft.graph, self.initializers.unique_name(name), array)

    def codes(self, name: str, codes: Tensor, dtype: QuantType) -> ir.Value:
        """Make the initialiser of a constant's codes."""
        return self.initializer(f"{name}_quantized", as_array(codes, dtype.onnx_type))

    def parameters(
        self,
        name: str,
        qparams: QParams,
        spec: QuantSpec,
        real: ir.DataType,
        suffix: str = "",
    ) -> Parameters:
        """Make the initialisers of scale and zero point of a tensor of type ``real``.

        Zero points are left out where they would be many zeros (of blocks), and where there is
        another way to tell the type: onnxruntime takes any zero point of 4 or 2 bits or of float8
        for the smallest code, and removes a Relu in front as if the clamp did its work; at a Clip
        it fails.
        """
        scale, zero_point = qparams.scale, qparams.zero_point
        if qparams.axis is None:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        kind, zero = spec.dtype.onnx_type, None
        if not self._is_needless(spec, zero_point):
            zero = self.initializer(f"{name}_zero_point{suffix}", as_array(zero_point, kind))
        if spec.scale_type != "float8e4m3fn" or scale.numel() == 1:
            stored = as_array(scale, _STORED[spec.scale_type])
            return Parameters(spec, real, self.initializer(f"{name}_scale{suffix}", stored), zero)
        outer = outer_scale(scale)
        inner = as_array(scale / outer, ir.DataType.FLOAT8E4M3FN)
        return Parameters(
            spec,
            real,
            self.initializer(f"{name}_scale{suffix}_quantized", inner),
            zero,
            self.initializer(f"{name}_scale{suffix}_scale", as_array(outer.reshape(()), 1)),
        )

    def _is_needless(self, spec: QuantSpec, zero_point: Tensor) -> bool:
        if spec.dtype.onnx_type == ir.DataType.FLOAT4E2M1:
            return True
        small = not spec.dtype.is_integer or spec.dtype.bits < EIGHT_BITS
        known = spec.block_size is not None or (small and self.opset >= OUTPUT_DTYPE_OPSET)
        return known and spec.dtype.signed and not bool(zero_point.any())

    def upsets(self, clamp: str, parameters: Parameters, zero_point: Tensor) -> bool:
        """Whether onnxruntime would wrongly remove a Relu in front, or fail at a Clip there."""
        dtype = parameters.spec.dtype
        small = not dtype.is_integer or dtype.bits < EIGHT_BITS
        if not small or parameters.zero_point is None:
            return False
        return clamp == "Clip" or bool((zero_point != dtype.qmin).any())

    def quantize(self, value: ir.Value, parameters: Parameters, name: str) -> ir.Node:
        """Make the node that turns ``value`` into codes."""
        form = parameters.format
        attributes = _layout(parameters.spec)
        if parameters.zero_point is None:
            attributes.append(ir.AttrInt64("output_dtype", form.codes))
        if form.scale != ir.DataType.FLOAT and self.opset >= PRECISION_OPSET:
            attributes.append(ir.AttrInt64("precision", ir.DataType.FLOAT))
        inputs = (value, parameters.scale, parameters.zero_point)
        return self._node(QUANTIZE, form, inputs, attributes, name)

    def dequantize(self, codes: ir.Value, parameters: Parameters, name: str) -> list[ir.Node]:
        """Make the nodes that give ``codes`` real values again: the output of the last."""
        nodes, scale = [], parameters.scale
        if parameters.outer is not None:
            levels = (parameters.scale, parameters.outer)
            form = Format(codes=ir.DataType.FLOAT8E4M3FN)
            nodes.append(self._node(DEQUANTIZE, form, levels, [], f"{name}_scale"))
            scale = nodes[0].outputs[0]
        form = parameters.format
        attributes = _layout(parameters.spec)
        if form.scale != form.real:
            attributes.append(ir.AttrInt64("output_dtype", form.real))
        inputs = (codes, scale, parameters.zero_point)
        return [*nodes, self._node(DEQUANTIZE, form, inputs, attributes, name)]

    def _node(
        self,
        op_type: str,
        form: Format,
        inputs: Sequence[ir.Value | None],
        attributes: list[ir.Attr],
        tensor: str,
    ) -> ir.Node:
        domain = domain_for(form, op_type, self.opset)
        if domain is None:
            needed = lowest_opset(form, op_type)
            raise ExportError(
                f"tensor {tensor!r}: {form} needs {op_type}-{needed}, but the graph imports opset "
                f"{self.opset}; call prepare() again with that configuration"
            )
        if domain == CONTRIB:
            self.draft.graph.opset_imports.setdefault(CONTRIB, 1)
        self.written[form, op_type, domain] = None
        given = inputs if inputs[-1] is not None else inputs[:-1]
        node = ir.Node(domain, op_type, given, attributes, num_outputs=1)
        return self.named(node, f"{tensor}_{op_type}")

    def named(self, node: ir.Node, name: str) -> ir.Node:
        """Give a new node of one output a free name, and its output as well; return it."""
        unique, count = name, 0
        while unique in self._names:
            count += 1
            unique = f"{name}_{count}"
        self._names.add(unique)
        node.name = unique
        node.outputs[0].name = self.initializers.unique_name(f"{name}_Output")
        return node


_STORED = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "float8e8m0": ir.DataType.FLOAT8E8M0,
    "float8e4m3fn": ir.DataType.FLOAT,  # one scale alone is stored as the product
}


def _layout(spec: QuantSpec) -> list[ir.Attr]:
    numbers = {"axis": spec.axis, "block_size": spec.block_size}
    return [ir.AttrInt64(name, n) for name, n in numbers.items() if n is not None]


def as_array(tensor: Tensor, kind: int) -> Array:
    """Return ``tensor`` as an array of the ``onnx.TensorProto`` data type ``kind``."""
    dtype = ir.DataType(kind).numpy()
    tensor = tensor.detach().cpu()
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():  # numpy does not know torch's
        return tensor.contiguous().view(torch.uint8).numpy().view(dtype)
    if dtype == ml_dtypes.float8_e8m0fnu:  # a cast rounds towards what it has: to nearest
        tensor = tensor.to(torch.float64)
    array: Array = np.asarray(tensor.numpy()).astype(dtype)
    return array
