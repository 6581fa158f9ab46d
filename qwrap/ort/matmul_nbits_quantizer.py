"""Constant weights in 2, 4 or 8 bits; ``python -m qwrap.ort.matmul_nbits_quantizer`` too."""

from collections.abc import Sequence

from onnx import GraphProto, TensorProto

from qwrap.nbits.one_node import find_initializer
from qwrap.ort.enums import QuantFormat
from qwrap.ort.weight_only.awq import NVAWQWeightOnlyQuantConfig, NVAWQWeightOnlyQuantizer
from qwrap.ort.weight_only.command import (
    main,
    ort_convert_str_to_bool,
    parse_args,
    parse_key_value_pair,
)
from qwrap.ort.weight_only.configs import (
    DefaultWeightOnlyQuantConfig,
    GPTQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    RTNWeightOnlyQuantConfig,
    WeightOnlyQuantConfig,
)
from qwrap.ort.weight_only.default import DefaultWeightOnlyQuantizer
from qwrap.ort.weight_only.hqq import HQQWeightOnlyQuantizer
from qwrap.ort.weight_only.matrices import is_divisible, transpose_packed_int4_matrix
from qwrap.ort.weight_only.quantizer import MatMulNBitsQuantizer, logger

__all__ = [
    "DefaultWeightOnlyQuantConfig",
    "DefaultWeightOnlyQuantizer",
    "GPTQWeightOnlyQuantConfig",
    "HQQWeightOnlyQuantConfig",
    "HQQWeightOnlyQuantizer",
    "KQuantWeightOnlyQuantConfig",
    "MatMulNBitsQuantizer",
    "NVAWQWeightOnlyQuantConfig",
    "NVAWQWeightOnlyQuantizer",
    "QuantFormat",
    "RTNWeightOnlyQuantConfig",
    "WeightOnlyQuantConfig",
    "get_initializer",
    "is_divisible",
    "logger",
    "ort_convert_str_to_bool",
    "parse_args",
    "parse_key_value_pair",
    "transpose_packed_int4_matrix",
]


def get_initializer(
    name: str, graph_path: Sequence[GraphProto]
) -> tuple[TensorProto | None, GraphProto | None]:
    """Return the initializer of that name, innermost first, and the graph that has it."""
    return find_initializer(name, graph_path)


if __name__ == "__main__":
    main()
