"""``python -m qwrap.ort.static_quantize_runner``: static quantization from the command line.

Calibration data lies beside the model, as in the model zoo: folders ``test_data_set_<number>``
with a file ``input_<number>.pb`` for each input.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import numpy_helper

from qwrap.ort.calibrate import CalibrationDataReader, CalibrationMethod
from qwrap.ort.entry.configs import StaticQuantConfig
from qwrap.ort.enums import QuantFormat, QuantType
from qwrap.ort.errors import MissingFileError, QuantizationError
from qwrap.ort.quantize import quantize

__all__ = [
    "OnnxModelCalibrationDataReader",
    "get_tensor_quant_overrides",
    "main",
    "make_config",
    "make_parser",
    "parse_arguments",
]

_TYPES = {kind.name.lower(): kind for kind in QuantType}
_METHODS = {method.name.lower(): method for method in CalibrationMethod}
_FORMATS = {form.name.lower(): form for form in QuantFormat}
_DATA_SET = "test_data_set_"
_INTEGERS = {
    QuantType.QInt8: np.int8,
    QuantType.QUInt8: np.uint8,
    QuantType.QInt16: np.int16,
    QuantType.QUInt16: np.uint16,
}


class OnnxModelCalibrationDataReader(CalibrationDataReader):
    """Reads the data sets beside a model, one after the other, each when it is asked for.

    Args:
        model_path: the model; its inputs are numbered in their order.

    Raises:
        MissingFileError: the model, or any data set beside it, is not there.
    """

    def __init__(self, model_path: str | os.PathLike[str]) -> None:
        path = Path(model_path)
        if not path.is_file():
            raise MissingFileError(f"{path}: no such file; expected an ONNX model")
        graph = onnx.load(path, load_external_data=False).graph
        constants = {tensor.name for tensor in graph.initializer}
        self._names = [value.name for value in graph.input if value.name not in constants]
        folders = (p for p in path.parent.glob(f"{_DATA_SET}*") if p.is_dir())
        self._folders = sorted(folders, key=lambda p: (len(p.name), p.name))
        if not self._folders:
            raise MissingFileError(
                f"no calibration data: there is no folder {_DATA_SET}0 beside {path}"
            )
        self._positions = iter(range(len(self._folders)))

    def get_next(self) -> dict[str, Any] | None:
        """Return the inputs of the next data set, None after the last.

        Raises:
            MissingFileError: an input is not there.
            QuantizationError: a file holds no tensor.
        """
        position = next(self._positions, None)
        if position is None:
            return None
        folder = self._folders[position]
        return {
            name: self.read_onnx_pb_data(folder / f"input_{index}.pb")
            for index, name in enumerate(self._names)
        }

    def __len__(self) -> int:
        """Return the number of data sets."""
        return len(self._folders)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Let the next batches be those from ``start_index`` up to, not with, ``end_index``."""
        self._positions = iter(range(len(self._folders))[start_index:end_index])

    def read_onnx_pb_data(self, file_pb: str | os.PathLike[str]) -> NDArray[Any]:
        """Return the tensor that a file holds.

        Raises:
            MissingFileError: it is not there.
            QuantizationError: it holds no tensor.
        """
        path = Path(file_pb)
        if not path.is_file():
            raise MissingFileError(f"{path}: no such file; a data set has one for each input")
        try:
            return numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))
        except (DecodeError, TypeError, ValueError) as error:
            raise QuantizationError(f"{path}: holds no tensor ({error})") from error


