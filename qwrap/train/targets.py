"""Which outputs of a model are compared with the teacher's, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from qwrap.errors import ConfigError
from qwrap.graph.index import OnnxGraph
from qwrap.model.attributes import attributes_of
from qwrap.train.losses import cosine_distance, divergence, normalized_error

Measure = Literal["mse", "kl", "cosine"] | Callable[[Tensor, Tensor], Tensor]
"""How an output is compared: by name, or a function of the student's and the teacher's tensor."""

Compare = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Student, teacher, mask -> loss."""

ONE_AXIS = 13  # from this opset on Softmax works along one axis, before along all that follow


@dataclass(frozen=True, slots=True)
class Target:
    """An output that is compared.

    Attributes:
        name: of the output.
        index: among the graph's.
        compare: what returns the loss.
        watched: the tensor that is compared in its place, None for itself.
    """

    name: str
    index: int
    compare: Compare
    watched: str | None = None


def targets_of(graph: OnnxGraph, measures: Measure | Mapping[str, Measure]) -> list[Target]:
    """Return what is compared of the outputs of ``graph``.

    Args:
        graph: of the student.
        measures: for all outputs, or by name for those that count.

    Raises:
        ConfigError: there is no such output or measure.
    """
    names = [value.name or "" for value in graph.outputs]
    given = measures if isinstance(measures, Mapping) else dict.fromkeys(names, measures)
    if unknown := sorted(set(given) - set(names)):
        raise ConfigError(f"no outputs {unknown} in the graph; it has {names}")
    return [_target(graph, name, names.index(name), measure) for name, measure in given.items()]


def are_floats(*values: object) -> bool:
    """Whether all are float tensors, which can be compared."""
    return all(isinstance(x, Tensor) and x.is_floating_point() for x in values)


def _target(graph: OnnxGraph, name: str, index: int, measure: Measure) -> Target:
    if callable(measure):
        return Target(name, index, partial(_called, measure))
    if measure not in _NAMED:
        raise ConfigError(
            f"output {name!r}: no loss {measure!r}; choose one of {', '.join(_NAMED)}, or give a "
            "function of student and teacher"
        )
    behind_softmax = _logits(graph, name, index) if measure == "kl" else None
    return behind_softmax or Target(name, index, _NAMED[measure])


def _logits(graph: OnnxGraph, name: str, index: int) -> Target | None:
    """Return what compares the logits of an output that holds probabilities, None for others."""
    node = graph.outputs[index].producer()
    if node is None or node.domain or node.op_type not in ("Softmax", "LogSoftmax"):
        return None
    logits, is_early = node.inputs[0], graph.opset < ONE_AXIS
    if logits is None or logits.producer() is None:
        return None
    axis = attributes_of(node).get("axis", 1 if is_early else -1)
    compare = _flattened_divergence if is_early else _divergence
    return Target(name, index, partial(compare, axis=axis), graph.key(logits))


def _divergence(
    student: Tensor, teacher: Tensor, mask: Tensor | None, axis: int | None = None
) -> Tensor:
    if axis is None:
        axis = 1 if student.dim() > 3 else -1
    return divergence(student, teacher, _of_rows(mask, student), axis=axis)


def _flattened_divergence(
    student: Tensor, teacher: Tensor, mask: Tensor | None, axis: int
) -> Tensor:
    rows = None if mask is None or axis % student.dim() < mask.dim() else mask
    return divergence(student.flatten(axis), teacher.flatten(axis), rows)


def _cosine(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    return cosine_distance(student, teacher, _of_rows(mask, student))


def _of_rows(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the mask if the last axis, which a loss reduces, is not one of its own."""
    return None if mask is None or mask.dim() == x.dim() else mask


_NAMED: dict[str, Compare] = {"mse": normalized_error, "kl": _divergence, "cosine": _cosine}


def _called(
    function: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Return what the user's function makes of the positions that count."""
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    return function(student, teacher)
