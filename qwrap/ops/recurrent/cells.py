"""One time step of each recurrent layer, for what the fused kernels do not know, and the loop.

All directions advance together: states are ``[directions, batch, hidden]``, and a backward
direction reads its sequences reversed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.ops.recurrent.activations import Activation
from qwrap.ops.recurrent.time import reverse, valid, zero_empty, zero_padding

Step = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Clip:
    """Bounds what goes into the activations to ``[-limit, limit]``; None: no bound."""

    limit: float | None

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x`` within the bound."""
        return x if self.limit is None else x.clamp(-self.limit, self.limit)


@dataclass(frozen=True, slots=True)
class RnnCell:
    """A plain recurrent cell.

    Attributes:
        hidden_weight: ``R`` transposed, ``[directions, hidden, hidden]``.
        activation: of the new state.
        clip: see ``Clip``.
    """

    hidden_weight: Tensor
    activation: Activation
    clip: Clip

    def __call__(self, gates: Tensor, h: Tensor) -> tuple[Tensor]:
        """Return the next hidden state; ``gates`` holds what input and biases add."""
        return (self.activation(self.clip(torch.baddbmm(gates, h, self.hidden_weight))),)


@dataclass(frozen=True, slots=True)
class GruCell:
    """A gated recurrent unit, gates in ONNX's order: update, reset, hidden.

    Attributes:
        hidden_weight: ``R`` transposed, ``[directions, hidden, 3 * hidden]``.
        hidden_bias: recurrent bias of the hidden gate ``[directions, 1, hidden]`` that the reset
            gate scales too, with ``linear_before_reset``; None if ``gates`` holds it.
        activations: of the gates and of the new content.
        clip: see ``Clip``.
        linear_before_reset: the reset gate scales the product, not the state that goes into it.
    """

    hidden_weight: Tensor
    hidden_bias: Tensor | None
    activations: Sequence[Activation]
    clip: Clip
    linear_before_reset: bool

    def __call__(self, gates: Tensor, h: Tensor) -> tuple[Tensor]:
        """Return the next hidden state; ``gates`` holds what input and biases add."""
        gate, content = self.activations
        size = h.shape[-1]
        to_gates, to_content = torch.split(self.hidden_weight, [2 * size, size], -1)
        zr, new = torch.split(gates, [2 * size, size], -1)
        z, r = gate(self.clip(torch.baddbmm(zr, h, to_gates))).chunk(2, -1)
        if self.linear_before_reset:
            product = torch.bmm(h, to_content)
            product = product if self.hidden_bias is None else product + self.hidden_bias
            new = content(self.clip(new + r * product))
        else:
            new = content(self.clip(torch.baddbmm(new, r * h, to_content)))
        return ((1 - z) * new + z * h,)


@dataclass(frozen=True, slots=True)
class LstmCell:
    """A long short-term memory cell, gates in ONNX's order: input, output, forget, cell.

    Attributes:
        hidden_weight: ``R`` transposed, ``[directions, hidden, 4 * hidden]``.
        peephole: ``P``, ``[directions, 1, 3 * hidden]``, weights of the cell state on input, output
            and forget gate, or None.
        activations: of the gates, of the new cell content, of the cell state.
        clip: see ``Clip``.
        input_forget: the forget gate is one minus the input gate.
    """

    hidden_weight: Tensor
    peephole: Tensor | None
    activations: Sequence[Activation]
    clip: Clip
    input_forget: bool

    def __call__(self, gates: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next hidden and cell state; ``gates`` holds what input and biases add."""
        gate, content, state = self.activations
        i, o, f, g = torch.baddbmm(gates, h, self.hidden_weight).chunk(4, -1)
        p_i, p_o, p_f = (None,) * 3 if self.peephole is None else self.peephole.chunk(3, -1)
        i = gate(self.clip(i if p_i is None else i + p_i * c))
        f = 1 - i if self.input_forget else gate(self.clip(f if p_f is None else f + p_f * c))
        c = f * c + i * content(self.clip(g))
        o = gate(self.clip(o if p_o is None else o + p_o * c))
        return o * state(c), c


def unroll(
    step: Step,
    X: Tensor,
    W: Tensor,
    bias: Tensor | None,
    states: Sequence[Tensor],
    backwards: Sequence[bool],
    lengths: Tensor | None,
) -> tuple[Tensor, ...]:
    """Apply ``step`` at each position; past the end of a sequence its state stands still.

    Args:
        step: maps what the input adds to the gates and the states to the next states.
        X: ``[seq, batch, input]``.
        W: ``[directions, gates * hidden, input]``.
        bias: what adds to the products with ``W``, ``[directions, gates * hidden]``.
        states: each ``[directions, batch, hidden]``, the hidden state first.
        backwards: whether each direction starts at the end.
        lengths: ``[batch]``, or None if all sequences fill ``X``.

    Returns:
        All hidden states ``[seq, directions, batch, hidden]``, then the last states.
    """
    sequence = zero_padding(X, lengths)
    gates = torch.stack(
        [
            F.linear(
                reverse(sequence, lengths) if back else sequence,
                W[d],
                None if bias is None else bias[d],
            )
            for d, back in enumerate(backwards)
        ],
        1,
    )
    running = None if lengths is None else valid(lengths, X.shape[0])
    current, outputs = tuple(states), []
    for t in range(X.shape[0]):
        new = step(gates[t], *current)
        if running is not None:
            pairs = zip(new, current, strict=True)
            new = tuple(torch.where(running[t], after, before) for after, before in pairs)
        current = new
        outputs.append(new[0])
    if not outputs:
        return X.new_zeros(0, *states[0].shape), *current
    y = torch.stack(outputs)
    parts = [zero_padding(part, lengths) for part in y.unbind(1)]
    ordered = [
        reverse(part, lengths) if back else part
        for part, back in zip(parts, backwards, strict=True)
    ]
    return torch.stack(ordered, 1), *(zero_empty(state, lengths) for state in current)
