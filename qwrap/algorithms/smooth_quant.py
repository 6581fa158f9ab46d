"""SmoothQuant: what is hard to quantize in activations, moved into weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.dtypes import INT8, UINT8
from qwrap.errors import ConfigError, InputError
from qwrap.graph.channels import Products, WeightView, divide, find_products, weight_view
from qwrap.graph.constants import Array, Constants
from qwrap.graph.external import FileTensor
from qwrap.graph.index import OnnxGraph
from qwrap.graph.load import Source, read_model
from qwrap.model.batches import iterate
from qwrap.model.build import load
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import choose_qparams, fake_quantize
from qwrap.quant.unfold import Unfold

OPERATORS = ("MatMul", "Gemm", "Conv")
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # what "auto" chooses from
LEAST = 1e-5  # the smallest number to divide by; and of the largest weight, what counts as one
ROWS = 512  # of an input, to choose by


@dataclass(frozen=True, slots=True)
class Smoothed:
    """A model that computes what it did, with smoother activations.

    Attributes:
        model: a new model, with all data in memory.
        inserted: names of the Mul nodes that are new in it, not to be quantized themselves: each
            reads a tensor as rough as it was.
        alpha: name of each tensor that was divided -> what ``alpha`` was for it.
    """

    model: onnx.ModelProto
    inserted: tuple[str, ...]
    alpha: dict[str, float]


@torch.no_grad()
def smooth_quant(
    model: Source,
    batches: Iterable[Any],
    *,
    alpha: float | Literal["auto"] = 0.5,
    fold: bool = True,
    op_types: Collection[str] = OPERATORS,
) -> Smoothed:
    """Divide the channels of activations, and multiply the weights that they go into.

    Channel j of an input is divided by ``max|X_j|**alpha / max|W_j|**(1 - alpha)``, over the data
    and over all weights that multiply this input. What the model computes stays the same, up to
    rounding; a channel whose values are far larger than those of the others no longer decides on
    the scale of them all.

    Args:
        model: a float model; not modified.
        batches: data, as for ``qwrap.calibrate``; read once.
        alpha: share of the difficulty that goes to the weights, from 0 to 1. "auto" chooses it for
            each input, from 0.3 to 0.8, by the error of its products with 8 bits.
        fold: divide the weights of what makes the input, such as a LayerNormalization or a product,
            where that is possible and nothing else reads it; else a Mul divides the input.
        op_types: operators whose inputs are divided: MatMul, Gemm, Conv.

    Returns:
        The new model, and the names of the Mul nodes in it.

    Raises:
        ModelError: the model cannot be loaded.
        InputError: there are no batches, one does not fit, or a value is not finite.
        ConfigError: ``alpha`` or ``op_types`` are none of these.

    Source: Xiao et al., arXiv:2211.10438, equation 4; the names are those of Neural Compressor.
    """
    if alpha != "auto" and not 0 <= alpha <= 1:
        raise ConfigError(f'alpha={alpha!r}: give a number from 0 to 1, or "auto"')
    if unknown := sorted(set(op_types) - set(OPERATORS)):
        raise ConfigError(f"op_types: {unknown}: choose from {list(OPERATORS)}")
    draft = read_model(model).clone()
    constants, products = Constants(draft), find_products(draft, op_types)
    observed = _observe(draft, products, batches, keep=alpha == "auto")
    found: list[tuple[Products, Array]] = []
    chosen: dict[str, float] = {}
    for each, channels in zip(products, observed, strict=True):
        if channels.is_seen:
            layer = _Layer(constants, each, channels)
            share = layer.best() if alpha == "auto" else alpha
            chosen[each.value.name or ""] = share
            found.append((each, layer.scale(share)))
    inserted = [divide(constants, each, scale, fold=fold) for each, scale in found]
    _into_memory(draft)
    names = tuple(name for name in inserted if name is not None)
    return Smoothed(ir.to_proto(draft), names, chosen)


def _into_memory(model: ir.Model) -> None:
    """Let no tensor of ``model`` lie in a file, in place."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if isinstance(value.const_value, (FileTensor, ir.ExternalTensor)):
                value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)


# --- what the data shows -------------------------------------------------------------------------


