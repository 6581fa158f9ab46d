"""Let a graph import an opset whose quantizers carry what is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import onnx_ir as ir

from qwrap.config import QConfig, QuantSpec
from qwrap.errors import ConfigError, ExportError
from qwrap.graph.index import infer_types, opset_of, walk_nodes
from qwrap.graph.opset import raise_opset
from qwrap.ops.traits import WEIGHTED
from qwrap.quant.placement.forms import (
    CONTRIB,
    DEQUANTIZE,
    FUNCTION_OPSET,
    PACKED_OPSET,
    PRIMITIVE_OPSET,
    QUANTIZE,
    REALS,
    Format,
    bias_format,
    carried_by_contrib,
    domain_for,
    lowest_opset_of_all,
    scaled_as,
)
from qwrap.quant.placement.outer import at_8_bits

LOWEST_RAISED = 13  # what ``raise_opset`` raises to at least
Need = tuple[Format, str]


def let_carry(draft: ir.Model, config: QConfig) -> list[str]:
    """Raise the opset of ``draft``, in place, to the lowest that carries what ``config`` asks for.

    With ``config.contrib`` what com.microsoft's operators carry needs no opset; nor does it where
    some node of the graph has no form in the opset that is needed.

    Returns:
        What was changed, one line each.

    Raises:
        ConfigError: no opset carries a format, or the graph cannot be raised to one that does and
            com.microsoft's operators do not carry it either.
    """
    needs = list(dict.fromkeys(_needs(config, _reals(draft))))
    before = opset_of(draft, "")
    contrib = [need for need in needs if carried_by_contrib(need[0])]
    wanted = [need for need in needs if need not in contrib] if config.contrib else needs
    target = max(_lowest(wanted), _primitive_opset(config))
    packed = _packed_opset(config)
    if before >= max(target, packed):
        return []
    if packed > target:
        try:
            lines = raise_opset(draft, packed)
        except ExportError as error:
            if before >= target:
                return [f"opset stays {before}, with indices of 4 bits in 8: {error}"]
        else:
            return [f"opset {before} raised to {packed}", *lines]
    try:
        lines = raise_opset(draft, max(target, LOWEST_RAISED))
    except ExportError as error:
        without = _lowest([need for need in needs if need not in contrib])
        without = max(without, _primitive_opset(config))
        if before < without:
            formats = ", ".join(sorted({str(f) for f, _ in wanted if _lowest([(f, _)]) > before}))
            raise ConfigError(
                f"{formats}: needs opset {target}, but {error}. com.microsoft carries only "
                "integers of 4, 8 and 16 bits, per tensor or per axis"
            ) from error
        return [f"opset stays {before}, with quantizers of {CONTRIB}: {error}"]
    return [f"opset {before} raised to {opset_of(draft, '')}", *lines]


def carried_reals(config: QConfig, opset: int) -> frozenset[ir.DataType]:
    """Return the types of tensors that ``opset``, or com.microsoft, can quantize as asked."""
    return frozenset(
        real
        for real in REALS
        if all(domain_for(form, op, opset) is not None for form, op in _needs(config, {real}))
    )


def _primitive_opset(config: QConfig) -> int:
    """Return the first opset with the operators of types that have no QuantizeLinear."""
    opsets = [0]
    for spec in (*config.activation_specs, *config.weight_specs(0, 0)):
        if spec.dtype.is_standard:
            continue
        is_function = spec.dtype.function is not None
        opsets.append(max(FUNCTION_OPSET, spec.dtype.opset) if is_function else PRIMITIVE_OPSET)
    return max(opsets)


def _packed_opset(config: QConfig) -> int:
    """Return the opset that stores a weight's indices in 4 bits, 0 if they need more."""
    dtypes = [spec.dtype for spec in config.weight_specs(0, 0)]
    packed = any(dtype.codebook and dtype.onnx_type == ir.DataType.UINT4 for dtype in dtypes)
    return PACKED_OPSET if packed else 0


def _lowest(needs: list[Need]) -> int:
    opset = lowest_opset_of_all(needs)
    if opset is None:
        lost = [str(f) for f, op_type in needs if lowest_opset_of_all([(f, op_type)]) is None]
        raise ConfigError(
            f"no {QUANTIZE} of ONNX carries {', '.join(sorted(set(lost)))}; choose scales of "
            "float32, or another type"
        )
    return opset


def _needs(config: QConfig, reals: set[ir.DataType]) -> Iterator[Need]:
    """Yield each format that may be written, with the operator it is written for."""
    for real in sorted(reals):
        activations = config.activation_specs
        for spec in _with_wide(activations, config):
            if spec.dtype.is_standard:
                form = Format.of(scaled_as(spec, real), real)
                yield from ((form, op_type) for op_type in (QUANTIZE, DEQUANTIZE))
        for spec in _with_wide([*_weight_specs(config)], config):
            spec = scaled_as(spec, real)
            if not (spec.dtype.is_standard or spec.dtype.is_integer):
                continue  # its operators are primitive ones
            yield Format.of(spec, real), DEQUANTIZE
            if spec.scale_type == "float8e4m3fn":
                yield Format(codes=ir.DataType.FLOAT8E4M3FN), DEQUANTIZE
            if activations and real == ir.DataType.FLOAT and spec.block_size is None:
                yield bias_format(spec), DEQUANTIZE


def _weight_specs(config: QConfig) -> Iterator[QuantSpec]:
    for spec in config.weight_specs(0, 0):
        yield spec
        if spec.block_size is not None:  # where it is too large for a weight
            yield replace(spec, block_size=None)


def _with_wide(specs: list[QuantSpec], config: QConfig) -> list[QuantSpec]:
    """Add what first and last layers have instead."""
    return specs + [at_8_bits(spec) for spec in specs] if config.first_last_8bit else specs


def _reals(draft: ir.Model) -> set[ir.DataType]:
    """Return the float types of what the operators with weights read."""
    types = infer_types(draft)
    read = [v for n in walk_nodes(draft.graph) if n.op_type in WEIGHTED for v in n.inputs[:2]]
    found = {types[v].dtype for v in read if v is not None and v in types}
    return {dtype for dtype in REALS if dtype in found} or {ir.DataType.FLOAT}
