"""Sparse tensors, which become dense ones when a model is read."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir

from qwrap.graph.nodes import bodies_of, graphs

LARGEST = 2_000_000_000  # bytes of the dense tensor


def sparse_problem(sparse: onnx.SparseTensorProto) -> str | None:
    """Say why a sparse tensor cannot be made dense, or None.

    Source: ONNX IR specification and the comments of onnx.proto, SparseTensorProto.
    """
    values, indices, dims = sparse.values, sparse.indices, list(sparse.dims)
    try:
        dtype = ir.DataType(values.data_type)
        item = dtype.itemsize
    except (ValueError, TypeError):
        return f"unknown element type {values.data_type}"
    external = onnx.TensorProto.EXTERNAL
    if external in (values.data_location, indices.data_location):
        return "its values are in another file; make it dense first"
    if dtype == ir.DataType.STRING or item < 1 or len(values.dims) != 1 or min(dims, default=0) < 0:
        return f"element type {dtype.name}, shape {dims}, values of shape {list(values.dims)}"
    if math.prod(dims) * item > LARGEST:
        return f"its dense shape {dims} is too large"
    count = values.dims[0]
    if indices.data_type != onnx.TensorProto.INT64 or list(indices.dims) not in (
        [count],
        [count, len(dims)],
    ):
        return f"indices of shape {list(indices.dims)} for {count} values in shape {dims}"
    try:
        ir.tensor(values).numpy()
        flat = _flat_indices(sparse)
    except (ValueError, TypeError) as error:
        return f"its data cannot be read: {error}"
    if len(np.unique(flat)) != count:
        return "two values have the same index"
    return None


def _flat_indices(sparse: onnx.SparseTensorProto) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return where each value goes in the flattened tensor.

    Raises:
        ValueError: an index is out of range.
    """
    indices = ir.tensor(sparse.indices).numpy().astype(np.int64)
    shape = tuple(sparse.dims)
    if indices.ndim == 2:
        indices = np.ravel_multi_index(tuple(indices.T), shape).astype(np.int64)
    if indices.size and not 0 <= indices.min() <= indices.max() < math.prod(shape):
        raise ValueError(f"index out of range for shape {list(shape)}")
    return indices.reshape(-1)


def to_dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """Return a checked sparse tensor as a dense one of the same name."""
    values = ir.tensor(sparse.values)
    dense = np.zeros(math.prod(sparse.dims), values.dtype.numpy())
    dense[_flat_indices(sparse)] = values.numpy()
    return onnx.TensorProto(
        name=sparse.values.name,
        data_type=sparse.values.data_type,
        dims=sparse.dims,
        raw_data=dense.tobytes(),
    )


def densified(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a checked model without sparse tensors: ``proto`` itself if it has none."""
    if not _has_sparse(proto):
        return proto
    dense = onnx.ModelProto()
    dense.CopyFrom(proto)
    for graph in graphs(dense.graph):
        graph.initializer.extend(to_dense(sparse) for sparse in graph.sparse_initializer)
        del graph.sparse_initializer[:]
    for nodes in bodies_of(dense):
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("sparse_tensor"):
                    tensor = to_dense(attribute.sparse_tensor)
                    attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))
    return dense


def _has_sparse(proto: onnx.ModelProto) -> bool:
    return any(graph.sparse_initializer for graph in graphs(proto.graph)) or any(
        attribute.HasField("sparse_tensor")
        for nodes in bodies_of(proto)
        for node in nodes
        for attribute in node.attribute
    )
