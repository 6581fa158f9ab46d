"""MatMulNBitsQuantizer: constant weights of a model in 2, 4 or 8 bits."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import onnx
import onnx_ir as ir

from qwrap.graph import read_model
from qwrap.graph.index import walk_nodes
from qwrap.nbits.blocks import BlockFormat
from qwrap.nbits.draft import Draft
from qwrap.nbits.inputs import observe_inputs
from qwrap.nbits.request import Request
from qwrap.nbits.rewrite import is_candidate, rewrite
from qwrap.nbits.streaming import take_in
from qwrap.ort.enums import QuantFormat
from qwrap.ort.errors import QuantizationError, UnknownNameError, UnsupportedError
from qwrap.ort.onnx_model import ONNXModel
from qwrap.ort.report import Report
from qwrap.ort.weight_only.awq import NVAWQWeightOnlyQuantConfig, NVAWQWeightOnlyQuantizer
from qwrap.ort.weight_only.configs import (
    CUSTOM_KEYS,
    Axes,
    DefaultWeightOnlyQuantConfig,
    GPTQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    Types,
    WeightOnlyQuantConfig,
)
from qwrap.ort.weight_only.default import DefaultWeightOnlyQuantizer
from qwrap.ort.weight_only.hqq import HQQWeightOnlyQuantizer
from qwrap.ort.weight_only.requests import Requests

logger = logging.getLogger("qwrap.ort.matmul_nbits_quantizer")  # scripts set its level


OP_TYPES = ("MatMul", "Gather")
"""Operators that onnxruntime's tool knows weights of."""


