"""A model with the look-ups of Neural Compressor's wrapper."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from qwrap.ort import onnx_model
from qwrap.ort.errors import QuantizationError, UnknownNameError
from qwrap.ort.neural_compressor.util import MAXIMUM_PROTOBUF, find_by_name

__all__ = ["ONNXModel"]


class ONNXModel:
    """A model that is edited in place; what is not here is as in ``qwrap.ort.onnx_model``.

    Attributes:
        model_path: what it was read from, None for a message.
    """

    def __init__(self, model: onnx.ModelProto | str, **kwargs: Any) -> None:
        """Wrap a message, which the caller goes on owning, or read a file.

        Args:
            model: message or path.
            kwargs: ``load_external_data=False`` leaves weights in files.
        """
        self.model_path = None if isinstance(model, onnx.ModelProto) else os.fspath(model)
        if not isinstance(model, onnx.ModelProto):
            external = kwargs.get("load_external_data", True)
            model = onnx.load(model, load_external_data=external)
        self._inner = onnx_model.ONNXModel(model)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self._inner, name)

    @property
    def model(self) -> onnx.ModelProto:
        """The message."""
        return self._inner.model

    @model.setter
    def model(self, model: onnx.ModelProto) -> None:
        self._inner = onnx_model.ONNXModel(model)

    @property
    def is_large_model(self) -> bool:
        """Whether its weights are more than one message can hold."""
        tensors = self.model.graph.initializer
        size: int = sum(tensor.ByteSize() for tensor in tensors)
        return size > MAXIMUM_PROTOBUF

    @property
    def graph_info(self) -> dict[str, str]:
        """Operator of each node of the main graph by its name."""
        return {node.name: node.op_type for node in self.model.graph.node}

    @property
    def input_name_to_nodes(self) -> dict[str, list[NodeProto]]:
        """Nodes that read each value, once for each input."""
        return self._inner.input_name_to_nodes()

    @property
    def output_name_to_node(self) -> dict[str, NodeProto]:
        """Node that makes each value."""
        return self._inner.output_name_to_node()

    def framework(self) -> str:
        """Return what runs it."""
        return "onnxruntime"

    def update(self) -> None:
        """Do nothing: look-ups are never out of date."""

    def input(self) -> list[str]:
        """Return the names of the graph inputs."""
        return [value.name for value in self.model.graph.input]

    def output(self) -> list[str]:
        """Return the names of the graph outputs."""
        return [value.name for value in self.model.graph.output]

    def get_node(self, name: str) -> NodeProto | None:
        """Return the node of that name."""
        node: NodeProto | None = find_by_name(name, self.model.graph.node)
        return node

    def get_initializer_share_num(self, name: str) -> int:
        """Return how many nodes of the main graph read an initializer; 0 if there is none."""
        if self._inner.get_initializer(name) is None:
            return 0
        return sum(name in node.input for node in self.model.graph.node)

    def add_initializers(self, tensors: Iterable[TensorProto]) -> None:
        """Append initializers, in place, but those whose names there are."""
        for tensor in tensors:
            self._inner.add_initializer(tensor)

    def set_initializer(self, tensor: str, array: NDArray[Any], raw: bool = False) -> None:
        """Give an initializer other values of its type and shape, in place.

        Raises:
            UnknownNameError: there is none of that name (a ``ValueError``).
        """
        del raw
        old = self._inner.get_initializer(tensor)
        if old is None:
            raise UnknownNameError("initializer", tensor, self._inner.get_initializer_name_set())
        kind = numpy_helper.to_array(old).dtype
        new = np.asarray(array, kind).reshape(tuple(old.dims))
        self._inner.remove_initializer(old)
        self._inner.add_initializer(numpy_helper.from_array(new, tensor))

    def add_tensors_to_outputs(self, tensor_names: Iterable[str]) -> None:
        """Let values be outputs too, in place; of what type is left open."""
        known = set(self.output())
        new = [onnx.ValueInfoProto(name=name) for name in tensor_names if name not in known]
        self.model.graph.output.extend(new)

    def remove_tensors_from_outputs(self, tensor_names: Iterable[str]) -> None:
        """Let values be outputs no more, in place."""
        gone, outputs = set(tensor_names), self.model.graph.output
        for index in reversed(range(len(outputs))):
            if outputs[index].name in gone:
                del outputs[index]

    def save(self, root: str | os.PathLike[str]) -> None:
        """Write the model, with its weights beside it where they are too large.

        Raises:
            QuantizationError: the folder does not exist (a ``ValueError``).
        """
        if not Path(root).parent.is_dir():
            raise QuantizationError(f'"root" directory does not exists: {Path(root).parent}')
        self._inner.save_model_to_file(os.fspath(root), self.is_large_model)
