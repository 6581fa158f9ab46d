"""Where a quantized model loses accuracy: its tensors beside those of the float model.

    modify_model_output_intermediate_tensors(path_to_float_model, path_to_augmented_float_model)
    float_activations = collect_activations(path_to_augmented_float_model, data_reader)

The same for the quantized model; ``create_activation_matching`` and ``create_weight_matching``
then pair the tensors, and ``compute_activation_error`` and ``compute_weight_error`` compare them.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qwrap.graph import graphs
from qwrap.ort.borrowed import lender
from qwrap.ort.errors import ComparisonError, UnknownNameError
from qwrap.ort.files.dequantized import constants_of, dequantized_weights
from qwrap.ort.files.model_io import ModelSource, read_model
from qwrap.ort.files.proto_file import write_proto
from qwrap.ort.graphs.tensor_names import (
    DEQUANT_OUTPUT_SUFFIX,
    QUANT_INPUT_SUFFIX,
    TENSOR_NAME_QUANT_SUFFIX,
)

__all__ = [
    "collect_activations",
    "compute_activation_error",
    "compute_signal_to_quantization_noice_ratio",
    "compute_weight_error",
    "create_activation_matching",
    "create_weight_matching",
    "iterate_activations",
    "modify_model_output_intermediate_tensors",
]

__getattr__ = lender(__name__)

_LOGGER = logging.getLogger(__name__)
_SAVED = "_ReshapedSavedOutput"
_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
Array = NDArray[Any]
Arrays: TypeAlias = "Sequence[Array] | Array"
Activations: TypeAlias = "Mapping[str, Sequence[Array]]"
ErrorFunction = Callable[[Any, Any], float]


# --- activations ---------------------------------------------------------------------------------


def modify_model_output_intermediate_tensors(
    input_model_path: ModelSource,
    output_model_path: str | os.PathLike[str] | None,
    op_types_for_saving: Sequence[str] | None = None,
    save_as_external_data: bool = False,
) -> onnx.ModelProto | None:
    """Write a model that also gives out the tensors between its nodes, each of them flat.

    Args:
        input_model_path: path or model; neither is modified.
        output_model_path: file to make or replace; None to get the model itself.
        op_types_for_saving: only what such nodes read or make; None or [] for every float tensor.
        save_as_external_data: write weights to a file beside the output.

    Returns:
        The model where ``output_model_path`` is None, else None.

    Raises:
        UnknownNameError: the model has no node of such a type.
    """
    model = read_model(input_model_path)
    graph = model.graph
    names = _tensors_to_save(graph, op_types_for_saving or ())
    flat = _free_name("LinearReshape", graph)
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), flat))
    for name, kind in names.items():
        saved = name + _SAVED
        graph.node.append(helper.make_node("Reshape", [name, flat], [saved], saved))
        graph.output.append(helper.make_tensor_value_info(saved, kind, [-1]))
    if output_model_path is None:
        return model
    write_proto(model, output_model_path, external=save_as_external_data or None)
    return None


def _tensors_to_save(graph: onnx.GraphProto, op_types: Sequence[str]) -> dict[str, int]:
    """Return the float tensors that nodes of these types read or make, and their types."""
    known = {node.op_type for node in graph.node}
    for op_type in op_types:
        if op_type not in known:
            raise UnknownNameError("operator type to save", op_type, known)
    values = (*graph.value_info, *graph.output, *graph.input)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    constants = {tensor.name for tensor in graph.initializer}
    return {
        name: kinds[name]
        for node in graph.node
        if not op_types or node.op_type in op_types
        for name in (*node.input, *node.output)
        if kinds.get(name) in _FLOATS and name not in constants
    }


def _free_name(stem: str, graph: onnx.GraphProto) -> str:
    taken = {tensor.name for tensor in graph.initializer}
    taken |= {name for node in graph.node for name in node.output}
    taken |= {value.name for value in graph.input}
    name, count = stem, 0
    while name in taken:
        name, count = f"{stem}_{count}", count + 1
    return name


def iterate_activations(
    augmented_model: ModelSource | bytes,
    input_reader: Iterable[Mapping[str, Any]],
    session_options: Any = None,
    execution_providers: Sequence[str] | None = None,
) -> Iterator[dict[str, Array]]:
    """Yield the saved tensors of each batch, by name, so that only one batch is in memory.

    Args:
        augmented_model: what ``modify_model_output_intermediate_tensors`` made.
        input_reader: gives the inputs of a batch by name; a ``CalibrationDataReader``, or a list.
        session_options: of onnxruntime; without them it optimizes nothing.
        execution_providers: where the model runs; None for the CPU.
    """
    if session_options is None:
        session_options = onnxruntime.SessionOptions()
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session_options.graph_optimization_level = level
    if isinstance(augmented_model, onnx.ModelProto):
        augmented_model = augmented_model.SerializeToString()
    elif not isinstance(augmented_model, bytes):
        augmented_model = os.fspath(augmented_model)
    session = onnxruntime.InferenceSession(
        augmented_model,
        sess_options=session_options,
        providers=list(execution_providers or ["CPUExecutionProvider"]),
    )
    saved = [output.name for output in session.get_outputs() if output.name.endswith(_SAVED)]
    names = [name.removesuffix(_SAVED) for name in saved]
    # whatever has get_next() is a reader, whether or not it can be iterated
    get_next = getattr(input_reader, "get_next", None)
    for batch in input_reader if get_next is None else iter(get_next, None):
        values = session.run(saved, batch) if saved else []
        yield dict(zip(names, values, strict=True))


def collect_activations(
    augmented_model: ModelSource | bytes,
    input_reader: Iterable[Mapping[str, Any]],
    session_options: Any = None,
    execution_providers: Sequence[str] | None = None,
) -> dict[str, list[Array]]:
    """Return the saved tensors of all batches, by name; see ``iterate_activations``.

    Raises:
        ComparisonError: the reader gives no batch (a ``RuntimeError``).
    """
    found: dict[str, list[Array]] = {}
    batches = 0
    for tensors in iterate_activations(
        augmented_model, input_reader, session_options, execution_providers
    ):
        batches += 1
        for name, value in tensors.items():
            found.setdefault(name, []).append(value)
    if not batches:
        raise ComparisonError("No data is collected while running augmented model!")
    return found


def create_activation_matching(
    qdq_activations: Activations, float_activations: Activations | None = None
) -> dict[str, dict[str, Sequence[Array]]]:
    """Pair what goes into each Q/DQ pair with what comes out, and with the float model's tensor.

    Args:
        qdq_activations: what ``collect_activations`` found in the quantized model.
        float_activations: what it found in the float model.

    Returns:
        Tensor name to ``pre_qdq``, ``post_qdq`` and, where the float model has it, ``float``.
    """
    matching: dict[str, dict[str, Sequence[Array]]] = {}
    for name, values in qdq_activations.items():
        for suffix, is_before in (
            (QUANT_INPUT_SUFFIX, True),
            (DEQUANT_OUTPUT_SUFFIX, False),
            (f"{DEQUANT_OUTPUT_SUFFIX}_1", False),  # the first of dedicated pairs
        ):
            own = name.removesuffix(suffix)
            other = qdq_activations.get(own) if own != name else None
            if other is not None:
                pre, post = (values, other) if is_before else (other, values)
                matching[own] = {"pre_qdq": pre, "post_qdq": post}
    for name, match in matching.items():
        if float_activations and name in float_activations:
            match["float"] = float_activations[name]
    return matching


# --- weights -------------------------------------------------------------------------------------


def create_weight_matching(
    float_model_path: ModelSource, qdq_model_path: ModelSource
) -> dict[str, dict[str, Array]]:
    """Pair each weight of a float model with the real values of its quantized form.

    Args:
        float_model_path: path or model.
        qdq_model_path: path or model; per-tensor, per-channel and blocked weights of all types.

    Returns:
        Weight name to ``float`` and ``dequantized``. A weight that only one of the models has is
        left out, with a line in the log.
    """
    floats: dict[str, onnx.TensorProto] = {}
    for graph in graphs(read_model(float_model_path).graph):
        floats = {**constants_of(graph), **floats}
    matched = {}
    for quantized, values in dequantized_weights(read_model(qdq_model_path)):
        name = quantized.removesuffix(TENSOR_NAME_QUANT_SUFFIX)
        if name == quantized:
            _LOGGER.warning("dequantized tensor name '%s' not recognized", quantized)
        elif name not in floats:
            _LOGGER.warning("the float model has no weight '%s'", name)
        else:
            original = numpy_helper.to_array(floats[name])
            matched[name] = {"float": original, "dequantized": values}
    return matched


# --- errors --------------------------------------------------------------------------------------


def compute_signal_to_quantization_noice_ratio(x: Arrays, y: Arrays) -> float:
    """Return 20 log10(||x|| / ||x - y||) in decibels, over all tensors of two lists.

    Raises:
        ComparisonError: the lists differ in length, or two tensors in size (a ``RuntimeError``).
    """
    left, right = ([v] if isinstance(v, np.ndarray) else list(v) for v in (x, y))
    if len(left) != len(right):
        raise ComparisonError("Unequal number of tensors to compare!")
    signal = noise = 0.0
    for a, b in zip(left, right, strict=True):
        if np.size(a) != np.size(b):
            raise ComparisonError(f"tensors of shapes {np.shape(a)} and {np.shape(b)}")
        own = np.ravel(a).astype(np.float64)
        difference = own - np.ravel(b).astype(np.float64)
        signal += float(own @ own)
        noise += float(difference @ difference)
    least = float(np.finfo(np.float64).eps)
    return 20 * math.log10(max(math.sqrt(signal), least) / max(math.sqrt(noise), least))


def compute_weight_error(
    weights_match: Mapping[str, Mapping[str, Array]],
    err_func: ErrorFunction = compute_signal_to_quantization_noice_ratio,
) -> dict[str, float]:
    """Return the error of each weight that ``create_weight_matching`` paired."""
    return {
        name: err_func(match["float"], match["dequantized"])
        for name, match in weights_match.items()
    }


def compute_activation_error(
    activations_match: Mapping[str, Mapping[str, Sequence[Array]]],
    err_func: ErrorFunction = compute_signal_to_quantization_noice_ratio,
) -> dict[str, dict[str, float]]:
    """Return the errors of each activation that ``create_activation_matching`` paired.

    Returns:
        Tensor name to ``qdq_err``, that of its own Q/DQ pair, and, where the float model's tensor
        is known, ``xmodel_err``, that of everything up to there.
    """
    errors: dict[str, dict[str, float]] = {}
    for name, match in activations_match.items():
        errors[name] = {"qdq_err": err_func(match["pre_qdq"], match["post_qdq"])}
        original = match.get("float")
        if original is not None and len(original):
            errors[name]["xmodel_err"] = err_func(original, match["post_qdq"])
    return errors
