"""Recurrent layers: torch's fused kernels where attributes allow them, else a loop over time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from qwrap.errors import ModelError
from qwrap.ops.limits import FLAG, POSITIVE, one_of
from qwrap.ops.recurrent import fused
from qwrap.ops.recurrent.activations import activation_functions, for_directions
from qwrap.ops.recurrent.cells import Clip, GruCell, LstmCell, RnnCell, unroll
from qwrap.ops.registry import op

BACKWARDS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
# Opset 1 and 3 say with ``output_sequence`` whether ``Y`` is wanted; who reads it says it too.
IGNORED = ("hidden_size", "output_sequence")
SINCE = (1, 7, 14, 22)
ALLOWED = {"clip": POSITIVE, "direction": one_of(*BACKWARDS), "layout": FLAG}


def check(
    *,
    count: int,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    direction: str = "forward",
    **others: object,
) -> None:
    """Check the activations of a layer that applies ``count`` of them in each direction.

    Raises:
        ModelError: they are too few.
        UnsupportedOpError: ONNX knows no such activation.
    """
    del others
    wanted = count * len(BACKWARDS[direction])
    if activations and len(activations) < wanted:
        raise ModelError(
            f"activations={list(activations)} are {len(activations)}; expected {wanted}"
        )
    names = [name.lower() for name in activations or ()][:wanted]
    activation_functions(names, activation_alpha, activation_beta)


@op("RNN", since=SINCE, ignored=IGNORED, allowed=ALLOWED, check=partial(check, count=1))
def rnn(
    X: Tensor,
    W: Tensor,
    R: Tensor,
    B: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    layout: int = 0,
) -> tuple[Tensor, ...]:
    """Run a plain recurrent layer; return all hidden states and the last hidden states.

    Args:
        X: ``[seq, batch, input]``; with ``layout=1`` batch comes first, in states and outputs too.
        W: ``[directions, hidden, input]``.
        R: ``[directions, hidden, hidden]``.
        B: ``[directions, 2 * hidden]``.
        sequence_lens: ``[batch]``.
        initial_h: ``[directions, batch, hidden]``.
    """
    backwards = _backwards(direction, W)
    sequence = X.transpose(0, 1) if layout else X
    states = (_state(initial_h, sequence, R, layout),)
    names = _names(activations, ("tanh",), len(backwards))
    kernels = {"tanh": torch.rnn_tanh, "relu": torch.rnn_relu}
    if clip is None and len(set(names)) == 1 and names[0] in kernels and sequence.shape[0] > 0:
        parameters = fused.weights(W, R, B, fused.RNN_GATES)
        run = (kernels[names[0]], parameters, sequence, states, backwards)
        if sequence_lens is None:
            return _outputs(layout, *fused.run(*run))
        return _outputs(layout, *fused.run_masked(*run, sequence_lens))
    (activation,) = for_directions(
        activation_functions(names, activation_alpha, activation_beta), 1
    )
    cell = RnnCell(R.mT, activation, Clip(clip))
    return _outputs(layout, *unroll(cell, sequence, W, _sum(B), states, backwards, sequence_lens))


@op("GRU", since=(3, *SINCE), ignored=IGNORED, allowed=ALLOWED, check=partial(check, count=2))
def gru(
    X: Tensor,
    W: Tensor,
    R: Tensor,
    B: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    layout: int = 0,
    linear_before_reset: int = 0,
) -> tuple[Tensor, ...]:
    """Run a gated recurrent unit; return all hidden states and the last hidden states.

    Args:
        X: ``[seq, batch, input]``; with ``layout=1`` batch comes first, in states and outputs too.
        W: ``[directions, 3 * hidden, input]``.
        R: ``[directions, 3 * hidden, hidden]``.
        B: ``[directions, 6 * hidden]``.
        sequence_lens: ``[batch]``.
        initial_h: ``[directions, batch, hidden]``.
    """
    backwards = _backwards(direction, W)
    sequence = X.transpose(0, 1) if layout else X
    states = (_state(initial_h, sequence, R, layout),)
    default = ("sigmoid", "tanh")
    names = _names(activations, default, len(backwards))
    plain = clip is None and names == default * len(backwards) and sequence.shape[0] > 0
    if plain and linear_before_reset:  # torch knows no other
        run = (torch.gru, fused.weights(W, R, B, fused.GRU_GATES), sequence, states, backwards)
        if sequence_lens is None:
            return _outputs(layout, *fused.run(*run))
        return _outputs(layout, *fused.run_masked(*run, sequence_lens))
    bias, hidden_bias = _sum(B), None
    if linear_before_reset and B is not None:
        gates, content, of_gates, of_content = torch.split(
            B, [2 * R.shape[-1], R.shape[-1]] * 2, -1
        )
        bias, hidden_bias = torch.cat((gates + of_gates, content), -1), of_content[:, None]
    functions = activation_functions(names, activation_alpha, activation_beta)
    cell = GruCell(
        R.mT, hidden_bias, for_directions(functions, 2), Clip(clip), bool(linear_before_reset)
    )
    return _outputs(layout, *unroll(cell, sequence, W, bias, states, backwards, sequence_lens))


@op("LSTM", since=SINCE, ignored=IGNORED, allowed=ALLOWED, check=partial(check, count=3))
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
    output_count: int = 3,
) -> tuple[Tensor, ...]:
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
    backwards = _backwards(direction, W)
    sequence = X.transpose(0, 1) if layout else X
    states = (_state(initial_h, sequence, R, layout), _state(initial_c, sequence, R, layout))
    default = ("sigmoid", "tanh", "tanh")
    names = _names(activations, default, len(backwards))
    plain = clip is None and not input_forget and P is None and sequence.shape[0] > 0
    # Packing wants the lengths on the host, which would end a compiled graph.
    compiling = sequence_lens is not None and output_count > 2 and torch.compiler.is_compiling()
    if plain and names == default * len(backwards) and not compiling:
        run = (torch.lstm, fused.weights(W, R, B, fused.LSTM_GATES), sequence, states, backwards)
        if sequence_lens is None:
            return _outputs(layout, *fused.run(*run))
        if output_count < 3:  # nobody asks for the last cell states
            return _outputs(layout, *fused.run_masked(*run, sequence_lens))
        return _outputs(layout, *fused.run_packed(*run, sequence_lens))
    functions = activation_functions(names, activation_alpha, activation_beta)
    peephole = None if P is None else P[:, None]
    cell = LstmCell(R.mT, peephole, for_directions(functions, 3), Clip(clip), bool(input_forget))
    return _outputs(layout, *unroll(cell, sequence, W, _sum(B), states, backwards, sequence_lens))


def _backwards(direction: str, W: Tensor) -> tuple[bool, ...]:
    backwards = BACKWARDS[direction]
    if W.shape[0] != len(backwards):
        raise ModelError(
            f"recurrent layer: W has {W.shape[0]} directions; {direction!r} needs {len(backwards)}"
        )
    return backwards


def _names(
    given: Sequence[str] | None, default: tuple[str, ...], directions: int
) -> tuple[str, ...]:
    """Return the activations of all directions in lower case; ones too many are left away."""
    if not given:
        return default * directions
    wanted = len(default) * directions
    return tuple(name.lower() for name in given[:wanted])


def _sum(B: Tensor | None) -> Tensor | None:
    """Return input and recurrent bias added up."""
    return None if B is None else torch.add(*B.chunk(2, -1))


def _state(given: Tensor | None, X: Tensor, R: Tensor, layout: int) -> Tensor:
    if given is None:
        return X.new_zeros(R.shape[0], X.shape[1], R.shape[-1])
    return given.transpose(0, 1) if layout else given


def _outputs(layout: int, y: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    """Return ``Y`` and the last states with batch where ``layout`` wants it."""
    if not layout:
        return y, *states
    return y.permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in states)
