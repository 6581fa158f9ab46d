"""Shapes with symbols in them, by onnxruntime's own inference where sympy is installed."""

from __future__ import annotations

import logging
from typing import Any

import onnx
from onnx import helper

from qwrap.ort.files.model_io import STEERS_SHAPES
from qwrap.ort.files.proto_file import is_external, weightless, with_weights

_LOGGER = logging.getLogger(__name__)
_FIRST_OPSET = 7


def declare_symbolic(
    model: onnx.ModelProto,
    *,
    int_max: int = 2**31 - 1,
    auto_merge: bool = False,
    guess_output_rank: bool = False,
    verbose: int = 0,
) -> bool:
    """Declare shapes of values of the main graph, in place, as far as symbols can express them.

    What cannot be inferred stays as it was; no model is refused. No file is written anywhere.

    Args:
        model: to infer.
        int_max: from here on an integer counts as unbounded, for operators such as Slice.
        auto_merge: take two symbols for one where they contradict each other.
        guess_output_rank: give an unknown operator the rank of its first input.
        verbose: how much the inference logs.

    Returns:
        Whether every shape was found.
    """
    try:
        from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference
    except ImportError as error:
        _LOGGER.info(
            "no symbolic shape inference (%s); install sympy, or pass skip_symbolic_shape=True "
            "to be spared this line",
            error,
        )
        return False
    light = _weights_as_inputs(model)
    inference: Any = SymbolicShapeInference(int_max, auto_merge, guess_output_rank, verbose)
    try:
        complete = _run(inference, light)
    except Exception as error:  # it raises anything over what it does not know
        _LOGGER.info("symbolic shape inference stopped: %s", error)
        complete = False
    _take_over(inference.out_mp_ if hasattr(inference, "out_mp_") else light, model)
    return complete


def _weights_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of ``model`` whose large weights are inputs, for the inference reads data."""
    light, weights = weightless(model, STEERS_SHAPES)
    tensors = light.graph.initializer
    listed = {value.name for value in light.graph.input}
    for position in range(len(tensors) - 1, -1, -1):
        tensor = tensors[position]
        if is_external(tensor):
            info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            light.graph.input.extend([info] if tensor.name not in listed else [])
            del tensors[position]
    with_weights(light, weights)
    return light


def _run(inference: Any, model: onnx.ModelProto) -> bool:
    """Do what its ``infer_shapes`` does, without the file that writes where shapes are missing."""
    opset = next((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), 0)
    if opset < _FIRST_OPSET:
        return False
    complete = False
    inference._preprocess(model)
    while inference.run_:
        complete = bool(inference._infer_impl())
    inference._update_output_from_vi()
    return complete


def _take_over(inferred: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Declare in ``model``, in place, what ``inferred`` declares of the main graph."""
    made = {name for node in model.graph.node for name in node.output}
    made -= {value.name for value in model.graph.output}
    known = {value.name: value for value in model.graph.value_info}
    for value in inferred.graph.value_info:
        if value.name in made and value.type.tensor_type.elem_type:
            known[value.name] = value
    values = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in known.values()]
    del model.graph.value_info[:]
    model.graph.value_info.extend(values)
    outputs = {value.name: value for value in inferred.graph.output}
    for output in model.graph.output:
        found = outputs.get(output.name)
        if found is not None and found.type.tensor_type.elem_type:
            output.type.CopyFrom(found.type)