def get_tensor_quant_overrides(file: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return the overrides of single tensors that a JSON file holds; {} without a file.

    Types stand there by name, as in ``{"t": [{"quant_type": "QUInt16", "convert":
    {"quant_type": "QUInt8", "recv_nodes": ["node"]}}]}``.

    Raises:
        MissingFileError: it is not there.
        QuantizationError: it holds something else.
    """
    if not file:
        return {}
    path = Path(file)
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; expected overrides in JSON")
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise QuantizationError(f"{path}: is no JSON: {error}") from error
    if not isinstance(read, dict) or not all(isinstance(v, list) for v in read.values()):
        raise QuantizationError(f"{path}: expected a list of settings for each tensor name")
    return {name: [_override(path, name, e) for e in entries] for name, entries in read.items()}


def _override(path: Path, tensor: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise QuantizationError(f"{path}: tensor '{tensor}': {entry!r} are no settings")
    made = dict(entry)
    kind = made.get("quant_type")
    if kind is not None:
        if str(kind).lower() not in _TYPES:
            raise QuantizationError(
                f"{path}: tensor '{tensor}': no type is called '{kind}', only "
                f"{', '.join(map(str, QuantType))}"
            )
        made["quant_type"] = _TYPES[str(kind).lower()]
    if "scale" in made:
        made["scale"] = np.array(made["scale"], np.float32)
    if "zero_point" in made:
        integers = [dtype for named, dtype in _INTEGERS.items() if named is made.get("quant_type")]
        made["zero_point"] = np.array(made["zero_point"], *integers)
    if "recv_nodes" in made:
        made["recv_nodes"] = set(made["recv_nodes"])
    if "convert" in made:
        made["convert"] = _override(path, tensor, made["convert"])
    return made


# --- the command ---------------------------------------------------------------------------------

_FLAGS = {
    "enable_subgraph": ("EnableSubgraph", "quantize the bodies of If, Loop and Scan"),
    "force_quantize_no_input_check": (
        "ForceQuantizeNoInputCheck",
        "quantize operators that only move values even where their input is not quantized",
    ),
    "matmul_const_b_only": ("MatMulConstBOnly", "only MatMul with constant B"),
    "add_qdq_pair_to_weight": ("AddQDQPairToWeight", "keep float weights and give them a pair"),
    "dedicated_qdq_pair": ("DedicatedQDQPair", "one pair for each node that reads a tensor"),
    "calib_tensor_range_symmetric": ("CalibTensorRangeSymmetric", "ranges around zero"),
    "calib_moving_average": ("CalibMovingAverage", "minmax: a moving average of the extremes"),
    "use_qdq_contrib_ops": ("UseQDQContribOps", "pairs in domain com.microsoft"),
    "qdq_keep_removable_activations": (
        "QDQKeepRemovableActivations",
        "keep Relu and Clip, which a range could replace",
    ),
    "qdq_disable_weight_adjust_for_int32_bias": (
        "QDQDisableWeightAdjustForInt32Bias",
        "leave the scales of weights alone where a bias does not fit",
    ),
}
"""Flags of the command: the option that each sets, and what it does."""
_NODES = ("nodes_to_quantize", "nodes_to_exclude")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        "python -m qwrap.ort.static_quantize_runner", description="Quantize a model statically."
    )
    parser.add_argument("-i", "--input_model_path", required=True, help="model to read")
    parser.add_argument("-o", "--output_quantized_model_path", required=True, help="to write")
    for role, default in (("activation", "quint8"), ("weight", "qint8")):
        parser.add_argument(
            f"--{role}_type", choices=list(_TYPES), default=default, help=f"type of {role}s"
        )
    parser.add_argument("--calibration_method", choices=list(_METHODS), default="minmax")
    parser.add_argument("--quant_format", choices=list(_FORMATS), default="qdq")
    for name, (_, text) in _FLAGS.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("--disable_quantize_bias", action="store_true", help="biases stay float")
    parser.add_argument("--per_channel", action="store_true", help="a scale for each channel")
    parser.add_argument(
        "--minimum_real_range", type=float, default=0.0001, help="smallest range of a tensor"
    )
    for name in ("op_types_to_exclude_output_quantization", *_NODES):
        names: list[str] | None = None if name in _NODES else []
        parser.add_argument(f"--{name}", nargs="+", default=names, metavar="NAME")
    parser.add_argument(
        "--op_per_channel_axis",
        nargs=2,
        action="append",
        default=[],
        metavar=("OP_TYPE", "AXIS"),
        help="axis of channels of an operator type, with --per_channel; may be repeated",
    )
    parser.add_argument("--tensor_quant_overrides", help="JSON file with settings of tensors")
    return parser


def parse_arguments() -> argparse.Namespace:
    """Return what the command was given."""
    return make_parser().parse_args()


def make_config(given: argparse.Namespace, reader: CalibrationDataReader) -> StaticQuantConfig:
    """Return what the command's arguments say.

    Raises:
        QuantizationError: an axis is no number, or the overrides make no sense.
        MissingFileError: the file with overrides is not there.
    """
    try:
        axes = {op_type: int(axis) for op_type, axis in given.op_per_channel_axis}
    except ValueError as error:
        raise QuantizationError(f"--op_per_channel_axis: the axis is no number: {error}") from None
    options = {key: getattr(given, name) for name, (key, _) in _FLAGS.items()}
    options |= {
        "OpTypesToExcludeOutputQuantization": given.op_types_to_exclude_output_quantization,
        "QDQOpTypePerChannelSupportToAxis": axes,
        "QuantizeBias": not given.disable_quantize_bias,
        "MinimumRealRange": given.minimum_real_range,
        "TensorQuantOverrides": get_tensor_quant_overrides(given.tensor_quant_overrides),
    }
    return StaticQuantConfig(
        reader,
        calibrate_method=_METHODS[given.calibration_method],
        quant_format=_FORMATS[given.quant_format],
        activation_type=_TYPES[given.activation_type],
        weight_type=_TYPES[given.weight_type],
        nodes_to_quantize=given.nodes_to_quantize,
        nodes_to_exclude=given.nodes_to_exclude,
        per_channel=given.per_channel,
        extra_options=options,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        SystemExit: an argument makes no sense, or a file is missing.
    """
    parser = make_parser()
    given = parser.parse_args(arguments)
    try:
        reader = OnnxModelCalibrationDataReader(given.input_model_path)
        config = make_config(given, reader)
    except (QuantizationError, MissingFileError) as error:
        parser.error(str(error))
    quantize(given.input_model_path, given.output_quantized_model_path, config)


if __name__ == "__main__":
    main()
