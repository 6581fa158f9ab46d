"""Recurrent layers.

ONNX stacks the gates of an LSTM as input, output, forget, cell; torch as input, forget, cell,
output. Where the attributes allow it torch's fused kernel runs, else a loop over time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.errors import UnsupportedOpError
from qwrap.ops.registry import op

Activation = Callable[[Tensor], Tensor]

# Name -> function of (x, alpha, beta), default alpha, default beta; None: takes no such number.
ACTIVATIONS: dict[
    str, tuple[Callable[[Tensor, float, float], Tensor], float | None, float | None]
] = {
    "relu": (lambda x, _a, _b: torch.relu(x), None, None),
    "tanh": (lambda x, _a, _b: torch.tanh(x), None, None),
    "sigmoid": (lambda x, _a, _b: torch.sigmoid(x), None, None),
    "softsign": (lambda x, _a, _b: F.softsign(x), None, None),
    "softplus": (lambda x, _a, _b: F.softplus(x), None, None),
    "affine": (lambda x, a, b: a * x + b, 1.0, 0.0),
    "leakyrelu": (lambda x, a, _b: F.leaky_relu(x, a), 0.01, None),
    "thresholdedrelu": (lambda x, a, _b: torch.where(x > a, x, 0.0), 1.0, None),
    "elu": (lambda x, a, _b: F.elu(x, a), 1.0, None),
    "hardsigmoid": (lambda x, a, b: (a * x + b).clamp(0.0, 1.0), 0.2, 0.5),
    "scaledtanh": (lambda x, a, b: a * torch.tanh(b * x), 1.0, 1.0),
}


def _activations(
    names: Sequence[str], alphas: Sequence[float] | None, betas: Sequence[float] | None
) -> list[Activation]:
    """Return functions; each that takes a number takes the next of ``alphas`` or ``betas``."""
    next_alpha, next_beta = iter(alphas or ()), iter(betas or ())
    functions: list[Activation] = []
    for name in names:
        if name.lower() not in ACTIVATIONS:
            raise UnsupportedOpError(f"recurrent layer with activation {name!r}")
        function, alpha, beta = ACTIVATIONS[name.lower()]
        a = _number(alpha, next_alpha)
        b = _number(beta, next_beta)
        functions.append(partial(_apply, function, a, b))
    return functions


def _apply(
    function: Callable[[Tensor, float, float], Tensor], alpha: float, beta: float, x: Tensor
) -> Tensor:
    return function(x, alpha, beta)


def _number(default: float | None, given: Iterator[float]) -> float:
    return 0.0 if default is None else next(given, default)


@dataclass(frozen=True, slots=True)
class LstmCell:
    """One direction of an LSTM as ONNX describes it.

    Attributes:
        input_weight: ``W``, ``[4 * hidden, input]``.
        hidden_weight: ``R``, ``[4 * hidden, hidden]``.
        bias: input and recurrent bias added up, ``[4 * hidden]``, or None.
        peephole: ``P``, weights of the cell state on input, output and forget gate, or None.
        activations: of the gates, of the new cell content, of the cell state.
        clip: bound on what goes into the activations, or None.
        input_forget: the forget gate is one minus the input gate.
    """

    input_weight: Tensor
    hidden_weight: Tensor
    bias: Tensor | None
    peephole: Tensor | None
    activations: Sequence[Activation]
    clip: float | None
    input_forget: bool

    def step(self, gates: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next hidden and cell state; ``gates`` holds what the input adds."""
        gate, content, state = self.activations
        i, o, f, g = (gates + F.linear(h, self.hidden_weight)).chunk(4, -1)
        p_i, p_o, p_f = (None,) * 3 if self.peephole is None else self.peephole.chunk(3)
        i = gate(self._clipped(i if p_i is None else i + p_i * c))
        f = 1 - i if self.input_forget else gate(self._clipped(f if p_f is None else f + p_f * c))
        c = f * c + i * content(self._clipped(g))
        o = gate(self._clipped(o if p_o is None else o + p_o * c))
        return o * state(c), c

    def _clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def run(
        self, X: Tensor, h: Tensor, c: Tensor, lengths: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return all hidden states ``[seq, batch, hidden]`` and the last hidden and cell state.

        Past the end of a sequence outputs are zero and the state stands still; backwards this
        starts each sequence at its own last element.
        """
        gates = F.linear(X, self.input_weight, self.bias)
        outputs = [h] * X.shape[0]
        for t in reversed(range(X.shape[0])) if reverse else range(X.shape[0]):
            new_h, new_c = self.step(gates[t], h, c)
            if lengths is None:
                outputs[t] = h = new_h
                c = new_c
            else:
                runs = (t < lengths).unsqueeze(-1)
                h, c = torch.where(runs, new_h, h), torch.where(runs, new_c, c)
                outputs[t] = torch.where(runs, h, 0.0)
        return torch.stack(outputs) if outputs else X.new_zeros(0, *h.shape), h, c


def _fused_lstm(
    X: Tensor, W: Tensor, R: Tensor, B: Tensor | None, h: Tensor, c: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run torch's kernel over all directions; returns Y ``[seq, directions, batch, hidden]``."""
    parameters = []
    for d in range(W.shape[0]):
        own = [W[d], R[d]] if B is None else [W[d], R[d], *B[d].chunk(2)]
        for tensor in own:
            i, o, f, g = tensor.chunk(4)
            parameters.append(torch.cat((i, f, g, o)))
    two = W.shape[0] == 2
    ordered = X.flip(0) if reverse else X
    y, h, c = torch.lstm(ordered, (h, c), parameters, B is not None, 1, 0.0, False, two, False)
    y = y.flip(0) if reverse else y
    return y.reshape(*y.shape[:2], W.shape[0], -1).transpose(1, 2), h, c


@op("LSTM", since=(1, 7, 14, 22), ignored=("hidden_size", "output_sequence"))
def lstm(
    X: Tensor,
    W: Tensor,
    R: Tensor,
    B: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    P: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an LSTM; return all hidden states, the last hidden and the last cell states.

    Args:
        X: ``[seq, batch, input]``; with ``layout=1`` batch comes first, in states and outputs too.
        W: ``[directions, 4 * hidden, input]``.
        R: ``[directions, 4 * hidden, hidden]``.
        B: ``[directions, 8 * hidden]``.
        sequence_lens: ``[batch]``.
        initial_h: ``[directions, batch, hidden]``.
        initial_c: as ``initial_h``.
        P: ``[directions, 3 * hidden]``.
    """
    if layout:
        initial_h = None if initial_h is None else initial_h.transpose(0, 1)
        initial_c = None if initial_c is None else initial_c.transpose(0, 1)
    sequence = X.transpose(0, 1) if layout else X
    zeros = sequence.new_zeros(W.shape[0], sequence.shape[1], R.shape[-1])
    h = zeros if initial_h is None else initial_h.contiguous()
    c = zeros if initial_c is None else initial_c.contiguous()
    names = [name.lower() for name in activations or ["sigmoid", "tanh", "tanh"] * W.shape[0]]
    plain = names == ["sigmoid", "tanh", "tanh"] * W.shape[0] and not clip and not input_forget
    if plain and sequence_lens is None and P is None:
        y, h, c = _fused_lstm(sequence, W, R, B, h, c, direction == "reverse")
    else:
        functions = _activations(names, activation_alpha, activation_beta)
        runs = []
        for d in range(W.shape[0]):
            cell = LstmCell(
                input_weight=W[d],
                hidden_weight=R[d],
                bias=None if B is None else B[d].reshape(2, -1).sum(0),
                peephole=None if P is None else P[d],
                activations=functions[3 * d : 3 * d + 3],
                clip=clip or None,
                input_forget=bool(input_forget),
            )
            backwards = direction == "reverse" or d == 1
            runs.append(cell.run(sequence, h[d], c[d], sequence_lens, backwards))
        y = torch.stack([run[0] for run in runs], 1)
        h, c = (torch.stack([run[i] for run in runs]) for i in (1, 2))
    if layout:
        return y.permute(2, 0, 1, 3), h.transpose(0, 1), c.transpose(0, 1)
    return y, h, c
