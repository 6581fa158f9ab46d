"""The activation functions that a recurrent layer can name.

Source: ONNX RNN, attributes ``activations``, ``activation_alpha`` and ``activation_beta``; names
count in any case. Numbers left out take the defaults of the operator of that name where onnxruntime
does so, else 0, as there: ONNX names none for Affine and ScaledTanh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.errors import UnsupportedOpError

Activation = Callable[[Tensor], Tensor]
Numbered = Callable[[Tensor, float, float], Tensor]


def _affine(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * x + beta


def _leaky_relu(x: Tensor, alpha: float, _: float) -> Tensor:
    return F.leaky_relu(x, alpha)


def _thresholded_relu(x: Tensor, alpha: float, _: float) -> Tensor:
    return torch.where(x > alpha, x, 0.0)


def _elu(x: Tensor, alpha: float, _: float) -> Tensor:
    return F.elu(x, alpha)


def _hard_sigmoid(x: Tensor, alpha: float, beta: float) -> Tensor:
    return (alpha * x + beta).clamp(0.0, 1.0)


def _scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * torch.tanh(beta * x)


PLAIN: dict[str, Activation] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softsign": F.softsign,
    "softplus": F.softplus,
}
# Name -> function, default alpha, default beta; None: it takes no such number.
NUMBERED: dict[str, tuple[Numbered, float | None, float | None]] = {
    "affine": (_affine, 0.0, 0.0),
    "leakyrelu": (_leaky_relu, 0.01, None),
    "thresholdedrelu": (_thresholded_relu, 0.0, None),
    "elu": (_elu, 1.0, None),
    "hardsigmoid": (_hard_sigmoid, 0.2, 0.5),
    "scaledtanh": (_scaled_tanh, 0.0, 0.0),
}


def activation_functions(
    names: Sequence[str], alphas: Sequence[float] | None, betas: Sequence[float] | None
) -> list[Activation]:
    """Return a function for each name.

    Args:
        names: in lower case.
        alphas: each function that takes an alpha takes the next of these, or its default.
        betas: likewise.

    Raises:
        UnsupportedOpError: ONNX knows no such activation.
    """
    next_alpha, next_beta = iter(alphas or ()), iter(betas or ())
    functions: list[Activation] = []
    for name in names:
        if name in PLAIN:
            functions.append(PLAIN[name])
            continue
        if name not in NUMBERED:
            known = sorted((*PLAIN, *NUMBERED))
            raise UnsupportedOpError(f"activation {name!r} is none of {known}")
        function, alpha, beta = NUMBERED[name]
        a = 0.0 if alpha is None else next(next_alpha, alpha)
        b = 0.0 if beta is None else next(next_beta, beta)
        functions.append(partial(_numbered, function, a, b))
    return functions


def _numbered(function: Numbered, alpha: float, beta: float, x: Tensor) -> Tensor:
    return function(x, alpha, beta)


def for_directions(functions: Sequence[Activation], count: int) -> list[Activation]:
    """Return functions of ``[directions, …]`` from those of one direction after the other.

    Args:
        functions: all of the first direction, then all of the second.
        count: how many each direction has.
    """
    if len(functions) == count:
        return list(functions)
    pairs = zip(functions[:count], functions[count:], strict=True)
    return [first if first is second else partial(_each, first, second) for first, second in pairs]


def _each(first: Activation, second: Activation, x: Tensor) -> Tensor:
    return torch.stack((first(x[0]), second(x[1])))
