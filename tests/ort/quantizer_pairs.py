"""onnxruntime's quantizer to operators on codes and this one, on one model with the same ranges.

Both build ``ONNXQuantizer`` by hand, so that neither calibration nor
reading of files plays a part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime.quantization.calibrate as incumbent_calibrate
import onnxruntime.quantization.onnx_quantizer as incumbent_quantizer
import onnxruntime.quantization.quant_utils as incumbent_utils
import onnxruntime.quantization.registry as incumbent_registry
from one_operator import Batch, open_session, run, sqnr
from onnx import ModelProto, helper, numpy_helper

from qwrap.ort import registry
from qwrap.ort.calibrate import TensorData
from qwrap.ort.enums import QuantizationMode, QuantType
from qwrap.ort.onnx_quantizer import ONNXQuantizer

Ranges = Mapping[str, tuple[np.ndarray, np.ndarray]]


def observe(model: ModelProto, batches: Sequence[Batch]) -> Ranges:
    """Smallest and largest value of each float tensor of the main graph, by onnxruntime."""
    shown = onnx.shape_inference.infer_shapes(model)
    values = [*shown.graph.value_info, *shown.graph.input, *shown.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    outputs = {value.name for value in shown.graph.output}
    made = [n for node in model.graph.node for n in node.output if types.get(n) in (1, 10)]
    shown.graph.output.extend(
        helper.make_tensor_value_info(name, types[name], None)
        for name in made
        if name not in outputs
    )
    session = open_session(shown, optimised=False)
    names = [output.name for output in session.get_outputs()]
    seen: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        for name, value in {
            **dict(zip(names, session.run(None, dict(batch)), strict=True)),
            **batch,
        }.items():
            if np.asarray(value).dtype.kind == "f":
                seen.setdefault(name, []).append(np.asarray(value, np.float32))
    return {
        name: (np.array(min(v.min() for v in values)), np.array(max(v.max() for v in values)))
        for name, values in seen.items()
    }


def quantize_own(
    model: ModelProto,
    ranges: Ranges | None,
    weight: str = "QInt8",
    activation: str = "QUInt8",
    per_channel: bool = False,
    reduce_range: bool = False,
    options: Mapping[str, Any] | None = None,
    op_types: Sequence[str] = (),
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
) -> ONNXQuantizer:
    """This package's quantizer, after ``quantize_model()``; without ranges it is dynamic."""
    static = ranges is not None
    known = registry.QLinearOpsRegistry if static else registry.IntegerOpsRegistry
    quantizer = ONNXQuantizer(
        model,
        per_channel,
        reduce_range,
        QuantizationMode.QLinearOps if static else QuantizationMode.IntegerOps,
        static,
        QuantType[weight],
        QuantType[activation],
        None
        if ranges is None
        else {n: TensorData(lowest=low, highest=high) for n, (low, high) in ranges.items()},
        list(include),
        list(exclude),
        list(op_types or known),
        _options(options, static, QuantType),
    )
    quantizer.quantize_model()
    return quantizer


def quantize_incumbent(
    model: ModelProto,
    ranges: Ranges | None,
    folder: Path,
    weight: str = "QInt8",
    activation: str = "QUInt8",
    per_channel: bool = False,
    reduce_range: bool = False,
    options: Mapping[str, Any] | None = None,
    op_types: Sequence[str] = (),
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
) -> ModelProto:
    """What onnxruntime's quantizer makes of the model, nodes sorted."""
    static = ranges is not None
    modes = incumbent_utils.QuantizationMode
    registries = incumbent_registry
    known = registries.QLinearOpsRegistry if static else registries.IntegerOpsRegistry
    path = folder / "float.onnx"
    onnx.save(model, path)
    data = incumbent_calibrate.TensorData
    quantizer = incumbent_quantizer.ONNXQuantizer(
        incumbent_utils.load_model_with_shape_infer(path),
        per_channel,
        reduce_range,
        modes.QLinearOps if static else modes.IntegerOps,
        static,
        incumbent_utils.QuantType[weight],
        incumbent_utils.QuantType[activation],
        None
        if ranges is None
        else {n: data(lowest=low, highest=high) for n, (low, high) in ranges.items()},
        list(include),
        list(exclude),
        list(op_types or known),
        _options(options, static, incumbent_utils.QuantType),
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    made: ModelProto = quantizer.model.model
    return made


def _options(options: Mapping[str, Any] | None, static: bool, types: Any) -> dict[str, Any]:
    """The options, with types of overrides by name, and what quantize_dynamic adds."""
    made = dict({} if static else {"MatMulConstBOnly": True}, **(options or {}))
    overrides = made.get("TensorQuantOverrides", {})
    made["TensorQuantOverrides"] = {
        name: [{k: types[v] if k == "quant_type" else v for k, v in e.items()} for e in entries]
        for name, entries in overrides.items()
    }
    return made


def form(model: ModelProto) -> tuple[list[Any], dict[str, Any], list[Any]]:
    """Nodes in any order, initializers to the bit, and opset imports."""
    nodes = sorted(
        (
            node.domain,
            node.op_type,
            node.name,
            tuple(node.input),
            tuple(node.output),
            tuple(sorted((a.name, str(helper.get_attribute_value(a))) for a in node.attribute)),
        )
        for node in model.graph.node
    )
    tensors = {
        tensor.name: (tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes())
        for tensor in model.graph.initializer
    }
    return nodes, tensors, sorted((opset.domain, opset.version) for opset in model.opset_import)


def quality(wanted: ModelProto, got: ModelProto, batches: Sequence[Batch]) -> float:
    """SQNR of the second model's outputs, in dB, as onnxruntime runs both."""
    pairs = [(run(wanted, batch), run(got, batch)) for batch in batches]
    return sqnr([v for w, _ in pairs for v in w], [v for _, g in pairs for v in g])


def op_types(model: ModelProto) -> list[str]:
    """Operator types in graph order."""
    return [node.op_type for node in model.graph.node]
