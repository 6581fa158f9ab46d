"""What a configuration makes of one node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import onnx_ir as ir

from qwrap.nbits.blocks import BlockFormat
from qwrap.nbits.gptq import gptq
from qwrap.nbits.hqq import hqq
from qwrap.nbits.kquant import k_quant
from qwrap.nbits.matmul import is_block
from qwrap.nbits.methods import Method
from qwrap.nbits.range_rtn import round_in_range
from qwrap.nbits.request import COMPRESSOR_NAMES, Request
from qwrap.nbits.rtn import round_to_nearest
from qwrap.ort.enums import QuantFormat
from qwrap.ort.errors import BlockSizeError, QuantizationError, UnsupportedError
from qwrap.ort.weight_only.configs import (
    DefaultWeightOnlyQuantConfig,
    GPTQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    RTNWeightOnlyQuantConfig,
    WeightOnlyQuantConfig,
)

ALGORITHMS = ("DEFAULT", "HQQ", "RTN", "k_quant", "GPTQ")
BITS = (2, 4, 8)
AROUND_ZERO = partial(round_to_nearest, around_zero=True)
"""As in onnxruntime's pairs."""


class Requests:
    """Says what to make of each node; methods are made once, for nodes that share a weight."""

    def __init__(
        self, config: WeightOnlyQuantConfig, form: BlockFormat, accuracy_level: int
    ) -> None:
        """Take the settings.

        Args:
            config: algorithm and its settings.
            form: of algorithms whose configuration does not say it.
            accuracy_level: likewise.

        Raises:
            QuantizationError: there is no such algorithm, or HQQ is to have another axis.
        """
        if config.algorithm not in ALGORITHMS:
            raise QuantizationError(
                f"no algorithm '{config.algorithm}'; there are {', '.join(ALGORITHMS)}"
            )
        if isinstance(config, HQQWeightOnlyQuantConfig) and config.axis != 1:
            raise QuantizationError(
                f"HQQ: axis={config.axis}: MatMulNBits has its blocks along the inputs, axis=1"
            )
        self._config, self._form, self._level = config, form, accuracy_level
        self._ratio = cache(lambda ratio: partial(round_in_range, ratio=ratio))
        self._gptq = _gptq(config) if isinstance(config, GPTQWeightOnlyQuantConfig) else None

    def __call__(self, node: ir.Node) -> Request:
        """Return what to make of a node; see ``of``."""
        names = [value.name for value in node.inputs if value is not None and value.name]
        weight = node.inputs[1]
        sizes = () if weight is None or weight.shape is None else weight.shape.dims
        rows = sizes[-2] if len(sizes) > 1 and isinstance(sizes[-2], int) else 0
        return self.of(node.name or "", node.op_type, names, rows)

    def of(self, name: str, op_type: str, weights: Sequence[str] = (), inputs: int = 0) -> Request:
        """Return what to make of a node.

        Args:
            name: of the node.
            op_type: MatMul or Gather.
            weights: names of what it reads.
            inputs: of its matrix; 0 if that is not known.

        Raises:
            QuantizationError: a size or a number of bits that no kernel reads.
            NotImplementedError: a Gather, which has no float zero points, by HQQ.
        """
        if op_type == "Gather" and self._config.algorithm == "HQQ":
            raise NotImplementedError("Gather quantization is not supported yet in HQQ")
        return _checked(self._request(name, weights, inputs), name, op_type)

    def _request(self, name: str, weights: Sequence[str], inputs: int) -> Request:
        config, axis = self._config, self._config.quant_axes.get("Gather", 1)
        if isinstance(config, DefaultWeightOnlyQuantConfig):
            return replace(_default(config), axis=axis)
        if isinstance(config, HQQWeightOnlyQuantConfig):
            form = BlockFormat(config.bits, config.block_size)
            return Request(form, hqq, accuracy_level=self._level)
        return Request(
            _custom(config, name, inputs, self._form),
            self._method(weights),
            accuracy_level=self._level,
            axis=axis,
            naming=COMPRESSOR_NAMES,
        )

    def _method(self, weights: Sequence[str]) -> Method:
        config = self._config
        if isinstance(config, KQuantWeightOnlyQuantConfig):
            return k_quant
        if isinstance(config, RTNWeightOnlyQuantConfig):
            ratios = (config.ratios[name] for name in weights if name in config.ratios)
            return self._ratio(next(ratios, 1.0))
        if self._gptq is None:
            raise QuantizationError(
                f"algo_config: {type(config).__name__} says nothing of an algorithm; pass one of "
                "the classes made for one, such as DefaultWeightOnlyQuantConfig"
            )
        return self._gptq


def _default(config: DefaultWeightOnlyQuantConfig) -> Request:
    is_pair = config.quant_format == QuantFormat.QDQ
    size = 0 if config.channel_wised_quantize else config.block_size
    return Request(
        BlockFormat(config.bits, size, config.is_symmetric),
        AROUND_ZERO if is_pair else round_to_nearest,
        "qdq" if is_pair else "operator",
        config.accuracy_level or 0,
        # Kernels of Intel's NPU read the codes of one output after the other.
        transposed=config.channel_wised_quantize and config.is_symmetric,
    )


def _gptq(config: GPTQWeightOnlyQuantConfig) -> Callable[..., Any]:
    return partial(
        gptq,
        damping=config.percdamp,
        act_order=config.actorder,
        search=config.mse,
        per_channel=config.perchannel,
        block=config.block_size,
    )


def _custom(
    config: WeightOnlyQuantConfig, name: str, inputs: int, form: BlockFormat
) -> BlockFormat:
    own = (config.customized_weight_config or {}).get(name, {})
    scheme = own.get("scheme", "sym" if form.symmetric else "asym")
    if scheme not in ("sym", "asym"):
        raise QuantizationError(f"node '{name}': scheme '{scheme}' is not 'sym' or 'asym'")
    size = own.get("group_size", form.block_size)
    return BlockFormat(own.get("bits", form.bits), inputs if size == -1 else size, scheme == "sym")


def _checked(request: Request, name: str, op_type: str) -> Request:
    form = request.format
    if form.bits not in BITS:
        raise UnsupportedError(
            f"Only support 2, 4 or 8 bits quantization; node '{name}' has bits={form.bits}"
        )
    if request.form == "operator" and not is_block(form.block_size, op_type):
        raise BlockSizeError(
            f"node '{name}': block_size={form.block_size}: in QOperator format it is a power of 2 "
            "from 16 on, for MatMul to 256"
        )
    if request.form == "qdq" and op_type == "Gather":
        raise UnsupportedError("Gather only supports QOperator format currently.")
    return request
