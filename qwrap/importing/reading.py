"""What a QuantizeLinear or DequantizeLinear of a file says of its codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.config import QuantSpec, ScaleType
from qwrap.dtypes import FLOATS, INT32, INTEGERS, QuantType
from qwrap.export.write_back import Kind
from qwrap.graph.index import ValueType
from qwrap.graph.nodes import STANDARD
from qwrap.model.tensors import to_torch
from qwrap.model.values import constant_tensor
from qwrap.numerics import QParams
from qwrap.quant.placement.forms import CONTRIB, DEQUANTIZE, QUANTIZE, REALS

DTYPES: Mapping[int, QuantType] = MappingProxyType({
    dtype.onnx_type: dtype for dtype in (*INTEGERS, INT32, *FLOATS)
})
"""Element type of codes to the type that has all of its numbers."""

SCALE_TYPES: Mapping[int, ScaleType] = MappingProxyType({
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.FLOAT8E8M0: "float8e8m0",
})


class UnreadableError(Exception):
    """The codes of a node cannot be those of a stub; the text says why. Never leaves this layer."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Where a scale or zero point is stored.

    Attributes:
        node: that reads it.
        index: of the input.
        value: an initialiser, or what a Constant node makes.
        kind: what is stored there: both of the last two, multiplied, are the scales of NVFP4.
    """

    node: ir.Node
    index: int
    value: ir.Value | None
    kind: Kind


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """How codes are made of reals, or reals of codes.

    Attributes:
        spec: as general as the file allows: not narrow, not reduced.
        qparams: scale and zero point.
        real: type of the reals, None if it is not known.
        sources: where scale and zero point are stored.
    """

    spec: QuantSpec
    qparams: QParams
    real: ir.DataType | None
    sources: tuple[Source, ...]

    def equals(self, other: Reading) -> bool:
        """Whether codes mean the same, bit by bit; scales may be stored in different places."""
        mine, theirs = self.qparams, other.qparams
        return (
            self.spec == other.spec
            and torch.equal(mine.scale, theirs.scale)
            and torch.equal(mine.zero_point, theirs.zero_point)
        )


def is_quantizer(node: ir.Node | None, op_type: str) -> bool:
    """Whether a node is a QuantizeLinear or DequantizeLinear, whichever is asked for."""
    return node is not None and node.op_type == op_type and node.domain in (*STANDARD, CONTRIB)


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return what an initialiser or a Constant node holds, None if ``value`` is computed."""
    if value is None:
        return None
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in STANDARD:
        return None
    ((name, _),) = node.attributes.items()
    return None if "string" in name or "sparse" in name else constant_tensor(node)


def read(node: ir.Node, kind: ValueType) -> Reading:
    """Return what ``node``, which makes or reads codes, says of them.

    Args:
        node: a QuantizeLinear or DequantizeLinear.
        kind: what is known of what it reads.

    Raises:
        UnreadableError: with the reason.
    """
    codes, zeros, sources = _zero_points(node, kind)
    scale, scale_type, more = _scales(node)
    _check(node, codes, scale, scale_type, zeros)
    axis, block_size = _layout(node, scale, kind.rank)
    if axis is None:
        scale, zeros = scale.reshape(1), None if zeros is None else zeros.reshape(1)
    points = torch.zeros_like(scale, dtype=torch.int32) if zeros is None else zeros
    if points.shape != scale.shape:
        raise UnreadableError(f"it has {points.numel()} zero points for {scale.numel()} scales")
    spec = QuantSpec(
        dtype=codes,
        symmetric=_is_symmetric(codes, points),
        axis=axis,
        block_size=block_size,
        scale_type=scale_type,
    )
    qparams = QParams(scale, points, axis, block_size)
    return Reading(spec, qparams, _real(node, kind, scale_type), (*more, *sources))


# --- zero points ---------------------------------------------------------------------------------


def _zero_points(
    node: ir.Node, read_type: ValueType
) -> tuple[QuantType, Tensor | None, tuple[Source, ...]]:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = constant_of(value)
    if value is not None and tensor is None:
        raise UnreadableError("its zero point is computed while the model runs")
    kind: ir.DataType | None
    if tensor is not None:
        kind = tensor.dtype
    elif is_quantizer(node, QUANTIZE):
        kind = ir.DataType(integer(node, "output_dtype", 0) or ir.DataType.UINT8)
    else:
        kind = read_type.dtype
    if kind is None:
        raise UnreadableError("it does not say of what type its codes are")
    if kind not in DTYPES:
        raise UnreadableError(f"its codes are {kind.name.lower()}")
    zeros = None if tensor is None else as_floats(tensor).to(torch.int32)
    return DTYPES[kind], zeros, (Source(node, 2, value, "zero_point"),)


