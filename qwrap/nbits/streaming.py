"""Models larger than memory: weights are read one at a time, and what is made goes to a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir

from qwrap.graph.external import FileTensor
from qwrap.graph.index import walk_nodes
from qwrap.graph.save import INSIDE, PAGE, check_target, replace_file
from qwrap.nbits.draft import Array, Store, in_memory

ALIGNED = 16  # bytes: what smaller tensors begin at


class DataWriter:
    """Appends tensors to a file of external data; a ``Store``."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("wb")

    def __enter__(self) -> DataWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def __call__(self, name: str, array: Array) -> ir.TensorProtocol:
        """Append an array and return the tensor that refers to it."""
        return self.append(ir.tensor(np.ascontiguousarray(array), name=name))

    def has(self, tensor: ir.TensorProtocol) -> bool:
        """Whether a tensor refers to this file."""
        return isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) == self._path

    def append(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """Append a tensor, block by block where it lies in a file; keep a small one in memory."""
        if tensor.nbytes <= INSIDE or tensor.dtype == ir.DataType.STRING:
            in_file = isinstance(tensor, ir.ExternalTensor)
            return in_memory(tensor.name or "", tensor.numpy()) if in_file else tensor
        step = PAGE if tensor.nbytes >= PAGE else ALIGNED
        start = self._file.seek(-self._file.tell() % step, 1)
        if isinstance(tensor, FileTensor):
            tensor.tofile(self._file)  # block by block
        else:
            self._file.write(tensor.tobytes())
        return ir.ExternalTensor(
            self._path.name,
            start,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            base_dir=self._path.parent,
        )


def stream_model(target: Path, model: ir.Model, edit: Callable[[Store], None]) -> None:
    """Edit a model and write it with its data beside it, all of it or nothing.

    Args:
        target: the file to make or replace; its data goes to ``<name>.data``.
        model: changed in place.
        edit: changes it, and makes its new initialisers with the store that it is given.

    Raises:
        ExportError: the folder does not exist or cannot be written, or the disk is full.
    """
    check_target(target)

    def write(draft: Path) -> None:
        with DataWriter(draft.parent / f"{target.name}.data") as data:
            edit(data)
            move(model, lambda tensor: tensor if data.has(tensor) else data.append(tensor))
        draft.write_bytes(ir.to_proto(model).SerializeToString())

    replace_file(target, write)


def take_in(model: ir.Model) -> None:
    """Read what lies in files, in place, so that the model stands alone."""

    def read(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        in_file = isinstance(tensor, ir.ExternalTensor)
        return in_memory(tensor.name or "", tensor.numpy()) if in_file else tensor

    move(model, read)


def move(model: ir.Model, moved: Callable[[ir.TensorProtocol], ir.TensorProtocol]) -> None:
    """Replace initialisers, and what of files is in attributes, in place."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = moved(value.const_value)
    for owner in (model.graph, *(f.graph for f in model.functions.values())):
        for node in walk_nodes(owner):
            for name, attribute in list(node.attributes.items()):
                if attribute.is_ref() or attribute.type != ir.AttributeType.TENSOR:
                    continue
                tensor = attribute.as_tensor()
                if isinstance(tensor, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, moved(tensor), attribute.doc_string)
