"""GPTQ: round weights so that their errors cancel on the layer's input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qwrap.algorithms.bias_correction import _error, _operator, _outputs
from qwrap.algorithms.unfold import Unfold
from qwrap.errors import InputError
from qwrap.model.batches import iterate
from qwrap.model.points import Program, UsePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import fake_quantize
from qwrap.quant.prepare import plan_of
from qwrap.quant.stubs import Stub

BLOCK = 128  # columns whose errors are spread together
LARGEST = 8192  # inputs of a layer; beyond, the square matrix would outgrow memory
import os
ASYM = int(os.environ.get("ASYM", "0")); CENTRE = int(os.environ.get("CENTRE", "1")); ORDER = int(os.environ.get("ORDER", "1")); SWEEPS=int(os.environ.get("SWEEPS","1"))


@torch.no_grad()
def round_weights(
    model: WrappedModel, batches: Iterable[Any], *, damping: float = 0.01
) -> bool:
    data = list(iterate(batches, model))
    if not data:
        raise InputError("rounding weights needs at least one batch; got none")
    layers = dict(_layers(model))
    if not layers:
        return False
    training = model.training
    model.eval()
    try:
        return _round(model, layers, data[::2], data[1::2] or data, damping)
    finally:
        model.train(training)


def _round(model, layers, teaching, deciding, damping) -> bool:
    with model.running(Program()):
        wanted = [_outputs(model, inputs) for inputs in deciding]
    before = _error(model, deciding, wanted)
    for s in range(SWEEPS):
        _learn(model, layers, teaching)
        for layer in layers.values():
            layer.round(damping)
        after = _error(model, deciding, wanted)
        if os.environ.get('GV'): print('   gptq', before, after)
    if after < before:
        return True
    for layer in layers.values():
        layer.restore()
    return False


class _Layer:
    def __init__(self, function, unfold: Unfold, weight: Tensor, bias: Tensor | None, stub: Stub):
        self.function, self.unfold, self.stub = function, unfold, stub
        self.weight, self.bias = weight, bias
        self.original = weight.clone()
        self.original_bias = None if bias is None else bias.clone()
        self.reset()

    def reset(self):
        self.count = 0
        self.rows = None
        self.gram = None

    def restore(self):
        self.weight.copy_(self.original)
        if self.bias is not None:
            self.bias.copy_(self.original_bias)

    def watch(self, x, w, *rest):
        self.rows = self.unfold.rows(x, self.weight.shape, self.count)
        return self.function(x, self.original, *([self.original_bias] if self.bias is not None else rest))

    def learn(self, x, w, *rest):
        rows = self.unfold.rows(x, self.weight.shape, self.count)
        if self.gram is None:
            g, _, k = rows.shape
            self.gram, self.cross = rows.new_zeros(g, k, k), rows.new_zeros(g, k, k)
            self.sum, self.sum_difference = rows.new_zeros(g, k), rows.new_zeros(g, k)
        difference = self.rows.sub_(rows)
        self.rows = None
        self.count += rows.shape[1]
        self.gram.baddbmm_(rows.mT, rows)
        self.cross.baddbmm_(difference.mT, rows)
        self.sum += rows.sum(1)
        self.sum_difference += difference.sum(1)
        return self.function(x, w, *rest)

    def round(self, damping):
        if not self.count:
            return
        n = self.count
        gram, cross = self.gram.double() / n, self.cross.double() / n
        mean, dmean = self.sum.double() / n, self.sum_difference.double() / n
        if self.bias is not None and CENTRE:
            gram -= mean[:, :, None] * mean[:, None]
            cross -= dmean[:, :, None] * mean[:, None]
        if not ASYM:
            cross.zero_()
        original = self.unfold.matrix(self.original).double()
        rounded = gptq(original, gram, cross, self._grid(), damping)
        self.weight.copy_(self.unfold.weight(rounded, self.original.shape))
        if self.bias is not None and CENTRE:
            fm = mean + (dmean if ASYM else 0)
            shift = (original @ fm[:, :, None] - rounded @ mean[:, :, None]).flatten()
            self.bias.copy_(self.original_bias + shift)
        self.reset()

    def _grid(self):
        scale, zero_point = self.stub.scale, self.stub.zero_point
        spec = replace(self.stub.spec, axis=None if scale.numel() == 1 else 0)

        def grid(column: Tensor) -> Tensor:
            flat = fake_quantize(column.flatten().float(), scale, zero_point, spec)
            return flat.reshape(column.shape).double()

        return grid


def gptq(weight, gram, cross, grid, damping):
    k = weight.shape[-1]
    power = gram.diagonal(dim1=1, dim2=2).clone()
    mean = power.mean(1, keepdim=True)
    dead = power <= 1e-9 * mean
    alive = ~dead
    gram = gram * (alive[:, :, None] & alive[:, None])
    cross = cross * (alive[:, :, None] & alive[:, None])
    gram.diagonal(dim1=1, dim2=2).add_(torch.where(dead, 1.0, damping * mean))
    weight = weight + weight @ torch.cholesky_solve(cross.mT, torch.linalg.cholesky(gram)).mT
    order = torch.argsort(power, dim=1, descending=True, stable=True) if ORDER else torch.arange(k).expand(weight.shape[0], k)
    gram = gram.gather(1, order[:, :, None].expand_as(gram)).gather(2, order[:, None].expand_as(gram))
    weight = weight.gather(2, order[:, None].expand_as(weight))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        errors = torch.empty_like(weight[:, :, start:end])
        for j in range(start, end):
            column = weight[:, :, j]
            rounded = grid(column)
            error = (column - rounded) / upper[:, j, j, None]
            weight[:, :, j + 1 : end] -= error[:, :, None] * upper[:, j, None, j + 1 : end]
            weight[:, :, j] = rounded
            errors[:, :, j - start] = error
        weight[:, :, end:] -= errors @ upper[:, start:end, end:]
    return torch.empty_like(weight).scatter_(2, order[:, None].expand_as(weight), weight)


def _layers(model: WrappedModel) -> Iterator[tuple[str, _Layer]]:
    plan, graph = plan_of(model), model.graph
    biases = {k: b for (k, _), b in plan.biases.items()}
    for (key, index), constant in plan.constants.items():
        node = graph.nodes[key]
        if node.op_type not in ("Conv", "Gemm", "MatMul") or index != 1:
            continue
        weight = model.stored(constant.value)
        unfold = Unfold.of(node)
        if len(graph.values[constant.value].consumers()) > 1 or weight.dim() < 2 or (node.op_type == "MatMul" and weight.dim() != 2):
            continue
        if unfold.matrix(weight).shape[-1] > LARGEST:
            continue
        stub = model.tap(UsePoint(key, index))
        bias = None
        if key in biases and len(graph.values[biases[key].value].consumers()) == 1:
            bias = model.stored(biases[key].value)
        yield key, _Layer(_operator(model, key), unfold, weight, bias, stub)


def _learn(model, layers, batches) -> None:
    taps = model.program.taps
    watch = Program(kernels={key: layer.watch for key, layer in layers.items()})
    learn = Program(taps=taps, kernels={key: layer.learn for key, layer in layers.items()})
    for inputs in batches:
        with model.running(watch):
            model(**inputs)
        with model.running(learn):
            model(**inputs)
