"""Codes that are learned from data, weight after weight, as the file is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from tqdm import tqdm

from qwrap.model.wrapped import WrappedModel
from qwrap.nbits.blocks import BlockFormat, Blocks
from qwrap.nbits.correction import corrected, output_error
from qwrap.nbits.draft import Weight
from qwrap.nbits.lessons import Lesson, Product, Streams, lessons
from qwrap.nbits.matrices import as_read, matrix_of
from qwrap.nbits.methods import Method
from qwrap.nbits.prefix import Fixed
from qwrap.nbits.split import dequantize
from qwrap.nbits.unfit import Unfit


@dataclass(frozen=True, slots=True)
class Teaching:
    """How weights learn.

    Attributes:
        sequential: whether inputs come through weights that are already quantized.
        asymmetric: whether a weight makes good what its inputs then lack.
        damping: of that.
        memory: bytes of tensors to keep in memory between layers, for each run; None: all.
    """

    sequential: bool = True
    asymmetric: bool = True
    damping: float = 0.01
    memory: int | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One weight to learn.

    Attributes:
        product: the node, and its place in the graph that runs.
        weight: what it reads.
        form: of the codes.
        method: makes them; None: rounding to nearest, as what the method takes is no such weight.
        nearest: rounding to nearest, which is kept where the method is no better.
    """

    product: Product
    weight: Weight
    form: BlockFormat
    method: Method | None
    nearest: Method


class Learner:
    """Learns weights in the order of the graph, no further than was asked for.

    Args:
        model: float, of the graph in which the products are.
        tasks: the weights.
        batches: inputs by name.
        teaching: how.
        fixed: what else a node of the quantized model reads instead of a constant.
        progress: show a bar on a terminal.
    """

    def __init__(
        self,
        model: WrappedModel,
        tasks: Sequence[Task],
        batches: Sequence[Mapping[str, Any]],
        teaching: Teaching,
        fixed: Fixed,
        *,
        progress: bool = True,
    ) -> None:
        self._tasks, self._teaching = {task.product.node: task for task in tasks}, teaching
        self._streams = streams_of(model, batches, teaching)
        self._streams.fix(fixed)
        products = [task.product for task in tasks]
        self._readers = Counter(product.weight for product in products)
        self._groups = lessons(model, products, batches, self._streams)
        self._blocks: dict[object, Blocks | Unfit] = {}
        self._texts: dict[object, str] = {}
        # None: not unless on a terminal.
        self._bar = tqdm(
            total=len(products), desc="weights", disable=None if progress else True, leave=False
        )

    @torch.no_grad()
    def blocks(self, node: ir.Node) -> Blocks:
        """Return the codes of a node's weight, which are forgotten once all of its nodes asked.

        Raises:
            Unfit: the weight is not finite.
            InputError: a tensor is not.
        """
        key = self._tasks[node].product.weight
        while key not in self._blocks:
            self._learn(*next(self._groups))
        self._readers[key] -= 1
        found = self._blocks[key] if self._readers[key] else self._blocks.pop(key)
        if isinstance(found, Unfit):
            raise found
        return found

    def text(self, node: ir.Node) -> str:
        """Return how a node's codes were chosen, and what the error is."""
        return self._texts.get(self._tasks[node].product.weight, "")

    def _learn(self, group: Sequence[Product], found: Mapping[object, Lesson]) -> None:
        for product in group:
            key = product.weight
            if key not in self._texts:
                self._texts[key] = ""
                try:
                    self._blocks[key], self._texts[key] = self._judged(product, found.get(key))
                except Unfit as reason:
                    self._blocks[key] = reason
            blocks = self._blocks[key]
            if isinstance(blocks, Blocks):
                shape = self._tasks[product.node].weight.shape
                self._streams.fix({product.point: partial(_values, product.node, blocks, shape)})
            self._bar.update()

    def _judged(self, product: Product, lesson: Lesson | None) -> tuple[Blocks, str]:
        """Return codes that come no less close on held-back rows than those to nearest."""
        task = self._tasks[product.node]
        weight = matrix_of(product.node, task.weight)
        nearest = task.nearest(weight, task.form, None)
        if lesson is None:
            return nearest, "no data reached it: rounded to nearest"
        target, share = weight, 0.0
        if self._teaching.asymmetric:
            target, share = corrected(weight, lesson, self._teaching.damping)
        made = (task.method or task.nearest)(target, task.form, lesson.taught)
        errors = [output_error(weight, dequantize(b), lesson.held) for b in (made, nearest)]
        text = f"error {min(errors):.3g} of the output"
        if not errors[0] < errors[1]:
            return nearest, f"{text}, rounded to nearest"
        made_good = f", {share:.0%} of the drift made good" if share else ""
        return made, f"{text}, to nearest {errors[1]:.3g}{made_good}"


def streams_of(
    model: WrappedModel, batches: Sequence[Mapping[str, Any]], teaching: Teaching
) -> Streams:
    """Return the runs over the data."""
    return Streams(
        model,
        batches,
        sequential=teaching.sequential,
        exact=teaching.asymmetric,
        memory=teaching.memory,
    )


def _values(node: ir.Node, blocks: Blocks, shape: tuple[int, ...]) -> Tensor:
    return as_read(node, dequantize(blocks), shape)
