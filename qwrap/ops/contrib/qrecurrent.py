"""An LSTM with quantized weights, whose inputs are quantized as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qwrap.ops.contrib.domain import microsoft
from qwrap.ops.contrib.qlinear import dequantized
from qwrap.ops.limits import at_least, one_of
from qwrap.ops.qlinear import dynamic_quantize_linear
from qwrap.ops.recurrent.activations import activation_functions, for_directions
from qwrap.ops.recurrent.cells import Clip, LstmCell, unroll
from qwrap.ops.recurrent.layers import BACKWARDS, check


def _rounded(x: Tensor) -> Tensor:
    """Return ``x`` on a grid of 256 steps over its own range; gradients pass straight through."""
    codes, scale, zero_point = dynamic_quantize_linear(x)
    return dequantized(codes, scale, zero_point) + (x - x.detach())


def _real_weight(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return real weights; a scale per direction, or per direction and column."""
    shape = (codes.shape[0], 1, -1)
    return (codes.float() - zero_point.reshape(shape).float()) * scale.reshape(shape)


@dataclass(frozen=True, slots=True)
class _Quantizing:
    """A cell that rounds the hidden state of each direction before it is multiplied."""

    cell: LstmCell

    def __call__(self, gates: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.cell(gates, torch.stack([_rounded(part) for part in h]), c)


@microsoft(
    "DynamicQuantizeLSTM",
    ignored=("hidden_size",),
    allowed={"clip": at_least(0), "direction": one_of(*BACKWARDS)},
    check=partial(check, count=3),
)
def dynamic_quantize_lstm(
    X: Tensor,
    W: Tensor,
    R: Tensor,
    B: Tensor | None,
    sequence_lens: Tensor | None,
    initial_h: Tensor | None,
    initial_c: Tensor | None,
    P: Tensor | None,
    W_scale: Tensor,
    W_zero_point: Tensor,
    R_scale: Tensor,
    R_zero_point: Tensor,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    input_forget: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an LSTM; return all hidden states, the last hidden and the last cell states.

    The whole of ``X`` has one scale, and so has each hidden state of all the batch.

    Args:
        X: ``[seq, batch, input]``.
        W: codes ``[directions, input, 4 * hidden]``.
        R: codes ``[directions, hidden, 4 * hidden]``.
        B: ``[directions, 8 * hidden]``.
        sequence_lens: ``[batch]``.
        initial_h: ``[directions, batch, hidden]``.
        initial_c: as ``initial_h``.
        P: ``[directions, 3 * hidden]``.
        W_scale: ``[directions]`` or ``[directions, 4 * hidden]``, as all that follow.
        W_zero_point: see ``W_scale``.
        R_scale: see ``W_scale``.
        R_zero_point: see ``W_scale``.
    """
    backwards = BACKWARDS[direction]
    names = [name.lower() for name in activations or ["sigmoid", "tanh", "tanh"] * len(backwards)]
    functions = activation_functions(names, activation_alpha, activation_beta)
    cell = LstmCell(
        _real_weight(R, R_scale, R_zero_point),
        None if P is None else P[:, None],
        for_directions(functions, 3),
        Clip(clip or None),
        bool(input_forget),
    )
    zeros = X.new_zeros(R.shape[0], X.shape[1], R.shape[1])
    states = [zeros if state is None else state for state in (initial_h, initial_c)]
    weight = _real_weight(W, W_scale, W_zero_point).mT
    bias = None if B is None else torch.add(*B.chunk(2, -1))
    y, h, c = unroll(_Quantizing(cell), _rounded(X), weight, bias, states, backwards, sequence_lens)
    return y, h, c
