"""Weights of a model in few bits, its activations in float."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import onnx
import onnx_ir as ir

from qwrap.errors import ConfigError, QwrapWarning
from qwrap.graph.index import walk_nodes
from qwrap.graph.load import Source, external_tensors, read_model
from qwrap.graph.save import PROTO_LIMIT, replace_file
from qwrap.nbits.blocks import BlockFormat
from qwrap.nbits.bnb4 import KINDS
from qwrap.nbits.functions import expand_weighted
from qwrap.nbits.gptq import gptq
from qwrap.nbits.learn import Learner, Teaching
from qwrap.nbits.matmul import is_block
from qwrap.nbits.methods import FROM_DATA, METHODS, Method
from qwrap.nbits.planning import teach
from qwrap.nbits.request import Form, Request
from qwrap.nbits.rewrite import REWRITES, Report, is_candidate, rewrite
from qwrap.nbits.rtn import round_to_nearest
from qwrap.nbits.streaming import stream_model, take_in

BITS = (2, 3, 4, 8)
ACCURACY_LEVELS = (0, 1, 2, 3, 4)

Edit = Callable[..., None]


def quantize_weights(
    model: Source,
    output: str | os.PathLike[str] | None = None,
    *,
    bits: int = 4,
    block_size: int = 128,
    symmetric: bool = False,
    method: str | Method = "rtn",
    form: Form = "operator",
    accuracy_level: int | None = None,
    op_types: Collection[str] = ("MatMul",),
    nodes: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    formats: Mapping[str, BlockFormat] | None = None,
    axis: int = 1,
    batches: Iterable[Any] | None = None,
    damping: float = 0.01,
    sequential: bool = True,
    asymmetric: bool = True,
    memory: int | None = None,
    external_data: bool | None = None,
    report: Report | None = None,
    progress: bool = True,
) -> onnx.ModelProto | None:
    """Quantize constant weights to 2, 3, 4 or 8 bits in blocks; activations stay float.

    A model of any size does: weights are read one at a time, and where the result has external
    data each goes to its file at once, so that some copies of the largest weight is all that is in
    memory. A weight that several nodes read is quantized once.

    Args:
        model: path, message or onnx_ir model of float32, float16 or bfloat16; never modified.
        output: file to make or replace. None: return the model.
        bits: 2, 3, 4 or 8. No operator of onnxruntime reads packed codes of 3 bits: they are stored
            in 4, and the file is as large as with 4 bits.
        block_size: weights in a row along the reduced axis that share a scale: for
            ``form="operator"`` a power of 2 from 16 on, of a MatMul to 256; 0, with
            ``form="qdq"``, for one scale an output.
        symmetric: keep no zero points; the middle code means 0.
        method: how the codes of a MatMul are chosen: ``"rtn"``, to nearest; ``"hqq"``, with float
            zero points, for ``form="operator"``, and at 8 bits as ``"rtn"``; ``"k_quant"``, by a
            search, always with zero points; ``"gptq"``, with ``batches``, so that errors cancel on
            the data; ``"awq"``, with ``batches``, by ranges that suit the data, after scales that
            go into what makes the input, or else into a Mul; or a function of the kind that
            ``qwrap.nbits.methods`` describes. Tables are rounded to nearest.
        form: ``"operator"`` writes MatMulNBits and GatherBlockQuantized of com.microsoft;
            ``"qdq"`` DequantizeLinear with ``block_size`` before MatMul, which needs opset 21, for
            2 bits 25; ``"nf4"`` and ``"fp4"`` MatMulBnb4 of 4-bit floats, which know no method but
            rounding to nearest. onnxruntime makes MatMulNBits of pairs when it loads the file, and
            then with accuracy level 4, unless the session option
            ``session.qdq_matmulnbits_accuracy_level`` says otherwise.
        accuracy_level: what MatMulNBits may round its float input to: 1 float32, 2 float16,
            3 bfloat16, 4 int8. None or 0 writes none, and onnxruntime computes in the type of the
            input. 4 is the fastest, and rounds activations to 8 bits in blocks, an error of its own
            that may outweigh that of the weights: measure before choosing it.
        op_types: operators to quantize, MatMul and Gather (embedding tables).
        nodes: names of the only nodes to quantize, whatever ``op_types`` says. None: all.
        exclude: names of nodes to leave.
        formats: name of a node -> format that differs for it, such as 8 bits for the last layer.
        axis: of a table, along which its blocks lie.
        batches: data for methods that learn, as for ``qwrap.calibrate``; some 30 samples do. They
            are held in memory. Every eighth batch teaches nothing: where a method comes no closer
            on it than rounding to nearest, that is kept, and the report says so of each weight.
        damping: what GPTQ adds to the power of each input, relative to their mean; raised tenfold,
            with a ``QwrapWarning``, until products of inputs have a Cholesky factor.
        sequential: let each weight learn from inputs that come through weights already quantized,
            in the order of the graph; else from those of the float model.
        asymmetric: with that, let each weight also make good what its inputs lack to the exact
            ones, as far as it helps on data that does not teach.
        memory: bytes of tensors between layers that are held in memory, twice so if
            ``asymmetric``; what is beyond goes to temporary files. None: all are held.
        external_data: write weights to ``<output>.data``; None does so if the source has external
            data or the result is too large for one file.
        report: is told of each node, whether it was quantized, as what or why not. Where none
            is, a ``QwrapWarning`` says so.
        progress: show a bar on a terminal while weights learn.

    Returns:
        The quantized model, None if it was written to ``output``.

    Raises:
        ModelError: the source cannot be loaded, or with data cannot be run.
        InputError: a batch does not fit.
        ConfigError: an argument is none of these, or names a node that the model does not have or
            that has no weight to quantize, or the method lacks data or is given data in vain.
        ExportError: the file cannot be written or would replace the source, or the model cannot be
            raised to the opset that int4 needs.
    """
    settings = _Settings(
        BlockFormat(bits, block_size, symmetric),
        method if callable(method) else _method(method, form, damping),
        form,
        accuracy_level or 0,
        axis,
        dict(formats or {}),
    )
    if unknown := set(op_types) - set(REWRITES):
        raise ConfigError(f"op_types: {sorted(unknown)}: choose from {list(REWRITES)}")
    if not damping > 0:
        raise ConfigError(f"damping={damping}: expected more than 0; 0.01 is usual")
    draft = read_model(model) if isinstance(model, ir.Model) else read_model(model).clone()
    draft = expand_weighted(draft, op_types if nodes is None else tuple(REWRITES))
    chosen = _chosen(draft, op_types, nodes, set(exclude), set(settings.formats))
    for node in chosen:
        settings.request(node)  # before any data is read
    _check_data(method, batches)
    learner: Learner | None = None
    known: set[ir.Node] = set()
    if batches is not None:
        teaching = Teaching(sequential, sequential and asymmetric, damping, memory)
        learner, known = teach(
            draft, chosen, settings.request, batches, teaching,
            scaled=method == "awq", progress=progress,
        )  # fmt: skip

    def choose(node: ir.Node) -> Request | None:
        if node not in chosen:
            return None
        request = settings.request(node)
        if learner is None or node not in known:
            return request
        codes, note = partial(learner.blocks, node), partial(learner.text, node)
        return replace(request, learned=codes, note=note)

    tally = _Tally(report)
    edit = partial(rewrite, draft, choose, report=tally)
    result = None
    if output is None:
        edit()
        take_in(draft)
        result = ir.to_proto(draft)
    else:
        write_edited(model, draft, Path(output), edit, external_data)
    if not tally.quantized:
        warnings.warn(
            "no weight was quantized: no node of " + " or ".join(sorted(op_types)) + " that was "
            "chosen has a constant float matrix; report= says of each node why",
            QwrapWarning,
            stacklevel=2,
        )
    return result


class _Tally:
    """Counts the nodes that were quantized, and tells them on."""

    def __init__(self, report: Report | None) -> None:
        self._report = report
        self.quantized = 0

    def add(self, name: str, op_type: str, quantized: bool, reason: str = "") -> None:
        self.quantized += quantized
        if self._report is not None:
            self._report.add(name, op_type, quantized, reason)


def write_edited(
    source: Source, draft: ir.Model, target: Path, edit: Edit, external_data: bool | None
) -> None:
    """Edit a model and write it, all of it or nothing.

    Args:
        source: what the model was read from.
        draft: the model; changed in place.
        target: the file to make or replace.
        edit: changes the model; takes a ``store`` for its new initialisers.
        external_data: as for ``quantize_weights``.

    Raises:
        ExportError: the file cannot be written.
        ConfigError: it is the source.
    """
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    if path is not None and target.exists() and target.samefile(path):
        raise ConfigError(f"{target}: is the model itself; write to another file")
    outside = external_data
    if outside is None:
        outside = any(True for _ in external_tensors(draft)) or _size(draft) > PROTO_LIMIT
    if outside:
        stream_model(target, draft, lambda store: edit(store=store))
        return
    edit()
    take_in(draft)
    message = ir.to_proto(draft).SerializeToString()
    replace_file(target, lambda file: _write(file, message))


def _write(file: Path, message: bytes) -> None:
    file.write_bytes(message)


def _size(model: ir.Model) -> int:
    graphs = (model.graph, *model.graph.subgraphs())
    tensors = [value.const_value for graph in graphs for value in graph.initializers.values()]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _check_data(method: str | Method, batches: Iterable[Any] | None) -> None:
    if batches is None and method in FROM_DATA:
        raise ConfigError(f'method="{method}" needs data: give batches')
    if batches is not None and isinstance(method, str) and method not in FROM_DATA:
        raise ConfigError(f'method="{method}" uses no data; leave batches out')


# --- what was asked for --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Settings:
    """The arguments, checked."""

    form_of_blocks: BlockFormat
    method: Method
    form: Form
    accuracy_level: int
    axis: int
    formats: dict[str, BlockFormat]

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ConfigError(f"form={self.form!r}: choose from {list(get_args(Form))}")
        if self.accuracy_level not in ACCURACY_LEVELS:
            raise ConfigError(
                f"accuracy_level={self.accuracy_level}: choose from {ACCURACY_LEVELS}"
            )
        for form in (self.form_of_blocks, *self.formats.values()):
            check_format(form, self.form)

    def request(self, node: ir.Node) -> Request:
        """Return what to make of ``node``.

        Raises:
            ConfigError: no kernel takes blocks of that size.
        """
        form = self.formats.get(node.name or "", self.form_of_blocks)
        if self.form != "qdq" and not is_block(form.block_size, node.op_type):
            raise ConfigError(
                f"node {node.name!r}: block_size={form.block_size}: the operators for MatMul take "
                "a power of 2 from 16 to 256"
            )
        return Request(form, self.method, self.form, self.accuracy_level, self.axis)


def check_format(form: BlockFormat, written: Form) -> None:
    """Refuse a format that no operator takes.

    Raises:
        ConfigError: it is one.
    """
    if form.bits not in BITS:
        raise ConfigError(f"bits={form.bits}: only 2, 3, 4 or 8 bits")
    if written in KINDS and form.bits != 4:
        raise ConfigError(f'form="{written}" has 4 bits, not {form.bits}')
    if written != "qdq" and not is_block(form.block_size, "Gather"):
        raise ConfigError(
            f"block_size={form.block_size}: the operators take a power of 2 from 16 on"
            + ('; one scale an output needs form="qdq"' if form.block_size == 0 else "")
        )
    if form.block_size < 0:
        raise ConfigError(f"block_size={form.block_size}: 0 or more")


def _method(name: str, form: Form, damping: float) -> Method:
    if name not in METHODS:
        raise ConfigError(_unknown("method", name, METHODS))
    if name != "rtn" and form in KINDS:
        raise ConfigError(f'form="{form}" knows no method but "rtn"; got "{name}"')
    if name == "rtn" and form == "qdq":
        return partial(round_to_nearest, around_zero=True)
    return partial(gptq, damping=damping) if name == "gptq" else METHODS[name]


def _chosen(
    model: ir.Model,
    op_types: Collection[str],
    names: Iterable[str] | None,
    exclude: set[str],
    formats: set[str],
) -> set[ir.Node]:
    """Return the nodes to quantize.

    Raises:
        ConfigError: a name is unknown, or that of a node without a weight to quantize.
    """
    named = None if names is None else set(names)
    *most, last = REWRITES
    known = f"{', '.join(most)} and {last}"
    found = {node.name: node for node in walk_nodes(model.graph) if node.name}
    for what, given in (("nodes", named or set()), ("exclude", exclude), ("formats", formats)):
        for name in sorted(given):
            if name not in found:
                raise ConfigError(f"{what}: {_unknown('node', name, found)}")
            if what != "exclude" and not is_candidate(found[name]):
                raise ConfigError(
                    f"{what}: node {name!r} is of type {found[name].op_type}; "
                    f"only {known} have weights to quantize"
                )
    return {
        node
        for node in walk_nodes(model.graph)
        if is_candidate(node)
        and (node.op_type in op_types if named is None else node.name in named)
        and node.name not in exclude
    }


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"no {what} {name!r}" + (f"; {near[0]!r}?" if near else "")
