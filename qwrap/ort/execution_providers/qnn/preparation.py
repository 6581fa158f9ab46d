"""Models as Qualcomm's provider takes them."""

from __future__ import annotations

import logging
import os

import onnx

from qwrap.ort.execution_providers.qnn.channel_last import update_io_to_channel_last
from qwrap.ort.execution_providers.qnn.fixed_shapes import fix_input_shapes
from qwrap.ort.execution_providers.qnn.fusion_lpnorm import FusionLpNormalization
from qwrap.ort.execution_providers.qnn.fusion_spacetodepth import FusionSpaceToDepth
from qwrap.ort.files.metadata import get_opset_version
from qwrap.ort.files.model_io import ModelSource, declare_types, load_message
from qwrap.ort.files.optimization import optimized_if_possible
from qwrap.ort.files.proto_file import write_proto
from qwrap.ort.fusions import FusionGelu, FusionLayerNormalization
from qwrap.ort.onnx_model import ONNXModel

_LOGGER = logging.getLogger(__name__)
_LAYER_NORM_OPSET = 17
_OPTIONAL_INPUTS = 4  # the IR version since which an initializer need not be a graph input
_INFERRED_BY = ("onnx.infer", "onnxruntime.tools.qnn.preprocess")


def qnn_preprocess_model(
    model_input: ModelSource,
    model_output: str | os.PathLike[str],
    exclude_initializer_from_input: bool = False,
    fuse_layernorm: bool = False,
    save_as_external_data: bool = False,
    all_tensors_to_one_file: bool = False,
    external_data_location: str | None = None,
    external_data_size_threshold: int = 1024,
    external_data_convert_attribute: bool = False,
    inputs_to_make_channel_last: list[str] | None = None,
    outputs_to_make_channel_last: list[str] | None = None,
    dynamic_input_shapes: list[tuple[str, str]] | None = None,
) -> bool:
    """Write a model with the operators, layouts and names that the provider works best with.

    Erf becomes Gelu, a division by the norm LpNormalization, YOLO's first nodes SpaceToDepth;
    nameless nodes get names.

    Args:
        model_input: path or model; neither is modified.
        model_output: file to make or replace, if there is anything to do.
        exclude_initializer_from_input: take initializers out of the graph inputs.
        fuse_layernorm: fuse LayerNormalization too, from opset 17 on.
        save_as_external_data: write weights to files beside the output.
        all_tensors_to_one_file: all to one file instead of one for each tensor.
        external_data_location: name of that file; ``<output name>.data``.
        external_data_size_threshold: bytes from which on a tensor is written there.
        external_data_convert_attribute: whether tensors in attributes are too.
        inputs_to_make_channel_last: graph inputs to change from [N, C, ...] to [N, ..., C].
        outputs_to_make_channel_last: the same for graph outputs.
        dynamic_input_shapes: names of inputs and their fixed shapes, ``("x", "1,3,224,224")``.

    Returns:
        Whether anything was done; if not, no file is written.

    Raises:
        QuantizationError: an input or output does not exist or cannot have the shape.
        MissingFileError: the model is not there.
    """
    model, modified = _optimized(model_input)
    onnx_model = ONNXModel(model)
    if dynamic_input_shapes:
        fix_input_shapes(model, dynamic_input_shapes)
        modified = True
    if exclude_initializer_from_input:
        modified |= _exclude_initializers(model)
    modified |= _fuse(onnx_model, fuse_layernorm)
    if inputs_to_make_channel_last or outputs_to_make_channel_last:
        prefix = "Transpose_channel_"
        number = onnx_model.get_largest_node_name_suffix(prefix) + 1
        update_io_to_channel_last(
            model, inputs_to_make_channel_last, outputs_to_make_channel_last, prefix, number
        )
        modified = True
    modified |= _name_nodes(onnx_model)
    if not modified:
        return False
    onnx_model.topological_sort()
    write_proto(
        model,
        model_output,
        external=save_as_external_data or None,
        location=external_data_location,
        threshold=external_data_size_threshold,
        one_file=all_tensors_to_one_file or not save_as_external_data,
        attributes=external_data_convert_attribute,
    )
    return True


def _optimized(source: ModelSource) -> tuple[onnx.ModelProto, bool]:
    """Return a model after onnxruntime's optimizations, and whether a pattern was fused before.

    Those would take apart the nodes that become SpaceToDepth.
    """
    model = load_message(source)
    declare_types(model)
    onnx_model = ONNXModel(model)
    fused = FusionSpaceToDepth(onnx_model).apply()
    if fused:
        onnx_model.topological_sort()
    return save_and_reload_optimize_model(model, shape_infer=False), fused


def save_and_reload_optimize_model(model: onnx.ModelProto, shape_infer: bool) -> onnx.ModelProto:
    """Return ``model``, which stays as it is, after onnxruntime's optimizations; nothing is saved.

    Args:
        model: of any size. Where onnxruntime cannot run it, it is not optimized.
        shape_infer: declare the types of its values first.
    """
    own = load_message(model)
    if shape_infer:
        declare_types(own)
    own = optimized_if_possible(own)
    key, value = _INFERRED_BY
    if key not in {entry.key for entry in own.metadata_props}:
        own.metadata_props.add(key=key, value=value)
    return own


def _exclude_initializers(model: onnx.ModelProto) -> bool:
    """Take initializers out of the graph inputs, in place; return whether there were any."""
    if model.ir_version < _OPTIONAL_INPUTS:
        _LOGGER.warning(
            "IR version %d wants initializers among the graph inputs, where they stay",
            model.ir_version,
        )
        return False
    constants = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in constants]
    if len(kept) == len(model.graph.input):
        return False
    for position in range(len(model.graph.input) - 1, -1, -1):
        if model.graph.input[position].name in constants:
            del model.graph.input[position]
    return True


def _fuse(model: ONNXModel, layer_norm: bool) -> bool:
    """Apply the fusions, in place; return whether a pattern was found."""
    fusions = [FusionGelu(model), FusionLpNormalization(model), FusionSpaceToDepth(model)]
    found = [fusion.apply() for fusion in fusions]
    version = get_opset_version(model.model)
    if layer_norm and version < _LAYER_NORM_OPSET:
        _LOGGER.warning(
            "Unable to fuse ReduceMean sequence into a LayerNormalization node. ONNX model must "
            "use an opset >= %d in order to use LayerNormalization, but found version %d. Raise "
            "it first, for example with qwrap.ort.files.opset.raise_opset().",
            _LAYER_NORM_OPSET,
            version,
        )
    elif layer_norm:
        found.append(FusionLayerNormalization(model).apply())
    return any(found)


def _name_nodes(model: ONNXModel) -> bool:
    """Name nameless nodes but constants, in place; return whether there were any."""
    prefix = "qnn_preproc_node_"
    nameless = [n for n in model.nodes() if n.op_type != "Constant" and not n.name]
    first = model.get_largest_node_name_suffix(prefix) + 1
    for number, node in enumerate(nameless, first):
        node.name = f"{prefix}{number}"
        _LOGGER.info(
            "Node of type %s does not have a name. Renamed to %s.", node.op_type, node.name
        )
    return bool(nameless)
