"""Constant weights as 4-bit floats; ``python -m qwrap.ort.matmul_bnb4_quantizer`` too."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from qwrap.graph import read_model
from qwrap.graph.index import walk_nodes
from qwrap.nbits.blocks import BlockFormat
from qwrap.nbits.bnb4 import Kind, float4_arrays
from qwrap.nbits.matmul import is_block
from qwrap.nbits.request import Request
from qwrap.nbits.rewrite import rewrite
from qwrap.nbits.rtn import round_to_nearest
from qwrap.nbits.streaming import take_in
from qwrap.ort.errors import (
    BlockSizeError,
    QuantizationError,
    UnknownNameError,
    UnsupportedError,
)
from qwrap.ort.onnx_model import ONNXModel
from qwrap.ort.report import Report

__all__ = ["MatMulBnb4Quantizer", "parse_args"]

logger = logging.getLogger(__name__)


class MatMulBnb4Quantizer:
    """Turns MatMul of constants into MatMulBnb4, wherever it is in a model.

    ``process()`` does it, and ``model`` then holds the result; the model that was given stays as it
    is.

    Attributes:
        model: an ``ONNXModel``.
        report: what became of each node.
    """

    FP4 = 0
    NF4 = 1

    def __init__(
        self,
        model: onnx.ModelProto | str | os.PathLike[str],
        quant_type: int,
        block_size: int,
        nodes_to_exclude: Iterable[str] | None = None,
    ) -> None:
        """Take the settings.

        Args:
            model: message or path.
            quant_type: ``FP4`` or ``NF4``.
            block_size: weights in a row that share a scale: a power of 2 from 16 to 256.
            nodes_to_exclude: names of nodes to leave.

        Raises:
            UnsupportedError: ``quant_type`` is neither (an ``AssertionError``).
            BlockSizeError: no kernel reads such blocks (a ``RuntimeError``).
        """
        if quant_type not in (self.FP4, self.NF4):
            raise UnsupportedError(f"quant_type={quant_type}: 0 is FP4, 1 is NF4")
        if not is_block(block_size):
            raise BlockSizeError(f"block_size={block_size}: MatMulBnb4 takes 16, 32, 64, 128, 256")
        self._source = model
        self._model: ONNXModel | None = None
        self.quant_type = quant_type
        self.block_size = block_size
        self.nodes_to_exclude = set(nodes_to_exclude or ())
        self.report = Report()

    @property
    def model(self) -> ONNXModel:
        """The quantized model; before ``process()`` a copy of the one that was given."""
        if self._model is None:
            given, own = self._source, onnx.ModelProto()
            own.CopyFrom(given if isinstance(given, onnx.ModelProto) else onnx.load(given))
            self._model = ONNXModel(own)
        return self._model

    @property
    def _kind(self) -> Kind:
        return "nf4" if self.quant_type == self.NF4 else "fp4"

    def bnb4_block_quant(self, fpweight: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return codes, two to a byte, and the largest magnitude of each block of a weight.

        Args:
            fpweight: ``[K, N]``; blocks run along K.

        Raises:
            QuantizationError: it is no matrix (a ``ValueError``).
        """
        if fpweight.ndim != 2:
            raise QuantizationError(
                f"Current bnb4 block quantization only supports 2D tensors! got {fpweight.shape}"
            )
        matrix = torch.from_numpy(np.array(fpweight.T))
        return float4_arrays(matrix, self.block_size, self._kind)

    def process(self) -> None:
        """Quantize.

        Raises:
            UnknownNameError: a node to exclude is not there (a ``ValueError``).
            ModelError: the model cannot be read.
        """
        model = read_model(self._source).clone()
        known = {node.name for node in walk_nodes(model.graph) if node.name}
        for name in sorted(self.nodes_to_exclude - known):
            raise UnknownNameError("node in nodes_to_exclude", name, known)
        form = BlockFormat(4, self.block_size)
        request = Request(form, round_to_nearest, self._kind)

        def choose(node: ir.Node) -> Request | None:
            wanted = node.op_type == "MatMul" and node.name not in self.nodes_to_exclude
            return request if wanted else None

        self.report = Report()
        rewrite(model, choose, report=self.report, through_transpose=False)
        take_in(model)
        self._model = ONNXModel(ir.to_proto(model))


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line says; ``arguments`` in its place, if given."""
    parser = argparse.ArgumentParser(
        prog="python -m qwrap.ort.matmul_bnb4_quantizer",
        description="Turn constant weights of MatMul into blocks of 4-bit floats.",
    )
    add = parser.add_argument
    add("--input_model", required=True, help="model to read")
    add("--output_model", required=True, help="file to make; it must not exist")
    add("--quant_type", default=1, type=int, choices=[0, 1], help="0: FP4, 1: NF4 (1)")
    add("--block_size", default=64, type=int, help="weights that share a scale (64)")
    add("-v", "--verbose", action="store_true", help="say what becomes of each node")
    add("--nodes_to_exclude", nargs="+", default=[], help="nodes to leave")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Quantize a file as the command line says.

    Raises:
        FileExistsError: the output exists.
        QuantizationError: the settings do not fit the model.
    """
    given = parse_args(arguments)
    logging.basicConfig(level=logging.INFO if given.verbose else logging.WARNING)
    if Path(given.output_model).exists():
        raise FileExistsError(f"file {given.output_model} already exists")
    quantizer = MatMulBnb4Quantizer(
        given.input_model, given.quant_type, given.block_size, given.nodes_to_exclude
    )
    quantizer.process()
    quantizer.model.save_model_to_file(given.output_model, True)
    logger.info("%s", quantizer.report)


if __name__ == "__main__":
    main()
