"""How far a model's outputs are from the float model's: which measure fits which output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.errors import ConfigError, InputError
from qwrap.graph.index import OnnxGraph
from qwrap.model.attributes import attributes_of

Measure = Literal["kl", "sqnr", "error", "metric"]
Kind = Literal["kl", "error", "differing"]

MASKED = 1e30  # and beyond: stands for "not there"
FLOOR = 1e-6  # added to probabilities: a code of 0 is no infinite surprise
ONE_AXIS = 13  # from this opset on Softmax works along one axis, before along all that follow
FEWEST = 5  # channels of an image-shaped output that are classes; fewer are colours
LINEAR = ("Gemm", "MatMul", "FusedMatMul")
CONVOLUTIONS = ("Conv", "ConvTranspose")
MOVES = ("Identity", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Dropout")


@dataclass(frozen=True, slots=True)
class Output:
    """How one graph output is compared.

    Attributes:
        name: of the output.
        index: among the graph's.
        kind: "kl": divergence of the softmax along ``axis``, in nats, mean over all that is left;
            "error": squared error over the float output's squares; "differing": share of elements
            that differ.
        axis: that of the classes.
        is_probability: whether a softmax has been taken already.
        is_flat: whether all axes from ``axis`` on count as one.
    """

    name: str
    index: int
    kind: Kind
    axis: int = -1
    is_probability: bool = False
    is_flat: bool = False

    def scores(self, x: Tensor) -> Tensor:
        """Return log-probabilities up to a constant, along ``class_axis``, float64."""
        x = x.double()
        x = (x + FLOOR).log() if self.is_probability else x
        return x.flatten(self.axis) if self.is_flat else x

    @property
    def class_axis(self) -> int:
        """The axis of the classes in ``scores``."""
        return -1 if self.is_flat else self.axis

    def reference(self, wanted: Tensor) -> Reference:
        """Return what is needed of a float output to compare others with it."""
        if self.kind == "differing":
            return Reference(wanted, wanted, float(wanted.numel()))
        if self.kind == "error":
            there = counting(wanted)
            known = torch.where(there, wanted.double(), 0.0)
            return Reference(wanted, known, float(known.square().sum()), there)
        known = self.scores(wanted)
        there = counting(known)
        p = probabilities(known, self.class_axis)
        rows = known.numel() / known.shape[self.class_axis] if known.numel() else 0.0
        return Reference(wanted, known, rows, there, p)

    def distance(self, found: Tensor, wanted: Tensor | Reference) -> tuple[float, float]:
        """Return by how much ``found`` is off, and what that is relative to.

        The quotient of the two, each added up over batches, is the measure.

        Args:
            found: the output.
            wanted: the float model's; for many comparisons, what ``reference`` makes of it.

        Raises:
            InputError: ``found`` holds NaN where the float output has none.
        """
        reference = self.reference(wanted) if isinstance(wanted, Tensor) else wanted
        scale = reference.scale
        if found.shape != reference.wanted.shape:  # where values decide on shapes
            return scale, scale
        if self.kind == "differing":
            return float((found != reference.wanted).sum()), scale
        if bool((found.isnan() & ~reference.wanted.isnan()).any()):
            raise InputError(f"output {self.name!r} has become NaN by quantization")
        there, p = reference.there, reference.p
        assert there is not None
        if self.kind == "error":
            error = torch.where(there, found - reference.known, 0.0).square().sum()
        else:
            assert p is not None
            moves = torch.where(there, self.scores(found) - reference.known, 0.0)
            error = divergence(moves, p, self.class_axis).sum()
        return float(error), scale


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """A float output, ready to be compared with.

    Attributes:
        wanted: as the model put it out.
        known: what is compared: scores, or values with zeros for masks; float64.
        scale: what distances are relative to: rows of scores, the sum of squares, or elements.
        there: what of ``known`` counts.
        p: probabilities of the classes.
    """

    wanted: Tensor
    known: Tensor
    scale: float
    there: Tensor | None = None
    p: Tensor | None = None


def probabilities(scores: Tensor, axis: int) -> Tensor:
    """Return the softmax of scores along ``axis``; 0 for classes that 1e30 and more mask."""
    lowest = torch.finfo(torch.float64).min / 4
    there = counting(scores)
    return torch.where(there, torch.where(there, scores, lowest).softmax(axis), 0.0)


def counting(wanted: Tensor) -> Tensor:
    """Return which elements of a float output count: those that are finite and no mask."""
    return wanted.abs() < MASKED  # False for NaN


def divergence(moves: Tensor, p: Tensor, axis: int = -1) -> Tensor:
    """Return the Kullback-Leibler divergence of softmaxes for each row of scores, float64.

    It is ``log E[exp(d)]`` for moves d with mean 0 under p: so nothing cancels that is large.

    Args:
        moves: how far scores have moved; 0 where ``p`` has masked classes.
        p: probabilities of the scores that were moved.
        axis: that of the classes.
    """
    centred = moves - (p * moves).sum(axis, keepdim=True)
    found = torch.log1p((p * torch.expm1(centred)).sum(axis))
    # Rounding can make a vanishing one negative; infinite moves make NaN.
    return found.clamp(min=0.0).nan_to_num(nan=math.inf, posinf=math.inf)


def check_measure(graph: OnnxGraph, measure: str | Mapping[str, str]) -> dict[str, str]:
    """Return output name -> measure.

    Raises:
        ConfigError: there is no such output or measure.
    """
    names = [value.name or "" for value in graph.outputs]
    if isinstance(measure, str):
        return dict.fromkeys(names, measure)
    if unknown := sorted(set(measure) - set(names)):
        raise ConfigError(f"measure: no outputs {unknown} in the graph; it has {names}")
    for name, how in measure.items():
        if how not in ("kl", "error"):
            raise ConfigError(f"output {name!r}: no measure {how!r}; choose 'kl' or 'error'")
    if not measure:
        raise ConfigError(f"measure: name one output or more of {names}")
    return dict(measure)


def outputs_of_graph(
    graph: OnnxGraph,
    wanted: Sequence[Any],
    measure: str | Mapping[str, str],
) -> list[Output]:
    """Return how the outputs of ``graph`` are compared.

    Args:
        graph: of the model.
        wanted: what the float model makes of a batch.
        measure: "kl" for the outputs that are scores of classes, as far as the graph tells: those
            of a Softmax; of a MatMul or Gemm; of a convolution to five or more channels, perhaps
            resized. Others then get "error". "error" and "sqnr" mean "error" for all. By output
            name, "kl" or "error", for those that count.

    Raises:
        ConfigError: there is no such output or measure, or nothing that can be compared.
    """
    names = [value.name or "" for value in graph.outputs]
    asked = check_measure(graph, measure)
    found = []
    for name, how in asked.items():
        index = names.index(name)
        is_sure = isinstance(measure, Mapping)
        output = _output(graph, index, wanted[index], how, is_sure=is_sure)
        if output is not None:
            found.append(output)
    if not found:
        raise ConfigError(f"none of the outputs {sorted(asked)} is a tensor; give a metric instead")
    return found


def _output(graph: OnnxGraph, index: int, wanted: Any, how: str, *, is_sure: bool) -> Output | None:
    name = graph.outputs[index].name or ""
    if not isinstance(wanted, Tensor):
        if is_sure:
            raise ConfigError(f"output {name!r} is no tensor; give a metric instead")
        return None
    if not wanted.is_floating_point():
        return Output(name, index, "differing")
    if how != "kl":
        return Output(name, index, "error")
    axis = _class_axis(graph.outputs[index], wanted)
    softmax = _softmax(graph, name, index)
    if softmax is not None:
        return softmax
    if axis is None and not is_sure:
        return Output(name, index, "error")
    if axis is None:
        axis = 1 if wanted.dim() > 3 else -1
    return Output(name, index, "kl", axis)


def _softmax(graph: OnnxGraph, name: str, index: int) -> Output | None:
    node = graph.outputs[index].producer()
    if node is None or node.domain or node.op_type not in ("Softmax", "LogSoftmax"):
        return None
    is_early = graph.opset < ONE_AXIS
    axis = int(attributes_of(node).get("axis", 1 if is_early else -1))
    is_probability = node.op_type == "Softmax"
    return Output(name, index, "kl", axis, is_probability, is_flat=is_early)


def _class_axis(output: ir.Value, wanted: Tensor) -> int | None:
    """Return the axis of the classes where the layer that made ``output`` tells, else None."""
    if wanted.dim() in (2, 3) and wanted.shape[-1] > 1:
        node = _maker(output, MOVES if wanted.dim() == 2 else ("Identity", "Dropout"))
        return -1 if node is not None and node.op_type in LINEAR else None
    if wanted.dim() > 3 and wanted.shape[1] >= FEWEST:
        node = _maker(output, ("Identity", "Resize", "Upsample"))
        return 1 if node is not None and node.op_type in CONVOLUTIONS else None
    return None


def _maker(value: ir.Value, moves: Sequence[str]) -> ir.Node | None:
    """Return the node whose values ``value`` holds, perhaps moved, or with a bias added."""
    node = value.producer()
    if node is None or not node.inputs or node.inputs[0] is None:
        return node
    if node.op_type in moves:
        return _maker(node.inputs[0], moves)
    if node.op_type == "Add":
        computed = [v for v in node.inputs if v is not None and not v.is_initializer()]
        return _maker(computed[0], moves) if len(computed) == 1 else node
    return node


def in_decibel(error: float) -> float:
    """Return a relative squared error as noise over signal in dB, minus infinity for none."""
    return 10 * math.log10(error) if error > 0 else -math.inf


MEASURES = get_args(Measure)
