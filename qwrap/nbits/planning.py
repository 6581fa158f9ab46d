"""From the nodes that are to learn to what teaches them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.graph.constants import Constants
from qwrap.graph.index import OnnxGraph
from qwrap.model.batches import iterate
from qwrap.model.build import load
from qwrap.model.points import UsePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.nbits.attention import makes_scores
from qwrap.nbits.awq import clip, rescale
from qwrap.nbits.draft import Draft, Weight
from qwrap.nbits.gather import table_values
from qwrap.nbits.learn import Learner, Task, Teaching, streams_of
from qwrap.nbits.lessons import Product, lessons
from qwrap.nbits.matrices import PRODUCTS, WEIGHT_INPUT, check_matrix, unfold_of
from qwrap.nbits.request import Request
from qwrap.nbits.rtn import round_to_nearest
from qwrap.nbits.unfit import Unfit

Ask = Callable[[ir.Node], Request]


def teach(
    draft: ir.Model,
    nodes: Collection[ir.Node],
    ask: Ask,
    batches: Iterable[Any],
    teaching: Teaching,
    *,
    scaled: bool,
    progress: bool,
) -> tuple[Learner, set[ir.Node]]:
    """Return what knows the codes of nodes, and the nodes that it knows.

    Args:
        draft: with ``scaled`` changed in place, to one that computes the same.
        nodes: of it, that are to be quantized.
        ask: what to make of one.
        batches: as for ``qwrap.calibrate``; held in memory.
        teaching: how.
        scaled: whether weights are scaled by AWQ first.
        progress: show a bar on a terminal.

    Raises:
        UnsupportedOpError: the model holds operators that qwrap does not run.
        InputError: there are no batches, one does not fit, or a value is not finite.
    """
    model = load(draft.clone()).eval()
    data = list(iterate(batches, model))
    if scaled:
        _scale(draft, model, nodes, ask, data, teaching)
        model = load(draft.clone()).eval()
    constants, tasks = Draft(draft), list[Task]()
    for product, weight in _products(draft, model, nodes, ask):
        request = ask(product.node)
        method: Any = request.method
        if product.node.op_type == "Conv" and method is clip:
            method = None
        if scaled and makes_scores(Constants(draft), product.node):
            method = None
        nearest = partial(round_to_nearest, around_zero=request.form == "qdq")
        tasks.append(Task(product, weight, request.format, method, nearest))
    fixed = _tables(constants, model, OnnxGraph(draft), nodes, ask)
    learner = Learner(model, tasks, data, teaching, fixed, progress=progress)
    return learner, {task.product.node for task in tasks}


def _products(
    draft: ir.Model, model: WrappedModel, nodes: Collection[ir.Node], ask: Ask
) -> Iterator[tuple[Product, Weight]]:
    """Yield those of ``nodes`` that multiply their input with one constant matrix."""
    constants, graph = Draft(draft), OnnxGraph(draft)
    for node in (n for n in graph.nodes.values() if n in nodes and n.op_type in PRODUCTS):
        weight, given = constants.weight(node.inputs[1]), node.inputs[0]
        if weight is None or given is None or constants.weight(given) is not None:
            continue
        try:
            check_matrix(node, weight)
        except Unfit:
            continue  # as the rewrite will say
        unfold = unfold_of(node, weight.shape)
        key = weight.value, weight.turned, node.op_type, unfold, ask(node).format, _layout(node)
        point = UsePoint(_key(graph, model, node), WEIGHT_INPUT[node.op_type])
        yield Product(node, point, graph.key(given), key, unfold), weight


def _layout(node: ir.Node) -> object:
    turned = node.attributes.get("transB")
    return None if turned is None else turned.value


def _key(graph: OnnxGraph, model: WrappedModel, node: ir.Node) -> str:
    """Return the key of a node in the graph that runs, where functions may be expanded."""
    made = model.graph.values[graph.key(node.outputs[0])].producer()
    assert made is not None
    return model.graph.node_key(made)


def _tables(
    constants: Draft,
    model: WrappedModel,
    graph: OnnxGraph,
    nodes: Collection[ir.Node],
    ask: Ask,
) -> dict[UsePoint, Callable[[], Tensor]]:
    """Return what tables become for the nodes that look things up in them."""
    found: dict[UsePoint, Callable[[], Tensor]] = {}
    for node in (n for n in graph.nodes.values() if n in nodes and n.op_type == "Gather"):
        weight = constants.weight(node.inputs[0])
        made = None if weight is None else table_values(weight, node, ask(node))
        if made is not None:
            found[UsePoint(_key(graph, model, node), 0)] = made
    return found


@torch.no_grad()
def _scale(
    draft: ir.Model,
    model: WrappedModel,
    nodes: Collection[ir.Node],
    ask: Ask,
    data: list[dict[str, Any]],
    teaching: Teaching,
) -> None:
    """Scale weights and what makes their inputs as AWQ does, in place, group after group."""
    products = [product for product, _ in _products(draft, model, nodes, ask)]
    products = [product for product in products if product.node.op_type != "Conv"]
    plain = Teaching(sequential=False, memory=teaching.memory)
    for group, found in lessons(model, products, data, streams_of(model, data, plain)):
        known = {p.node: found[p.weight].taught for p in group if p.weight in found}
        rescale(draft, {node: ask(node).format for node in known}, known)
