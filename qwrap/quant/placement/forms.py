"""Which QuantizeLinear and DequantizeLinear carry a format: going by the schemas of ONNX."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Literal

import onnx
import onnx_ir as ir

from qwrap.config import QuantSpec, ScaleType
from qwrap.dtypes import INT32

CONTRIB = "com.microsoft"
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
REALS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Types of the tensors that can be quantized."""

SCALES: Mapping[ScaleType, ir.DataType] = MappingProxyType({
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "float8e8m0": ir.DataType.FLOAT8E8M0,
    "float8e4m3fn": ir.DataType.FLOAT,  # a DequantizeLinear of its own multiplies both levels
})
"""Scale type to the type of the scale that a node reads."""

_CONTRIB_CODES = (
    ir.DataType.UINT8,
    ir.DataType.INT8,
    ir.DataType.UINT16,
    ir.DataType.INT16,
    ir.DataType.UINT4,
    ir.DataType.INT4,
)

PRIMITIVE_OPSET = 11
"""First opset with the operators that types are written in which QuantizeLinear lacks: Round."""
FUNCTION_OPSET = 13
"""First opset that functions of the user, written for an earlier one, can be raised to."""
PACKED_OPSET = 21
"""First opset whose Cast reads indices of 4 bits."""

Granularity = Literal["tensor", "axis", "block"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """The types that meet at a QuantizeLinear or DequantizeLinear, and how scales lie.

    Attributes:
        codes: type of the codes.
        real: type of the tensor.
        scale: type of the scale.
        granularity: whether there is one scale, one per index of an axis, or one per block.
    """

    codes: ir.DataType
    real: ir.DataType = ir.DataType.FLOAT
    scale: ir.DataType = ir.DataType.FLOAT
    granularity: Granularity = "tensor"

    @classmethod
    def of(cls, spec: QuantSpec, real: ir.DataType) -> Format:
        """Return the format of a tensor of type ``real`` that is quantized as ``spec`` says."""
        granularity: Granularity = "tensor" if spec.axis is None else "axis"
        if spec.block_size is not None:
            granularity = "block"
        return cls(
            codes=ir.DataType(spec.dtype.onnx_type),
            real=real,
            scale=SCALES[spec.scale_type],
            granularity=granularity,
        )

    def __str__(self) -> str:
        where = {"tensor": "per tensor", "axis": "per axis", "block": "in blocks"}
        codes, real, scale = (t.name.lower() for t in (self.codes, self.real, self.scale))
        return f"{codes} {where[self.granularity]} of {real} with scales of {scale}"


def bias_format(spec: QuantSpec) -> Format:
    """Return the format of a bias behind a weight of ``spec``."""
    axis: Granularity = "tensor" if spec.axis is None else "axis"
    return Format(codes=ir.DataType(INT32.onnx_type), granularity=axis)


def scaled_as(spec: QuantSpec, real: ir.DataType) -> QuantSpec:
    """Return ``spec`` with the scale in the type of the tensor, unless it asks for another."""
    own: dict[ir.DataType, ScaleType] = {
        ir.DataType.FLOAT16: "float16",
        ir.DataType.BFLOAT16: "bfloat16",
    }
    if spec.scale_type != "float32" or real not in own:
        return spec
    return replace(spec, scale_type=own[real])


@cache
def lowest_opset(form: Format, op_type: str) -> int | None:
    """Return the first opset of ai.onnx whose ``op_type`` carries ``form``, None if none does."""
    schemas = [s for s in _revisions(op_type) if _carries(s, form)]
    return min((s.since_version for s in schemas), default=None)


def lowest_opset_of_all(needs: Iterable[tuple[Format, str]]) -> int | None:
    """Return the first opset of ai.onnx that carries each format in its operator, if there is."""
    opsets = [lowest_opset(form, op_type) for form, op_type in needs]
    return None if None in opsets else max((o for o in opsets if o is not None), default=1)


def domain_for(form: Format, op_type: str, opset: int) -> str | None:
    """Return the domain whose ``op_type`` carries ``form`` beside ai.onnx ``opset``, or None."""
    lowest = lowest_opset(form, op_type)
    if lowest is not None and lowest <= opset:
        return ""
    return CONTRIB if carried_by_contrib(form) else None


def carried_by_contrib(form: Format) -> bool:
    """Whether com.microsoft's pair, which needs no opset, carries ``form``."""
    codes = (*_CONTRIB_CODES, ir.DataType.INT32)
    return (
        form.codes in codes
        and form.real == form.scale == ir.DataType.FLOAT  # the schema says float16 too; no kernel
        and form.granularity != "block"
    )


@cache
def _revisions(op_type: str) -> tuple[onnx.defs.OpSchema, ...]:
    every = onnx.defs.get_all_schemas_with_history()
    return tuple(s for s in every if s.name == op_type and s.domain == "")


def _carries(schema: onnx.defs.OpSchema, form: Format) -> bool:
    needed = {"axis": form.granularity == "axis", "block_size": form.granularity == "block"}
    if any(name not in schema.attributes for name, wanted in needed.items() if wanted):
        return False
    if schema.name == QUANTIZE:
        # The division is one of float32, which only ``precision`` can say of other scales than
        # float16: there onnxruntime divides in float32 anyway.
        plain = form.scale in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
        if not plain and "precision" not in schema.attributes:
            return False
        types = (form.real, form.scale, form.codes)
    else:
        types = (form.codes, form.scale, form.codes)
    result = form.codes if schema.name == QUANTIZE else form.real
    bound: dict[str, set[ir.DataType]] = {}
    for formal, actual in zip(schema.inputs, types, strict=True):
        bound.setdefault(formal.type_str, set()).add(actual)
    bound.setdefault(schema.outputs[0].type_str, set()).add(result)
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    return all(
        len(actual) == 1 and _type_string(next(iter(actual))) in allowed.get(name, (name,))
        for name, actual in bound.items()
    )


def _type_string(dtype: ir.DataType) -> str:
    return f"tensor({dtype.name.lower()})"
