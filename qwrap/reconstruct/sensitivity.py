"""How much the outputs of the float model change with each element of an activation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qwrap.model.wrapped import WrappedModel
from qwrap.reconstruct.samples import Samples

TOGETHER = 8  # samples in one backward pass through the whole model
MOST = 128  # samples; the mean changes little with more


def sensitivities(
    model: WrappedModel,
    samples: Samples,
    ids: Sequence[int],
    keys: Iterable[str],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return for each activation a weight of every element, with mean 1, to broadcast over samples.

    It is the squared gradient of the outputs, each relative to its size and multiplied by random
    signs, which is on average the diagonal of their squared Jacobian: the Fisher information if
    they have Gaussian noise. Where samples differ in size along an axis, it is averaged over that.

    Args:
        model: the float model.
        samples: graph inputs.
        ids: which samples to use.
        keys: activations; those without gradient are missing in the result.
        generator: draws the signs.

    Source: Li et al., arXiv:2102.05426, equation 10, with the model's own outputs for labels.
    """
    asked = list(keys)
    sums: dict[str, dict[tuple[int, ...], Tensor]] = defaultdict(dict)
    for group in samples.groups(ids[:MOST], {}, TOGETHER):
        found = _gradients(model, samples.batch(group), asked, generator)
        for key, gradient in found.items():
            axis = samples.axis(key)
            squared = gradient.square()
            total = squared if axis is None else squared.sum(axis, keepdim=True)
            shape = tuple(total.shape)
            sums[key][shape] = sums[key][shape] + total if shape in sums[key] else total
    return {key: _joined([*totals.values()]) for key, totals in sums.items()}


def _gradients(
    model: WrappedModel, inputs: Mapping[str, Any], keys: Sequence[str], generator: torch.Generator
) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def watch(key: str) -> Callable[[Tensor], object]:
        return lambda x: seen.__setitem__(key, x)

    with torch.enable_grad(), model.watching({key: watch(key) for key in keys}):
        made = model(**inputs)
        outputs = made if isinstance(made, tuple) else (made,)
        total = sum(_projected(output, generator) for output in outputs)
    watched = {k: x for k, x in seen.items() if isinstance(x, Tensor) and x.requires_grad}
    if not watched or not isinstance(total, Tensor) or not total.requires_grad:
        return {}
    found = torch.autograd.grad(total, [*watched.values()], allow_unused=True)
    return {key: g for key, g in zip(watched, found, strict=True) if g is not None}


def _projected(output: Any, generator: torch.Generator) -> Tensor | float:
    """Return the sum of an output's elements, relative to their size, with random signs."""
    if not isinstance(output, Tensor) or not output.requires_grad or not output.numel():
        return 0.0
    finite = torch.where(output.isfinite(), output, 0)
    size = finite.detach().square().mean().sqrt()
    if not size > 0:
        return 0.0
    signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
    return (finite * signs).sum() / size


def _joined(totals: Sequence[Tensor]) -> Tensor:
    """Return the mean over samples of all sizes, scaled to mean 1."""
    first = totals[0]
    for axis in range(first.dim()):
        if len({total.shape[axis] for total in totals}) > 1:
            totals = [total.mean(axis, keepdim=True) for total in totals]
    total = torch.stack(list(totals)).sum(0)
    return total / total.mean().clamp(min=torch.finfo(total.dtype).tiny)
