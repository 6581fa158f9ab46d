"""``python -m qwrap.ort.matmul_nbits_quantizer``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwrap.data import graph_inputs, open_data
from qwrap.ort.enums import QuantFormat
from qwrap.ort.errors import QuantizationError
from qwrap.ort.weight_only.awq import NVAWQWeightOnlyQuantConfig
from qwrap.ort.weight_only.configs import (
    DefaultWeightOnlyQuantConfig,
    GPTQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    RTNWeightOnlyQuantConfig,
    WeightOnlyQuantConfig,
)
from qwrap.ort.weight_only.quantizer import MatMulNBitsQuantizer

logger = logging.getLogger(__name__)
AWQ_METHODS = {None: "awq_lite", "awq": "awq_lite", "awq_clip": "awq_clip"}


def ort_convert_str_to_bool(value: str) -> bool:
    """Return whether a text means yes: "true" or "1"."""
    return value.lower() in ("true", "1")


def parse_key_value_pair(s: str) -> tuple[str, int]:
    """Return what ``MatMul:0`` says."""
    key, value = s.split(":")
    return key, int(value)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line says; ``arguments`` in its place, if given."""
    parser = argparse.ArgumentParser(
        prog="python -m qwrap.ort.matmul_nbits_quantizer",
        description="Quantize constant weights to 2, 4 or 8 bits in blocks of each output.",
    )
    add = parser.add_argument
    add("--input_model", required=True, help="model to read")
    add("--output_model", required=True, help="file to make; it must not exist")
    add("--block_size", default=32, type=int, help="weights that share a scale (32)")
    add(
        "--quant_method",
        default="default",
        choices=["default", "hqq", "rtn", "k_quant", "gptq", "nvidia_awq"],
        help="how codes are chosen (default: rounding to nearest)",
    )
    add("--bits", default=4, type=int, help="2, 4 or 8 (4)")
    add(
        "--symmetric",
        default=True,
        const=True,
        nargs="?",
        type=ort_convert_str_to_bool,
        choices=[True, False],
        help="no zero points (True); hqq and k_quant have them always",
    )
    add("--accuracy_level", type=int, help="1 float32, 2 float16, 3 bfloat16, 4 int8 products")
    add("-v", "--verbose", action="store_true", help="say what becomes of each node")
    add("--nodes_to_exclude", nargs="+", default=[], help="nodes to leave")
    add("--nodes_to_include", nargs="+", help="the nodes to quantize")
    add("--quant_format", default="QOperator", choices=["QOperator", "QDQ"])
    add("--op_types_to_quantize", nargs="+", choices=["MatMul", "Gather"], help="MatMul")
    add("--quant_axes", type=parse_key_value_pair, nargs="+", help="MatMul:0 Gather:1")
    data = parser.add_argument_group("data", "for gptq and nvidia_awq")
    data.add_argument("--calibration_data", help="folder, file or function, as for qwrap quantize")
    data.add_argument("--calib_dataset_name", default="cnn", help="cnn or pile, for nvidia_awq")
    data.add_argument("--tokenizer_dir", help="tokenizer, for nvidia_awq")
    data.add_argument("--calibration_method", choices=["awq", "awq_clip"])
    data.add_argument("--cache_dir", default="./cache", help="where such data is kept")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Quantize a file as the command line says.

    Raises:
        FileExistsError: the output exists.
        QuantizationError: the settings do not fit each other or the model.
    """
    given = parse_args(arguments)
    logging.basicConfig(level=logging.INFO if given.verbose else logging.WARNING)
    if Path(given.output_model).exists():
        raise FileExistsError(f"file {given.output_model} already exists")
    if given.symmetric and given.quant_method in ("hqq", "k_quant"):
        logger.warning("%s has zero points always; symmetric=False", given.quant_method)
        given.symmetric = False
    quantizer = MatMulNBitsQuantizer(
        given.input_model,
        given.bits,
        given.block_size,
        given.symmetric,
        given.accuracy_level,
        given.nodes_to_exclude,
        given.nodes_to_include,
        algo_config=_config(given),
    )
    quantizer.process()
    quantizer.model.save_model_to_file(given.output_model, True)
    logger.info("%s", quantizer.report)


def _config(given: argparse.Namespace) -> WeightOnlyQuantConfig:
    types, method = given.op_types_to_quantize, given.quant_method
    if given.quant_format == "QDQ" and method not in ("default", "nvidia_awq"):
        raise QuantizationError(f"--quant_method {method} only supports QOperator format")
    if method == "hqq":
        return HQQWeightOnlyQuantConfig(
            given.block_size, given.bits, op_types_to_quantize=types, quant_axes=given.quant_axes
        )
    if method == "rtn":
        return RTNWeightOnlyQuantConfig(op_types_to_quantize=types)
    if method == "k_quant":
        return KQuantWeightOnlyQuantConfig(op_types_to_quantize=types)
    if method == "gptq":
        return GPTQWeightOnlyQuantConfig(_data(given), op_types_to_quantize=types)
    if method == "nvidia_awq":
        return NVAWQWeightOnlyQuantConfig(
            given.tokenizer_dir,
            given.calib_dataset_name,
            given.cache_dir,
            AWQ_METHODS[given.calibration_method],
        )
    return DefaultWeightOnlyQuantConfig(
        given.block_size,
        given.symmetric,
        given.accuracy_level,
        QuantFormat[given.quant_format],
        types,
        given.quant_axes,
        given.bits,
    )


def _data(given: argparse.Namespace) -> Any:
    if given.calibration_data is None:
        raise QuantizationError("--quant_method gptq needs --calibration_data")
    return open_data(given.calibration_data, graph_inputs(given.input_model))