class MatMulNBitsQuantizer:
    """Quantizes constant weights of MatMul, and tables of Gather, wherever they are in a model.

    ``process()`` does it, and ``model`` then holds the result; the model that was given stays as it
    is. One that is given as a path is read weight by weight.

    Attributes:
        model: an ``ONNXModel``.
        model_path: the path, if one was given.
        algo_config: the algorithm and its settings.
        report: what became of each node.
    """

    def __init__(
        self,
        model: onnx.ModelProto | str | os.PathLike[str],
        bits: int = 4,
        block_size: int = 128,
        is_symmetric: bool = False,
        accuracy_level: int | None = None,
        nodes_to_exclude: Iterable[str] | None = None,
        nodes_to_include: Iterable[str] | None = None,
        quant_format: QuantFormat = QuantFormat.QOperator,
        op_types_to_quantize: Types = None,
        quant_axes: Axes = None,
        channel_wised_quantize: bool = False,
        algo_config: WeightOnlyQuantConfig | None = None,
    ) -> None:
        """Take the settings.

        Args:
            model: message or path.
            bits: 2, 4 or 8. This and the next two hold for RTN, k_quant and GPTQ too.
            block_size: weights that share a scale: a power of 2 from 16 on, for MatMul to 256.
            is_symmetric: keep no zero points.
            accuracy_level: what MatMulNBits may round its input to, 1 float32, 2 float16,
                3 bfloat16, 4 int8; None or 0 writes nothing, and the runtime computes in the type
                of the input.
            nodes_to_exclude: names of nodes to leave.
            nodes_to_include: names of nodes to quantize: these alone, or where operators are given
                too, these and those.
            quant_format: operators on codes, or DequantizeLinear before float operators.
            op_types_to_quantize: MatMul, Gather; None: MatMul.
            quant_axes: pairs of an operator and the axis of its blocks; None: MatMul 0, Gather 1.
            channel_wised_quantize: one block for each output; in QDQ form.
            algo_config: the algorithm; None: rounding to nearest with what is given here.

        Raises:
            UnsupportedError: the bits are others (an ``AssertionError``).
            NotImplementedError: ``channel_wised_quantize`` with QOperator.
        """
        self._source = model
        self._model: ONNXModel | None = None
        self.model_path = os.fspath(model) if isinstance(model, (str, os.PathLike)) else None
        self.bits = bits
        self.block_size = block_size
        self.is_symmetric = is_symmetric
        self.accuracy_level = accuracy_level
        self.nodes_to_exclude = set(nodes_to_exclude or ())
        self.nodes_to_include = set(nodes_to_include) if nodes_to_include else None
        self.algo_config = algo_config or DefaultWeightOnlyQuantConfig(
            block_size=block_size,
            is_symmetric=is_symmetric,
            accuracy_level=accuracy_level,
            quant_format=quant_format,
            op_types_to_quantize=op_types_to_quantize,
            quant_axes=quant_axes,
            bits=bits,
            channel_wised_quantize=channel_wised_quantize,
        )
        self.report = Report()
        self.node_quantizer = node_quantizer(self.algo_config)
        if getattr(self.algo_config, "bits", bits) not in (2, 4, 8):
            raise UnsupportedError("Only support 2, 4 or 8 bits quantization")

    @property
    def model(self) -> ONNXModel:
        """The quantized model; before ``process()`` a copy of the one that was given."""
        if self._model is None:
            own = onnx.ModelProto()
            own.CopyFrom(onnx.load(self._source) if self.model_path else self._source)
            self._model = ONNXModel(own)
        return self._model

    @model.setter
    def model(self, model: ONNXModel) -> None:
        self._model, self._source, self.model_path = model, model.model, None

    def process(self) -> None:
        """Quantize.

        Raises:
            QuantizationError: a setting contradicts itself or the model, names a node that it does
                not have, or GPTQ has no data (a ``ValueError``).
            NotImplementedError: HQQ of a Gather.
            ModelError: the model cannot be read.
            ExportError: the model cannot be raised to the opset that int4 needs.
        """
        model = read_model(self._source).clone()
        if isinstance(self.node_quantizer, NVAWQWeightOnlyQuantizer):
            self._process_awq(model, self.node_quantizer)
            return
        requests = self._requests(model)
        self.report = Report()
        rewrite(model, requests.get, report=self.report, through_transpose=False)
        take_in(model)
        self._model = ONNXModel(ir.to_proto(model))
        logger.debug("%s", self.report)

    def _process_awq(self, model: ir.Model, quantizer: NVAWQWeightOnlyQuantizer) -> None:
        nodes = list(walk_nodes(model.graph))
        self._check_names({node.name for node in nodes if node.name})
        self.report = Report()
        result = quantizer.quantize_awq(
            self._source,
            bits=self.bits,
            block_size=self.block_size,
            exclude=self.nodes_to_exclude,
            nodes=self.nodes_to_include,
            report=self.report,
        )
        self._model = ONNXModel(result)

    def int4_quant_algo(self) -> None:
        """Quantize; of RTN, k_quant and GPTQ this was once the only way."""
        self.process()

    def _requests(self, model: ir.Model) -> dict[ir.Node, Request]:
        """Return what to make of each node that was chosen."""
        nodes = list(walk_nodes(model.graph))
        self._check_names({node.name for node in nodes if node.name})
        chosen = [node for node in nodes if self._is_candidate(node)]
        form = BlockFormat(self.bits, self.block_size, self.is_symmetric)
        make = Requests(self.algo_config, form, self.accuracy_level or 0)
        requests = {node: make(node) for node in chosen}
        seen = self._statistics(model, chosen)
        return {node: replace(r, statistics=seen.get(node)) for node, r in requests.items()}

    def _check_names(self, known: set[str]) -> None:
        custom = self.algo_config.customized_weight_config or {}
        for what, names in (
            ("node in nodes_to_exclude", self.nodes_to_exclude),
            ("node in nodes_to_include", self.nodes_to_include or ()),
            ("node in customized_weight_config", custom),
        ):
            for name in sorted(names):
                if name not in known:
                    raise UnknownNameError(what, name, known)
        for name, settings in custom.items():
            for key in settings:
                if key not in (*CUSTOM_KEYS, "algorithm"):
                    raise UnknownNameError(f"setting of node '{name}'", key, CUSTOM_KEYS)

    def _is_candidate(self, node: ir.Node) -> bool:
        known = node.op_type in OP_TYPES and is_candidate(node)
        return known and self._is_chosen(node)

    def _is_chosen(self, node: ir.Node) -> bool:
        if node.name in self.nodes_to_exclude:
            return False
        named = self.nodes_to_include is not None and node.name in self.nodes_to_include
        if self.nodes_to_include is not None and not self.algo_config.chooses_by_type:
            return named
        return named or node.op_type in self.algo_config.op_types_to_quantize

    def _statistics(self, model: ir.Model, nodes: list[ir.Node]) -> dict[ir.Node, Any]:
        config = self.algo_config
        if not isinstance(config, GPTQWeightOnlyQuantConfig):
            return {}
        if config.calibration_data_reader is None:
            raise QuantizationError(
                "GPTQ needs data: give GPTQWeightOnlyQuantConfig a calibration_data_reader"
            )
        constants = Draft(model, through_transpose=False)
        products = [n for n in nodes if n.op_type == "MatMul" and constants.weight(n.inputs[1])]
        reader = _fresh(config.calibration_data_reader)
        return dict(observe_inputs(model, products, reader)) if products else {}


def _fresh(reader: Any) -> Any:
    """Return a copy of a reader, so that it can be read again, where it can be copied."""
    try:
        return copy.deepcopy(reader)
    except TypeError:  # it holds what cannot be, such as a generator or a session
        return reader


def node_quantizer(config: WeightOnlyQuantConfig) -> Any:
    """Return what quantizes one node of a message with this configuration, if there is such."""
    if isinstance(config, HQQWeightOnlyQuantConfig):
        return HQQWeightOnlyQuantizer(config)
    if isinstance(config, DefaultWeightOnlyQuantConfig):
        return DefaultWeightOnlyQuantizer(config)
    if isinstance(config, NVAWQWeightOnlyQuantConfig):
        return NVAWQWeightOnlyQuantizer(config)
    return None
