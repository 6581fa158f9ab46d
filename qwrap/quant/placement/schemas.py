"""Which types the schema of an operator allows: that of ONNX, or of onnxruntime for its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx


@dataclass(frozen=True, slots=True)
class Signature:
    """The types of an operator's inputs and outputs.

    Attributes:
        inputs: type variable, or type, of each; the last one holds for all further ones.
        outputs: the same of outputs.
        allowed: type variable -> types it may stand for, as in "tensor(float16)".
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    allowed: dict[str, frozenset[str]]


@cache
def signature_of(domain: str, op_type: str, version: int) -> Signature | None:
    """Return what is known of an operator of a version of its set, None if nothing is.

    Args:
        domain: of the operator, empty for ONNX's own.
        op_type: its name.
        version: of the operator set that a graph imports.
    """
    try:
        return _read(onnx.defs.get_schema(op_type, version, domain))
    except onnx.defs.SchemaError:
        found = [s for s in _runtime_schemas(domain, op_type) if s.since_version <= version]
        return _read(max(found, key=lambda s: s.since_version)) if found else None


@cache
def _runtime_schemas(domain: str, op_type: str) -> Sequence[Any]:
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime  # the only way to them

    schemas = runtime.get_all_operator_schema()
    return [s for s in schemas if (s.domain, s.name) == (domain, op_type)]


def _read(schema: Any) -> Signature:
    return Signature(
        inputs=tuple(_type_of(parameter) for parameter in schema.inputs),
        outputs=tuple(_type_of(parameter) for parameter in schema.outputs),
        allowed={c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints},
    )


def _type_of(parameter: Any) -> str:
    return str(parameter.type_str if hasattr(parameter, "type_str") else parameter.typeStr)
