"""Small models with matrices and tables, and what their quantized files mean in floats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import NodeProto, TensorProto, helper

Array = np.ndarray[Any, np.dtype[Any]]
FLOAT, FLOAT16, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64


def tensor(array: Array, name: str) -> TensorProto:
    """Any type, int4 and bfloat16 included."""
    return ir.to_proto(ir.tensor(np.ascontiguousarray(array), name=name))


def drawn(*shape: int, seed: int = 0, dtype: type = np.float32) -> Array:
    return np.random.default_rng(seed).normal(0, 0.3, shape).astype(dtype)


def model_of(
    nodes: Sequence[NodeProto],
    weights: Mapping[str, Array],
    inputs: Mapping[str, Sequence[int | str] | None],
    outputs: Sequence[str],
    *,
    kind: int = FLOAT,
    opset: int = 17,
    ir_version: int = 8,
    integers: Sequence[str] = (),
) -> onnx.ModelProto:
    """Nodes that have no name are called after their outputs."""
    for node in nodes:
        node.name = node.name or f"/{node.output[0]}"
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "small",
        [info(n, INT64 if n in integers else kind, shape) for n, shape in inputs.items()],
        [info(name, kind, None) for name in outputs],
        [tensor(array, name) for name, array in weights.items()],
    )
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def product(
    weight: Array, *, shape: Sequence[int | str] | None = ("B", None), **changes: Any
) -> onnx.ModelProto:
    """``y = x @ w``."""
    given = None if shape is None else [weight.shape[-2] if n is None else n for n in shape]
    kinds = {np.dtype(np.float16): FLOAT16, np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16}
    kind = kinds.get(weight.dtype, FLOAT)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    return model_of([node], {"w": weight}, {"x": given}, ["y"], kind=kind, **changes)


def lookup(table: Array, axis: int = 0, **changes: Any) -> onnx.ModelProto:
    """``y = Gather(w, i)``."""
    kind = FLOAT16 if table.dtype == np.float16 else FLOAT
    node = helper.make_node("Gather", ["w", "i"], ["y"], name="lookup", axis=axis)
    return model_of([node], {"w": table}, {"i": ["B"]}, ["y"], integers=["i"], kind=kind, **changes)


def run(
    model: onnx.ModelProto | str, feeds: Mapping[str, Array], *, optimised: bool = True
) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    # Else blocked pairs are fused to products of 8-bit activations.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, str) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return [np.asarray(y) for y in session.run(None, dict(feeds))]


def walk(graph: onnx.GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from walk(attribute.g)


def constants(graph: onnx.GraphProto) -> dict[str, Array]:
    """Initialisers of a graph and of its bodies, small integers as the integers they are."""
    found = {t.name: ir.from_proto(t).numpy() for t in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found |= constants(attribute.g)
    return found


def attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def bits_of(packed: Array, bits: int) -> Array:
    """Numbers of few bits that bytes hold along the last axis, worked out bit by bit."""
    single = np.unpackbits(packed, axis=-1, bitorder="little")
    groups = single.reshape(*packed.shape[:-1], -1, bits)
    return groups @ (1 << np.arange(bits))


def matrix(node: NodeProto, known: Mapping[str, Array]) -> Array:
    """What a MatMulNBits multiplies with, float64 ``[K, N]``."""
    given = attributes(node)
    k, n, bits, block = (given[key] for key in ("K", "N", "bits", "block_size"))
    codes = bits_of(known[node.input[1]].reshape(n, -1), bits).astype(np.float64)
    scale = known[node.input[2]].astype(np.float64).reshape(n, -1)
    zero = np.full(scale.shape, 2.0 ** (bits - 1))
    if len(node.input) > 3 and node.input[3]:
        packed = known[node.input[3]]
        if packed.dtype == np.uint8:
            zero = bits_of(packed.reshape(n, -1), bits)[:, : scale.shape[1]].astype(np.float64)
        else:
            zero = packed.astype(np.float64).reshape(scale.shape)
    wide = [np.repeat(each, block, 1)[:, :k] for each in (scale, zero)]
    return ((codes[:, :k] - wide[1]) * wide[0]).T


FP4 = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
NF4 = [-1, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0]
NF4 += [0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1]


def float4_matrix(node: NodeProto, known: Mapping[str, Array]) -> Array:
    """What a MatMulBnb4 multiplies with, ``[K, N]``."""
    given, packed, largest = attributes(node), *(known[name] for name in node.input[1:])
    k, n = given["K"], given["N"]
    levels = np.array(NF4 if given["quant_type"] else [*FP4, *(-x for x in FP4)])
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[: n * k]
    scale = np.repeat(largest.astype(np.float64), given["block_size"])[: n * k]
    return (levels[codes] * scale).reshape(n, k).T.astype(largest.dtype)


def table(node: NodeProto, known: Mapping[str, Array]) -> Array:
    """What a GatherBlockQuantized or a blocked DequantizeLinear stands for, float64."""
    is_gather = node.op_type == "GatherBlockQuantized"
    given = {"quantize_axis": 1, "block_size": 128, "bits": 4} | attributes(node)
    axis = given["quantize_axis"] if is_gather else given["axis"]
    data, scale = known[node.input[0]], known[node.input[2 if is_gather else 1]]
    rest = node.input[3 if is_gather else 2 :]
    zero = known[rest[0]] if rest else None
    if data.dtype == np.uint8 and is_gather:
        data = bits_of(data, given["bits"])
        if zero is not None:
            zero = bits_of(zero, given["bits"])[..., : scale.shape[-1]]
        else:
            zero = np.full(scale.shape, 2 ** (given["bits"] - 1))
    codes, size = data.astype(np.float64), data.shape[axis]

    def spread(blocks: Array) -> Array:
        wide = np.repeat(blocks.astype(np.float64), given["block_size"], axis)
        return wide.take(range(size), axis)

    return (codes - (0 if zero is None else spread(zero))) * spread(scale)


def in_floats(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with float operators and the float32 weights that its codes mean."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    _to_floats(result.graph, constants(model.graph))
    return result


def _to_floats(graph: onnx.GraphProto, known: Mapping[str, Array]) -> None:
    nodes = []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _to_floats(attribute.g, known)
        name = f"{node.name}.float"
        if node.op_type == "MatMulNBits":
            kind = known[node.input[2]].dtype
            graph.initializer.append(tensor(matrix(node, known).astype(kind), name))
            nodes.append(helper.make_node("MatMul", [node.input[0], name], node.output))
        elif node.op_type == "MatMulBnb4":
            graph.initializer.append(tensor(float4_matrix(node, known), name))
            nodes.append(helper.make_node("MatMul", [node.input[0], name], node.output))
        elif node.op_type == "GatherBlockQuantized":
            kind, axis = known[node.input[2]].dtype, attributes(node)["gather_axis"]
            graph.initializer.append(tensor(table(node, known).astype(kind), name))
            nodes.append(helper.make_node("Gather", [name, node.input[1]], node.output, axis=axis))
        elif node.op_type == "DequantizeLinear":
            array = table(node, known).astype(known[node.input[1]].dtype)
            graph.initializer.append(tensor(array, node.output[0]))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
