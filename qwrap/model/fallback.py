"""A node that onnxruntime computes, because no torch function does; gradients stop there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from qwrap.errors import InputError, UnsupportedOpError
from qwrap.graph.index import OnnxGraph, ValueType, bodies
from qwrap.model.tensors import to_array, to_value
from qwrap.ops.element_types import DATA_TYPES

DTYPES = {
    "tensor(float)": ir.DataType.FLOAT,
    "tensor(double)": ir.DataType.DOUBLE,
    "tensor(float16)": ir.DataType.FLOAT16,
    "tensor(int64)": ir.DataType.INT64,
    "tensor(int32)": ir.DataType.INT32,
    "tensor(uint8)": ir.DataType.UINT8,
    "tensor(int8)": ir.DataType.INT8,
    "tensor(bool)": ir.DataType.BOOL,
    "tensor(string)": ir.DataType.STRING,
}
"""Element types as onnxruntime names them."""


class RuntimeNode:
    """Computes one node in a session of its own.

    The session is made again after copying or unpickling. Results are new tensors without history,
    on the device of the inputs.
    """

    def __init__(self, graph: OnnxGraph, node: ir.Node, libraries: Sequence[str]) -> None:
        """Open a session on the node alone. Inputs of a type nobody knows are taken for float32.

        What onnxruntime says of the types of its outputs is added to ``graph.types``.

        Raises:
            UnsupportedOpError: onnxruntime has no kernel for it either, or the node has bodies.
        """
        self.key = graph.node_key(node)
        if any(True for _ in bodies(node)):
            raise UnsupportedOpError("it holds a graph")
        self._libraries = tuple(libraries)
        self._node = ir.to_proto(node)
        self._opsets = dict(graph.model.opset_imports)
        self._session: ort.InferenceSession | None = None
        types = [graph.type_of(v) for v in node.inputs if v is not None]
        self._dtypes = [kind.dtype or ir.DataType.FLOAT for kind in types]
        try:
            session = self._open()
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise UnsupportedOpError(str(error).splitlines()[0]) from error
        made = (v for v in node.outputs if v.name)
        for value, output in zip(made, session.get_outputs(), strict=True):
            if graph.type_of(value).dtype is None and output.type in DTYPES:
                graph.types[graph.key(value)] = ValueType(DTYPES[output.type])

    def _open(self) -> ort.InferenceSession:
        kinds = self._dtypes
        node = onnx.NodeProto.FromString(self._node.SerializeToString())
        given = iter(f"input_{i}" for i in range(len(kinds)))
        node.input[:] = [name and next(given) for name in node.input]
        outputs = [f"output_{i}" if name else "" for i, name in enumerate(node.output)]
        node.output[:] = outputs
        graph = onnx.helper.make_graph(
            [node],
            "node",
            [
                onnx.helper.make_tensor_value_info(f"input_{i}", int(dtype), None)
                for i, dtype in enumerate(kinds)
            ],
            [onnx.ValueInfoProto(name=name) for name in outputs if name],
        )
        opsets = [onnx.helper.make_opsetid(d, v) for d, v in self._opsets.items()]
        model = onnx.helper.make_model(graph, opset_imports=opsets)
        model.ir_version = min(model.ir_version, onnx.helper.find_min_ir_version_for(opsets, True))
        options = ort.SessionOptions()
        options.log_severity_level = 4
        for path in self._libraries:
            options.register_custom_ops_library(path)
        self._session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return self._session

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Return the outputs of the node, None for those it leaves out.

        Raises:
            InputError: onnxruntime cannot run the node on these inputs.
        """
        given = [value for value in inputs if value is not None]
        dtypes = [_dtype(value) for value in given]
        if dtypes != self._dtypes:
            self._dtypes, self._session = dtypes, None
        device = next((v.device for v in given if isinstance(v, Tensor)), torch.device("cpu"))
        feed = {f"input_{i}": to_array(value, ValueType()) for i, value in enumerate(given)}
        try:
            session = self._session or self._open()
            results = iter(session.run(None, feed))
        except Exception as error:
            raise InputError(f"node {self.key!r}, run by onnxruntime: {error}") from error
        return tuple(
            to_value(next(results), ValueType(), device) if name else None
            for name in self._node.output
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}


def _dtype(value: Any) -> ir.DataType:
    if isinstance(value, Tensor):
        return ir.DataType(DATA_TYPES[value.dtype])
    return ir.DataType.STRING
