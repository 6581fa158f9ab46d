"""Both quantizers on one model with the same ranges, and what differs between their graphs."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime.quantization as incumbent
from onnx import GraphProto, ModelProto, helper, numpy_helper
from onnxruntime.quantization import registry as incumbent_registry
from onnxruntime.quantization.calibrate import TensorsData as IncumbentRanges
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer as IncumbentQuantizer
from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

from qwrap.ort.calibrate import TensorsData
from qwrap.ort.enums import CalibrationMethod, QuantType
from qwrap.ort.qdq_quantizer import QDQQuantizer

Batch = Mapping[str, np.ndarray]
Ranges = Mapping[str, tuple[Any, Any]]
DEFAULT_TYPES = sorted({*incumbent_registry.QLinearOpsRegistry, *incumbent_registry.QDQRegistry})


def observed(
    model: ModelProto, batches: Sequence[Batch], op_types: Sequence[str] | None = None
) -> Ranges:
    """Smallest and largest value of each tensor, by onnxruntime's own calibrator."""

    class Reader(incumbent.CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter([dict(batch) for batch in batches])

        def get_next(self) -> Any:
            return next(self._left, None)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "float.onnx")
        onnx.save(model, path)
        calibrator = incumbent.create_calibrator(
            path, op_types, augmented_model_path=str(Path(folder, "augmented.onnx"))
        )
        calibrator.collect_data(Reader())
        found = calibrator.compute_data()
        del calibrator
    return {name: data.range_value for name, data in found.items()}


def by_incumbent(model: ModelProto, ranges: Ranges, **settings: Any) -> ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "float.onnx")
        onnx.save(model, path)
        inferred = load_model_with_shape_infer(path)
    method = incumbent.CalibrationMethod.MinMax
    quantizer = IncumbentQuantizer(
        inferred,
        tensors_range=IncumbentRanges(method, dict(ranges)),
        **_settings(settings, incumbent.QuantType),
    )
    logging.disable(logging.WARNING)
    try:
        made = quantizer.quantize_model()
        quantizer.model.topological_sort()
    finally:
        logging.disable(logging.NOTSET)
    return made


def by_qwrap(model: ModelProto, ranges: Ranges, **settings: Any) -> ModelProto:
    return quantizer_of(model, ranges, **settings).quantize_model()


def quantizer_of(model: ModelProto, ranges: Ranges | None, **settings: Any) -> QDQQuantizer:
    data = None if ranges is None else TensorsData(CalibrationMethod.MinMax, dict(ranges))
    return QDQQuantizer(model, tensors_range=data, **_settings(settings, QuantType))


def _settings(given: Mapping[str, Any], types: Any) -> dict[str, Any]:
    """Arguments of a quantizer; ``activation`` and ``weight`` are names of types."""
    settings = {
        "per_channel": False,
        "reduce_range": False,
        "nodes_to_quantize": [],
        "nodes_to_exclude": [],
        "op_types_to_quantize": DEFAULT_TYPES,
        **given,
    }
    settings["weight_qType"] = types[settings.pop("weight", "QInt8")]
    settings["activation_qType"] = types[settings.pop("activation", "QUInt8")]
    options = dict(settings.pop("options", {}))
    if "TensorQuantOverrides" in options:
        options["TensorQuantOverrides"] = _typed(options["TensorQuantOverrides"], types)
    return {**settings, "extra_options": options}


def _typed(value: Any, types: Any) -> Any:
    """Replace names of types by members of ``types``."""
    if isinstance(value, dict):
        return {k: types[v] if k == "quant_type" else _typed(v, types) for k, v in value.items()}
    return [_typed(element, types) for element in value] if isinstance(value, list) else value


def differences(expected: ModelProto, got: ModelProto) -> list[str]:
    """What differs between two graphs; the order of nodes and initializers does not count."""
    found = list(_differences(expected.graph, got.graph))
    imports = [{o.domain: o.version for o in model.opset_import} for model in (expected, got)]
    if imports[0] != imports[1]:
        found.append(f"opsets {imports}")
    return found


def _differences(expected: GraphProto, got: GraphProto) -> Iterator[str]:
    nodes = [{(n.name, *n.output): _node(n) for n in g.node} for g in (expected, got)]
    yield from _unequal("node", *nodes)
    values = [{t.name: _tensor(t) for t in g.initializer} for g in (expected, got)]
    yield from _unequal("initializer", *values)
    ends = [([v.name for v in g.input], [v.name for v in g.output]) for g in (expected, got)]
    if ends[0] != ends[1]:
        yield f"inputs and outputs {ends}"


def _node(node: onnx.NodeProto) -> tuple[Any, ...]:
    attributes = {
        a.name: str(a)
        if a.type in {onnx.AttributeProto.GRAPH, onnx.AttributeProto.TENSOR}
        else helper.get_attribute_value(a)
        for a in node.attribute
    }
    return node.op_type, node.domain, list(node.input), attributes


def _tensor(tensor: onnx.TensorProto) -> tuple[Any, ...]:
    array = numpy_helper.to_array(tensor)
    return tensor.data_type, list(tensor.dims), array.tobytes()


def _unequal(what: str, expected: Mapping[Any, Any], got: Mapping[Any, Any]) -> Iterator[str]:
    for key in expected.keys() - got.keys():
        yield f"missing {what} {key}"
    for key in got.keys() - expected.keys():
        yield f"additional {what} {key}"
    for key in expected.keys() & got.keys():
        if expected[key] != got[key]:
            yield f"{what} {key}: {str(expected[key])[:300]} became {str(got[key])[:300]}"