class _Channels:
    """The range of each channel of a tensor, and a sample of it."""

    def __init__(self, trailing: int, unfolds: Collection[Unfold]) -> None:
        self._axis = -1 - trailing
        self._ends: tuple[Tensor, Tensor] | None = None
        self.rows: dict[Unfold, list[Tensor]] = {unfold: [] for unfold in unfolds}

    @property
    def is_seen(self) -> bool:
        """Whether there were any values."""
        return self._ends is not None

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each channel, float64 ``[C]``."""
        assert self._ends is not None
        return self._ends

    def add(self, x: Tensor) -> None:
        """Take in a tensor."""
        if not x.numel():
            return
        first = x.detach().double().movedim(self._axis, 0).flatten(1)
        low, high = torch.aminmax(first, dim=1)
        if not (low.isfinite() & high.isfinite()).all():
            raise InputError("values are NaN or infinite")
        if self._ends is not None:
            low, high = torch.minimum(low, self._ends[0]), torch.maximum(high, self._ends[1])
        self._ends = low, high
        for unfold, kept in self.rows.items():
            rows = unfold.rows(x.detach().float())
            step = -(-rows.shape[1] // ROWS)
            kept.append(rows[:, ::step])
            if sum(part.shape[1] for part in kept) > 2 * ROWS:
                kept[:] = [torch.cat(kept, 1)[:, ::2]]


def _observe(
    draft: ir.Model, products: list[Products], batches: Iterable[Any], *, keep: bool
) -> list[_Channels]:
    """Return what one pass of the data shows of the input of each of ``products``."""
    graph, constants = OnnxGraph(draft), Constants(draft)
    model = load(draft).eval()
    found, watchers = [], defaultdict(list)
    for each in products:
        unfolds = {_unfold(n, _view(constants, n)) for n in each.nodes} if keep else set()
        channels = _Channels(each.trailing, unfolds)
        found.append(channels)
        if graph.key(each.value) in model.graph.values:
            watchers[graph.key(each.value)].append(channels)
    with model.watching({key: _adding(key, parts) for key, parts in watchers.items()}):
        _run(model, batches)
    return found


def _run(model: WrappedModel, batches: Iterable[Any]) -> None:
    for inputs in iterate(batches, model):
        model(**inputs)


def _adding(name: str, parts: list[_Channels]) -> Callable[[Tensor], None]:
    def add(x: Tensor) -> None:
        try:
            for channels in parts:
                channels.add(x)
        except InputError as error:
            raise InputError(f"tensor {name!r}: {error}") from error

    return add


def _unfold(node: ir.Node, view: WeightView) -> Unfold:
    return Unfold.of(node, torch.empty(view.values.shape, device="meta"))


# --- what to divide by ---------------------------------------------------------------------------

INPUT = QuantSpec(dtype=UINT8, symmetric=False)
WEIGHT = QuantSpec(dtype=INT8, axis=0)


class _Layer:
    """The nodes that multiply one input."""

    def __init__(self, constants: Constants, products: Products, channels: _Channels) -> None:
        self._channels = channels
        self._views = [_view(constants, node) for node in products.nodes]
        pairs = zip(products.nodes, self._views, strict=True)
        self._unfolds = [_unfold(node, view) for node, view in pairs]
        largest = np.max([view.largest() for view in self._views], 0)
        # A channel that no weight takes up must not decide on the scale of the others either.
        self._weights = np.maximum(largest, LEAST * largest.max())

    def scale(self, alpha: float) -> Array:
        """Return what to divide each channel by, float64; 1 for those that are always 0."""
        low, high = self._channels.ends
        size = torch.maximum(-low, high).cpu().numpy()
        if not self._weights.any():
            return np.ones_like(size)
        used = np.where(size > 0, size, 1.0)
        scale = np.maximum(used**alpha / self._weights ** (1 - alpha), LEAST)
        return np.where(size > 0, scale, 1.0)

    def best(self) -> float:
        """Return the alpha with which 8 bits lose least; of equals the one nearest to 0.5."""
        return min(ALPHAS, key=lambda alpha: (self._error(self.scale(alpha)), abs(alpha - 0.5)))

    def _error(self, scale: Array) -> float:
        """Return the relative squared error of all products, in 8 bits."""
        divisor, total = torch.from_numpy(scale), 0.0
        low, high = (end.cpu() / divisor for end in self._channels.ends)
        qparams = choose_qparams(low.min(), high.max(), INPUT)
        for view, unfold in zip(self._views, self._unfolds, strict=True):
            rows = torch.cat(self._channels.rows[unfold], 1).cpu()  # [G, P, K]
            shares = _of_columns(view, divisor).float()
            smooth = fake_quantize(rows / shares, qparams.scale, qparams.zero_point, INPUT)
            exact, scaled = (_columns(view, values) for values in (view.values, view.times(scale)))
            product = rows @ exact
            error = smooth @ _in_int8(scaled) - product
            total += float(error.square().sum() / product.square().sum().clamp(min=1e-30))
        return total


def _view(constants: Constants, node: ir.Node) -> WeightView:
    view = weight_view(constants, node)
    assert view is not None
    return view


def _columns(view: WeightView, values: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(view.columns(values).astype(np.float32)))


def _of_columns(view: WeightView, divisor: Tensor) -> Tensor:
    """Return what each column of the rows is divided by, ``[G, 1, K]``."""
    window = math.prod(view.values.shape[2:]) if view.is_kernel else 1
    return divisor.reshape(view.groups, 1, -1).repeat_interleave(window, 2)


def _in_int8(columns: Tensor) -> Tensor:
    """Return ``[G, K, R]`` rounded to int8 with a scale for each output."""
    flat = columns.mT.flatten(0, 1)  # [G * R, K]
    low, high = torch.aminmax(flat, dim=1)
    qparams = choose_qparams(low, high, WEIGHT)
    rounded = fake_quantize(flat, qparams.scale, qparams.zero_point, WEIGHT)
    return rounded.reshape(len(columns), -1, flat.shape[1]).mT
