"""See what a model computes on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qwrap.model.batches import iterate
from qwrap.model.wrapped import WrappedModel


def observe(
    model: WrappedModel,
    batches: Iterable[Any],
    watchers: Mapping[str, Callable[[Tensor], object]],
    *,
    finite: bool = True,
) -> Iterator[Any]:
    """Run ``batches`` through ``model`` and show the values of some tensors to ``watchers``.

    A tensor is shown when it has been computed, and forgotten when nothing needs it any more, so
    memory holds what one forward needs. One in the body of a loop is shown in every iteration.
    Gradients are not tracked; a prepared model runs as it does when it is called. For example::

        for _ in qwrap.observe(model, batches, {"/conv1/Conv_output_0": moments.add}):
            pass

    Args:
        model: a module from ``load``.
        batches: as for ``calibrate``; the next one is read when the one before has run.
        watchers: key of a tensor, see ``model.graph.values``, -> called with each of its values,
            which it must not change.
        finite: refuse inputs that hold NaN or infinity.

    Yields:
        What the model returned, after each batch.

    Raises:
        InputError: a batch lacks an input, or has another rank or type.
        ModelError: there is no tensor with such a key.
    """
    with model.watching(watchers):
        for inputs in iterate(batches, model, may_be_empty=True, finite=finite):
            with torch.no_grad():
                result = model(**inputs)
            yield result
