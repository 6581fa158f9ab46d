"""Gather from a constant table: GatherBlockQuantized."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.model.tensors import to_numpy
from qwrap.nbits.blocks import BlockFormat
from qwrap.nbits.draft import MICROSOFT, Array, Draft, Weight
from qwrap.nbits.matmul import is_block
from qwrap.nbits.packing import INTEGERS, pack
from qwrap.nbits.request import Request
from qwrap.nbits.unfit import Unfit


def quantize_gather(draft: Draft, node: ir.Node, request: Request) -> str:
    """Replace a Gather whose first input is a constant, in place; return what was made of it.

    Codes of 3 and 4 bits are int4 or uint4; others are packed in bytes, which needs blocks along
    the last axis and slices along the first.

    Raises:
        Unfit: the node stays as it is; the message says why.
    """
    weight = draft.weight(node.inputs[0])
    if weight is None:
        raise Unfit("its table is no constant of a float type")
    gather_axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    axis = _check(weight, request, gather_axis)
    form = request.format
    names = request.names(weight.name, form.block_size)
    key = (weight.value, weight.turned, "Gather", axis, form)
    if key not in draft.made:
        arrays = table_arrays(_values(weight), axis, form)
        given = zip((names.codes, names.scale, names.zero_point), arrays, strict=False)
        draft.made[key] = [draft.constant(weight.graph, *pair) for pair in given]
    codes, *rest = draft.made[key]
    attributes = {
        "gather_axis": gather_axis,
        "quantize_axis": axis,
        "block_size": form.block_size,
    }
    if form.stored_bits != 4:
        attributes["bits"] = form.bits
    made = draft.node(
        "GatherBlockQuantized",
        [codes, node.inputs[1], *rest],
        f"{node.outputs[0].name}_gathered",
        name=f"{node.name}{names.node}" if node.name else "",
        domain=MICROSOFT,
        attributes=attributes,
    )
    draft.replace(node, [made])
    return f"GatherBlockQuantized, {form.text}, blocks of {form.block_size} along axis {axis}"


def _check(weight: Weight, request: Request, gather_axis: int) -> int:
    """Return the axis of the blocks, counted from the first."""
    rank = len(weight.shape)
    if request.form == "qdq":
        raise Unfit("Gather does not take codes, so that a pair would keep the table in float")
    if request.form != "operator":
        raise Unfit("there is no Gather of 4-bit floats")
    if weight.tensor.dtype == ir.DataType.DOUBLE:
        raise Unfit(f"table {weight.name!r} is of float64: GatherBlockQuantized takes none")
    if not -rank <= request.axis < rank:
        raise Unfit(f"table {weight.name!r} {list(weight.shape)} has no axis {request.axis}")
    if not is_block(request.format.block_size, "Gather"):
        raise Unfit(f"blocks of {request.format.block_size} are no power of 2 from 16 on")
    axis = request.axis % rank
    in_bytes = request.format.stored_bits != 4
    if in_bytes and (axis != rank - 1 or gather_axis % rank != 0):
        raise Unfit(
            f"{request.format.bits} bits are packed, which needs slices along axis 0 and blocks "
            f"along axis {rank - 1}, not {gather_axis} and {axis}"
        )
    return axis


def _values(weight: Weight) -> Array:
    values = weight.read()
    if not values.isfinite().all():
        raise Unfit(f"table {weight.name!r} has values that are not finite")
    array: Array = to_numpy(values)
    return array


def table_values(weight: Weight, node: ir.Node, request: Request) -> Callable[[], Tensor] | None:
    """Return what makes the numbers that a quantized table holds, None if it stays as it is."""
    gather_axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    try:
        axis = _check(weight, request, gather_axis)
    except Unfit:
        return None

    def made() -> Tensor:
        values = weight.read()
        codes, scale, zero_point = rounded_table(to_numpy(values), axis, request.format)
        size, count = request.format.block_size, codes.shape[axis]
        wide = [
            np.repeat(each.astype(np.float32), size, axis).take(range(count), axis)
            for each in (scale, zero_point)
        ]
        return torch.from_numpy(((codes - wide[1]) * wide[0]).astype(np.float32)).to(values.dtype)

    return made


def table_arrays(table: Array, axis: int, form: BlockFormat) -> tuple[Array, ...]:
    """Return what GatherBlockQuantized reads of a table.

    Args:
        table: floats of any shape.
        axis: along which blocks lie; the last one may be short.
        form: bits, block size, symmetry.

    Returns:
        Codes of the table's shape; scales in its dtype, as many along ``axis`` as there are blocks;
        if asymmetric zero points like the scales.
    """
    codes, scale, zero_point = rounded_table(table, axis, form)
    middle = 2 ** (form.bits - 1)
    if form.stored_bits == 4:
        kind = INTEGERS[4, form.symmetric]
        parts = [codes.astype(kind), scale]
        return (*parts, *(() if form.symmetric else (zero_point.astype(kind),)))
    shifted = codes + middle if form.symmetric else codes
    parts = [pack(shifted.astype(np.uint8), form.bits, fill=middle), scale]
    if form.symmetric:
        return tuple(parts)
    return (*parts, pack(zero_point.astype(np.uint8), form.bits, fill=middle))


def rounded_table(table: Array, axis: int, form: BlockFormat) -> tuple[Array, Array, Array]:
    """Round a table to the nearest codes, halves to even ones.

    Symmetric codes are signed: the value that is largest in magnitude gets the lowest one.
    Asymmetric codes span the extremes of a block and 0.

    Returns:
        Codes of the table's shape, scales and zero points, as many along ``axis`` as there are
        blocks; in float types, but for the zero points uint8 or (symmetric) 0.
    """
    wide = table.astype(np.float32) if table.dtype == ml_dtypes.bfloat16 else table
    count = -(-table.shape[axis] // form.block_size)
    starts = np.arange(count) * form.block_size
    low, high = (f.reduceat(wide, starts, axis=axis) for f in (np.minimum, np.maximum))
    middle, top = 2 ** (form.bits - 1), 2**form.bits - 1
    dtype = wide.dtype.type

    def spread(blocks: Array) -> Array:
        return np.repeat(blocks, form.block_size, axis).take(range(table.shape[axis]), axis)

    if form.symmetric:
        scale = np.where(np.abs(high) > np.abs(low), high, low) / dtype(-middle)
        zero_point = np.zeros(scale.shape, np.int8)
        ends = (-middle, middle - 1)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = (high - low) / dtype(top)
        divisor = np.where(scale == 0, 1, scale)
        zero_point = np.where(scale == 0, middle, -low / divisor).round().clip(0, top)
        ends = (0, top)
    stored = scale.astype(table.dtype)
    divisor = spread(np.where(stored == 0, 1, stored).astype(wide.dtype))
    codes = (wide / divisor + spread(zero_point.astype(wide.dtype))).round().clip(*ends)
    return codes, stored, zero_point
