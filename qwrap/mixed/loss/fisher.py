"""Sensitivity from gradients: all parts and choices of types from one backward pass a batch.

Rounding moves each tensor ``x_i`` by ``d_i``, and the outputs ``z`` by ``dz = sum_i J_i d_i`` to
first order. The loss of that has no first-order term, for it is least at ``dz = 0``; to second
order it is ``dz' H dz / 2``, where H is the loss's Hessian in the outputs. For a divergence of
softmaxes that is the Fisher information of the outputs, ``diag(p) - p p'`` for each row; for a
squared error it is constant.

With ``H = L L'`` and a random vector v of signs, ``E[v v'] = 1``, so that the loss is half of
``E[(v' L' dz)^2]`` (Hutchinson). One backward pass of ``v' L' z`` gives ``g_i = J_i' L v`` for
every tensor at once, and the loss of any set of them is half the mean square of
``sum_i <g_i, d_i>``. Drawing labels from the model's own distribution, as is usual for Fisher
information, is the same with other vectors v; signs have the smaller variance. Products of
different samples have mean 0, so that samples need not be told apart; where they can be, by the
first axis, they are, and the variance is smaller again. A weight's ``<g_i, d_i>`` is taken where
its operator puts it out: the gradient there times what the operator makes of the rounded weight,
less what it makes of the other.

What this leaves out: rounding errors are those of tensors of the float model, not of ones that are
off already; where a few samples decide, that is another draw of the same noise. And masks of Relus
stay as they are: large errors, as of weights of 4 bits, are only told apart roughly.

Sources: Hutchinson, Communications in Statistics 19(2), 1990; Martens, arXiv:1412.1193, sections 5
and 9, for Fisher information as Hessian in the outputs; Dong et al. (HAWQ), arXiv:1905.03696, and
Li et al. (BRECQ), arXiv:2102.05426, for such sensitivities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qwrap.errors import ConfigError, InputError
from qwrap.mixed.choices import Choice
from qwrap.mixed.loss.carriers import Carrier, NodeSwitch, Place
from qwrap.mixed.loss.measured import outputs_on
from qwrap.mixed.loss.outputs import Output, counting, probabilities
from qwrap.mixed.loss.probes import Products, probes_of
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.samples import Samples
from qwrap.quant.prepare import device_of

Own = Mapping[str, Mapping[Choice, frozenset[Place]]]
"""Name of a part -> choice -> where the stubs are that quantize it."""


def fisher_losses(
    carriers: Sequence[Carrier],
    own: Own,
    outputs: Sequence[Output],
    samples: Samples,
    *,
    projections: int,
    seed: int,
    progress: bool,
) -> dict[tuple[str, Choice], float]:
    """Return (name, choice) -> estimated loss.

    Args:
        carriers: calibrated copies, one for each choice; gradients of parameters are turned off.
        own: what is to be estimated.
        outputs: how they are compared; those that are no floats count as unchanged.
        samples: to run.
        projections: vectors v for each sample.
        seed: of those.
        progress: show a bar on a terminal.

    Raises:
        ConfigError: no output is a float tensor, or a choice is one of half precision.
        InputError: a gradient is NaN.
    """
    for carrier in carriers:
        if any(isinstance(place, NodeSwitch) for place in carrier.points):
            raise ConfigError(f"choice {carrier.choice}: method='fisher' knows no half precision")
    found: dict[tuple[str, Choice], float] = {}
    for model, group in _by_graph(carriers):
        asked = {carrier.choice for carrier in group}
        products = Products()
        program = probes_of(model, group, own, products)
        directions = _Directions(model, outputs, samples, seed)
        total = len(samples.batches) * projections
        off = None if progress else True
        bar = tqdm(desc="gradients", total=total, unit="pass", disable=off)
        with closing(bar), model.running(program), _gradients_of_probes_only(model):
            for inputs in samples.on(device_of(model)):
                products.begin(directions.rows(inputs), projections)
                results = outputs_on(model, inputs)
                for left in reversed(range(projections)):
                    along = directions.along(results)
                    if along.requires_grad:  # else nothing of it depends on what is rounded
                        torch.autograd.backward(along, retain_graph=left > 0)
                    products.close()
                    bar.update()
        for name, points in own.items():
            for choice in points.keys() & asked:
                loss = products.total(name, choice) / projections
                if math.isnan(loss):
                    raise InputError(f"group {name!r} in {choice}: the gradient is NaN")
                found[name, choice] = loss
    return found


def _by_graph(carriers: Sequence[Carrier]) -> Iterator[tuple[WrappedModel, list[Carrier]]]:
    """Yield models and the carriers whose stubs all have a place in them; most often one model."""
    left = list(carriers)
    while left:
        model = left[0].model
        places = model.layout.points.keys()
        fitting = [carrier for carrier in left if carrier.points <= places]
        yield model, fitting
        left = [carrier for carrier in left if carrier not in fitting]


@contextmanager
def _gradients_of_probes_only(model: WrappedModel) -> Iterator[None]:
    """Let no parameter have a gradient inside the ``with`` block."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


class _Directions:
    """Makes of outputs the number ``v' L' z`` whose gradient is propagated.

    Args:
        model: computes in float.
        outputs: how they are compared.
        samples: all that will be run: it says what errors are relative to.
        seed: of the signs.
    """

    @torch.no_grad()
    def __init__(
        self, model: WrappedModel, outputs: Sequence[Output], samples: Samples, seed: int
    ) -> None:
        self._outputs = [output for output in outputs if output.kind != "differing"]
        if not self._outputs:
            raise ConfigError(
                "no output is a float tensor, so there is no gradient; use 'measured'"
            )
        self._generator = torch.Generator().manual_seed(seed)
        self._scales = [0.0] * len(self._outputs)
        for inputs in samples.on(device_of(model)):
            results = outputs_on(model, inputs)
            for i, output in enumerate(self._outputs):
                self._scales[i] += output.reference(results[output.index]).scale
        self._count = sum(scale > 0 for scale in self._scales) + len(outputs) - len(self._outputs)

    def rows(self, inputs: Mapping[str, Any]) -> int:
        """Return how many samples a batch may hold: the common first axis of its inputs, or 1."""
        sizes = {len(x) if x.dim() else 1 for x in inputs.values() if isinstance(x, Tensor)}
        return sizes.pop() if len(sizes) == 1 else 1

    def along(self, results: Sequence[Any]) -> Tensor:
        """Return the outputs along new random directions, float64 ``[]``."""
        total = torch.zeros((), dtype=torch.float64)
        for output, scale in zip(self._outputs, self._scales, strict=True):
            if scale > 0:
                found = _along(output, results[output.index], self._generator)
                total = total.to(found.device) + found / math.sqrt(scale * self._count)
        return total


def _along(output: Output, result: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``<L v, z>``, for which the mean square of its change is the distance."""
    if output.kind == "error":
        there = counting(result.detach())
        z = torch.where(there, result, 0.0).double()
        return (z * _signs(z, generator)).sum()
    z, axis = output.scores(result), output.class_axis
    there, p = counting(z.detach()), probabilities(z.detach(), axis)
    root, signs = p.sqrt(), _signs(z, generator)
    direction = root * signs - p * (root * signs).sum(axis, keepdim=True)
    return (torch.where(there, z, 0.0) * direction).sum() * math.sqrt(0.5)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return signs.to(like.device, like.dtype) * 2 - 1