def _is_symmetric(dtype: QuantType, zeros: Tensor) -> bool:
    if not dtype.has_zero_point:
        return True
    middle = 0 if dtype.signed else round((dtype.qmin + dtype.qmax) / 2)
    return bool((zeros == middle).all())


# --- scales --------------------------------------------------------------------------------------


def _scales(node: ir.Node) -> tuple[Tensor, ScaleType, tuple[Source, ...]]:
    value = node.inputs[1]
    tensor = constant_of(value)
    if tensor is not None:
        if tensor.dtype not in SCALE_TYPES:
            raise UnreadableError(f"its scale is {tensor.dtype.name.lower()}")
        return as_floats(tensor), SCALE_TYPES[tensor.dtype], (Source(node, 1, value, "scale"),)
    return _scales_of_two_levels(value)


def _scales_of_two_levels(
    value: ir.Value | None,
) -> tuple[Tensor, ScaleType, tuple[Source, ...]]:
    """Read the scales of NVFP4: of float8, behind a DequantizeLinear of their own."""
    maker = None if value is None else value.producer()
    is_alone = value is not None and len(value.uses()) == 1
    if maker is None or not is_quantizer(maker, DEQUANTIZE) or not is_alone:
        raise UnreadableError("its scale is computed while the model runs")
    inner, outer = (constant_of(maker.inputs[i]) for i in (0, 1))
    plain = len(maker.inputs) < 3 or maker.inputs[2] is None
    if inner is None or outer is None or not plain:
        raise UnreadableError("its scale is computed while the model runs")
    if (
        inner.dtype != ir.DataType.FLOAT8E4M3FN
        or outer.dtype != ir.DataType.FLOAT
        or outer.size > 1
    ):
        raise UnreadableError("its scale is quantized in another way than that of NVFP4")
    sources = (
        Source(maker, 0, maker.inputs[0], "inner_scale"),
        Source(maker, 1, maker.inputs[1], "outer_scale"),
    )
    return as_floats(inner) * as_floats(outer).reshape(1), "float8e4m3fn", sources


def _check(
    node: ir.Node, codes: QuantType, scale: Tensor, scale_type: ScaleType, zeros: Tensor | None
) -> None:
    """Refuse what a stub would not compute as the node does.

    Raises:
        UnreadableError: with the reason.
    """
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise UnreadableError("a scale of it is not a positive number")
    if not codes.is_integer:
        if zeros is not None and bool(zeros.any()):
            raise UnreadableError(f"it adds a zero point to {codes}")
        if is_quantizer(node, QUANTIZE) and not integer(node, "saturate", 1):
            raise UnreadableError("it does not saturate")
    precision = integer(node, "precision", 0)
    if precision not in (0, ir.DataType.FLOAT):
        raise UnreadableError(f"it divides in {ir.DataType(precision).name.lower()}")
    if is_quantizer(node, QUANTIZE) and scale_type == "bfloat16" and not precision:
        raise UnreadableError("it divides in bfloat16")


def _layout(node: ir.Node, scale: Tensor, rank: int | None) -> tuple[int | None, int | None]:
    """Return the axis that scales lie along, and the size of blocks."""
    block_size = integer(node, "block_size", 0) or None
    if scale.dim() == 0 or (scale.numel() == 1 and block_size is None):
        return None, None
    axis = integer(node, "axis", 1)
    if block_size is None and scale.dim() != 1:
        raise UnreadableError(f"its scale has shape {list(scale.shape)}")
    if axis < 0:
        if rank is None:
            raise UnreadableError(f"it counts axis {axis} from the end of an unknown rank")
        axis += rank
    return axis, block_size


def _real(node: ir.Node, kind: ValueType, scale_type: ScaleType) -> ir.DataType | None:
    """Return the type of the reals as far as it is known."""
    if is_quantizer(node, DEQUANTIZE):
        stated = integer(node, "output_dtype", 0)
        if stated:
            return ir.DataType(stated)
        own = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
        return own.get(scale_type, ir.DataType.FLOAT)
    if kind.dtype is not None and kind.dtype not in REALS:
        raise UnreadableError(f"it quantizes {kind.dtype.name.lower()}")
    return kind.dtype


# --- tensors and attributes ----------------------------------------------------------------------


def as_floats(tensor: ir.TensorProtocol) -> Tensor:
    """Return the numbers of a tensor as float32."""
    made: Any = to_torch(tensor)
    result: Tensor = made.to(torch.float32)
    return result


def integer(node: ir.Node, name: str, default: int) -> int:
    """Return an attribute that is an integer."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()
