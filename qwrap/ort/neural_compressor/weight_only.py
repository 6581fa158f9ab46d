"""Weights of MatMul in blocks, by name of the node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
from onnx import NodeProto, TensorProto, helper

from qwrap.graph import read_model
from qwrap.graph.index import walk_nodes
from qwrap.nbits.blocks import BlockFormat
from qwrap.nbits.draft import Draft
from qwrap.nbits.gptq import gptq as compensated
from qwrap.nbits.inputs import observe_inputs
from qwrap.nbits.kquant import k_quant
from qwrap.nbits.matmul import is_block
from qwrap.nbits.packing import pack
from qwrap.nbits.range_rtn import round_in_range
from qwrap.nbits.request import COMPRESSOR_NAMES, Request
from qwrap.nbits.rewrite import rewrite
from qwrap.nbits.streaming import take_in
from qwrap.ort.errors import BlockSizeError, QuantizationError, UnknownNameError
from qwrap.ort.neural_compressor.onnx_model import ONNXModel
from qwrap.ort.neural_compressor.tensors import (
    Array,
    get_weight_scale,
    gptq,
    is_symmetric,
    pad_tensor,
    qdq_tensor,
    quant_tensor,
    quant_tensor_k_quant_cpu,
    quant_tensor_k_quant_cuda,
)
from qwrap.ort.neural_compressor.util import to_numpy

__all__ = [
    "get_weight_scale",
    "gptq",
    "gptq_quantize",
    "make_matmul_weight_only_node",
    "pad_tensor",
    "prepare_inputs",
    "qdq_tensor",
    "quant_tensor",
    "quant_tensor_k_quant_cpu",
    "quant_tensor_k_quant_cuda",
    "rtn_quantize",
]

CPU = ("CPUExecutionProvider",)
FLOAT = "fp32"
"""In a ``weight_config``: leave the node as it is."""
Config = Mapping[str, Any]


def rtn_quantize(
    model: onnx.ModelProto | ONNXModel | str,
    weight_config: Config = {},  # noqa: B006 (never modified)
    num_bits: int = 4,
    group_size: int = 32,
    scheme: str = "asym",
    ratios: Mapping[str, float] = {},
    accuracy_level: int = 0,
    providers: Sequence[str] = CPU,
    algorithm: str = "k_quant",
) -> ONNXModel:
    """Return a model whose MatMul of constants are MatMulNBits.

    Args:
        model: message, its wrapper or a path; not modified.
        weight_config: name of a node -> ``bits``, ``group_size`` and ``scheme`` of its own, or
            "fp32" to leave it.
        num_bits: 2, 4 or 8.
        group_size: weights that share a scale; -1: all inputs.
        scheme: "sym" or "asym".
        ratios: name of a weight -> share of the range that its codes span.
        accuracy_level: as in MatMulNBits; 0 is not written.
        providers: nothing is run.
        algorithm: "k_quant", or "RTN" for rounding to nearest.

    Raises:
        QuantizationError: another scheme or algorithm, a name that no node has (a ``ValueError``).
    """
    del providers
    if algorithm not in ("k_quant", "RTN"):
        raise QuantizationError(f"algorithm '{algorithm}': choose k_quant or RTN")
    rounded = cache(lambda ratio: partial(round_in_range, ratio=ratio))
    graph = read_model(_source(model)).clone()
    general = BlockFormat(num_bits, group_size, is_symmetric(scheme))
    requests = {}
    for node, form in _formats(graph, weight_config, general, algorithm).items():
        weight = node.inputs[1]
        ratio = ratios.get(weight.name or "", 1.0) if weight is not None else 1.0
        method = k_quant if algorithm == "k_quant" else rounded(ratio)
        requests[node] = _request(form, method, accuracy_level)
    return _rewritten(graph, requests)


def gptq_quantize(
    model: onnx.ModelProto | ONNXModel | str,
    dataloader: Any,
    weight_config: Config = {},  # noqa: B006 (never modified)
    num_bits: int = 4,
    group_size: int = 32,
    scheme: str = "asym",
    n_samples: int = 128,
    percdamp: float = 0.01,
    blocksize: int = 128,
    actorder: bool = False,
    mse: bool = False,
    perchannel: bool = True,
    accuracy_level: int = 0,
    providers: Sequence[str] = CPU,
) -> ONNXModel:
    """Return a model whose MatMul of constants are MatMulNBits, with errors that cancel on data.

    Args:
        model: message, its wrapper or a path; not modified.
        dataloader: yields pairs of inputs and something else.
        weight_config: as for ``rtn_quantize``; ``algorithm`` other than "GPTQ" leaves a node too.
        num_bits: 2, 4 or 8.
        group_size: weights that share a scale; -1: all inputs.
        scheme: "sym" or "asym".
        n_samples: of the data; -1: all.
        percdamp: what is added to the power of each input, relative to the mean.
        blocksize: inputs whose errors are spread at once.
        actorder: begin with the inputs of most power.
        mse: search the range of each block.
        perchannel: a scale for each output.
        accuracy_level: as in MatMulNBits; 0 is not written.
        providers: kept; the model runs in torch.

    Raises:
        QuantizationError: another scheme, or a name that no node has (a ``ValueError``).
        InputError: the data does not fit the model.
    """
    source = _source(model)
    inputs, _ = prepare_inputs(model, n_samples, dataloader, providers)
    method = partial(
        compensated,
        damping=percdamp,
        act_order=actorder,
        search=mse,
        per_channel=perchannel,
        block=blocksize,
    )
    graph = read_model(source).clone()
    general = BlockFormat(num_bits, group_size, is_symmetric(scheme))
    formats = _formats(graph, weight_config, general, "GPTQ")
    seen = observe_inputs(graph, formats, inputs) if formats else {}
    requests = {
        node: replace(_request(form, method, accuracy_level), statistics=seen[node])
        for node, form in formats.items()
    }
    return _rewritten(graph, requests)


def prepare_inputs(
    model: onnx.ModelProto | ONNXModel | str,
    n_samples: int,
    dataloader: Iterable[Any],
    providers: Sequence[str],
) -> tuple[list[dict[str, Array]], onnxruntime.SessionOptions]:
    """Return inputs of a model by name, from pairs of inputs and something else; and options.

    Args:
        model: message, its wrapper or a path.
        n_samples: how many; -1: all. What fills no whole batch of the loader is left out.
        dataloader: yields pairs of which the first is a dict, an array or a list of arrays.
        providers: nothing is run.

    Raises:
        QuantizationError: as many inputs as the model does not have (a ``ValueError``).
    """
    del providers
    source = _source(model)
    proto = ONNXModel(source, load_external_data=False).model
    constants = {tensor.name for tensor in proto.graph.initializer}
    names = [value.name for value in proto.graph.input if value.name not in constants]
    size, inputs = getattr(dataloader, "batch_size", 1) or 1, []
    for index, (given, *_) in enumerate(dataloader):
        if n_samples != -1 and (index + 1) * size > n_samples:
            break
        if isinstance(given, Mapping):
            named = {name: to_numpy(value) for name, value in given.items()}
        else:
            values = given if isinstance(given, (list, tuple)) and len(names) > 1 else [given]
            named = {name: to_numpy(value) for name, value in zip(names, values, strict=False)}
        if set(named) != set(names):
            raise QuantizationError(
                f"Input number mismatch, require {len(names)} but get {len(named)}: the model has "
                f"{names}"
            )
        inputs.append(named)
    return inputs, onnxruntime.SessionOptions()


def make_matmul_weight_only_node(
    node: NodeProto,
    weight_shape: Sequence[int],
    num_bits: int,
    group_size: int,
    k_blocks: int,
    q_weight: Array,
    scale: Array,
    zero_point: Array | None,
    accuracy_level: int = 0,
) -> tuple[NodeProto, list[TensorProto]]:
    """Return a MatMulNBits for a MatMul, and what it reads.

    Args:
        node: the MatMul.
        weight_shape: ``[K, N]``.
        num_bits: 2, 4 or 8.
        group_size: weights that share a scale.
        k_blocks: groups of an output.
        q_weight: codes, uint8 ``[N * k_blocks, group_size]``.
        scale: float32 or float16, ``[N * k_blocks, 1]``.
        zero_point: uint8 likewise; None: the middle code.
        accuracy_level: 0 is not written.
    """
    weight = node.input[1]
    names = [f"{weight}_Q{num_bits}G{group_size}", f"{weight}_scale", f"{weight}_zp"]
    size = group_size * num_bits // 8
    codes = pack(q_weight.astype("uint8"), num_bits).reshape(-1, k_blocks, size)
    arrays = [codes, scale.reshape(-1, k_blocks)]
    if zero_point is not None:
        rows = zero_point.reshape(-1, k_blocks).astype("uint8")
        arrays.append(pack(rows, num_bits, fill=2 ** (num_bits - 1)))
    tensors = [
        onnx.numpy_helper.from_array(array, name)
        for name, array in zip(names, arrays, strict=False)
    ]
    attributes: dict[str, Any] = {
        "K": weight_shape[0],
        "N": weight_shape[1],
        "bits": num_bits,
        "block_size": group_size,
    }
    if accuracy_level > 0:
        attributes["accuracy_level"] = accuracy_level
    made = helper.make_node(
        "MatMulNBits",
        [node.input[0], *(tensor.name for tensor in tensors)],
        node.output,
        f"{node.name}_Q{num_bits}",
        domain="com.microsoft",
        **attributes,
    )
    return made, tensors


# --- what was asked for --------------------------------------------------------------------------


def _source(model: onnx.ModelProto | ONNXModel | str) -> onnx.ModelProto | str:
    return model.model if isinstance(model, ONNXModel) else model


def _request(form: BlockFormat, method: Any, accuracy_level: int) -> Request:
    return Request(form, method, accuracy_level=accuracy_level, naming=COMPRESSOR_NAMES)


def _formats(
    model: ir.Model, config: Config, general: BlockFormat, algorithm: str
) -> dict[ir.Node, BlockFormat]:
    """Return the format of each MatMul of a constant that is to be quantized."""
    constants, nodes = Draft(model, through_transpose=False), list(walk_nodes(model.graph))
    known = {node.name for node in nodes if node.name}
    for name in config:
        if name not in known:
            raise UnknownNameError("node in weight_config", name, known)
    formats = {}
    for node in nodes:
        own = config.get(node.name or "", {})
        weight = constants.weight(node.inputs[1]) if node.op_type == "MatMul" else None
        if own == FLOAT or weight is None or own.get("algorithm", algorithm) != algorithm:
            continue
        form = _format(own, general, weight.shape[-2] if len(weight.shape) > 1 else 0)
        if not is_block(form.block_size):
            raise BlockSizeError(
                f"node '{node.name}': group_size={form.block_size}: MatMulNBits takes a power of 2 "
                "from 16 to 256"
            )
        formats[node] = form
    return formats


def _format(own: Mapping[str, Any], general: BlockFormat, inputs: int) -> BlockFormat:
    scheme = own.get("scheme", "sym" if general.symmetric else "asym")
    size = own.get("group_size", general.block_size)
    bits = own.get("bits", general.bits)
    if bits not in (2, 4, 8):
        raise QuantizationError(f"bits={bits}: MatMulNBits has 2, 4 or 8")
    return BlockFormat(bits, inputs if size == -1 else size, is_symmetric(scheme))


def _rewritten(model: ir.Model, requests: Mapping[ir.Node, Request]) -> ONNXModel:
    rewrite(model, requests.get, through_transpose=False)
    take_in(model)
    return ONNXModel(ir.to_proto(model))
