"""Recurrent layers on torch's fused kernels, with ONNX's order of gates and padding.

ONNX stacks the gates of an LSTM as input, output, forget, cell, torch as input, forget, cell,
output; those of a GRU as update, reset, hidden, torch as reset, update, hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from qwrap.ops.recurrent.time import last, reverse, zero_empty, zero_padding

Kernel = Callable[..., tuple[Tensor, ...]]

LSTM_GATES = (0, 2, 3, 1)
GRU_GATES = (1, 0, 2)
RNN_GATES = (0,)


def weights(
    W: Tensor, R: Tensor, B: Tensor | None, gates: Sequence[int]
) -> list[tuple[Tensor, ...]]:
    """Return each direction's weights and biases with the gates in torch's order.

    All are views of one tensor, in the order in which cuDNN wants them, weights before biases.
    """
    pieces = [part for d in range(W.shape[0]) for part in (W[d], R[d])]
    if B is not None:
        pieces += [part for d in range(W.shape[0]) for part in B[d].chunk(2)]
    ordered = [piece.chunk(len(gates))[gate].flatten() for piece in pieces for gate in gates]
    flat = torch.split(torch.cat(ordered), [piece.numel() for piece in pieces])
    views = [part.view(piece.shape) for part, piece in zip(flat, pieces, strict=True)]
    count = W.shape[0]  # weights come in pairs, then biases in pairs
    starts = [2 * d for d in range(count)]
    if B is None:
        return [tuple(views[s : s + 2]) for s in starts]
    return [(*views[s : s + 2], *views[s + 2 * count : s + 2 * count + 2]) for s in starts]


def run(
    kernel: Kernel,
    parameters: Sequence[tuple[Tensor, ...]],
    X: Tensor,
    states: Sequence[Tensor],
    backwards: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Run whole sequences.

    Args:
        kernel: ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` or ``torch.rnn_relu``.
        parameters: see ``weights``.
        X: ``[seq, batch, input]``.
        states: each ``[directions, batch, hidden]``.
        backwards: whether each direction starts at the end.

    Returns:
        All hidden states ``[seq, directions, batch, hidden]``, then the last states.
    """
    only_backwards = tuple(backwards) == (True,)
    flat = [tensor for own in parameters for tensor in own]
    y, *final = kernel(
        X.flip(0) if only_backwards else X, _packed(states), flat, *_settings(parameters), False
    )
    y = y.flip(0) if only_backwards else y
    return _by_direction(y, len(backwards)), *final


def run_masked(
    kernel: Kernel,
    parameters: Sequence[tuple[Tensor, ...]],
    X: Tensor,
    states: Sequence[Tensor],
    backwards: Sequence[bool],
    lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run padded sequences to their common end and cut; needs no length on the host.

    Arguments are those of ``run``. The kernel tells only the hidden state at each step, so this
    returns ``Y`` and ``Y_h``.
    """
    # Padding may hold anything, NaN too, and gradients pass through it.
    sequence = zero_padding(X, lengths)
    outputs, hidden = [], []
    for d, own in enumerate(parameters):
        initial = [state[d : d + 1] for state in states]
        ordered = reverse(sequence, lengths) if backwards[d] else sequence
        y = kernel(ordered, _packed(initial), own, *_settings([own]), False)[0]
        hidden.append(last(y, lengths))
        y = zero_padding(y, lengths)
        outputs.append(reverse(y, lengths) if backwards[d] else y)
    return torch.stack(outputs, 1), torch.stack(hidden)


def run_packed(
    kernel: Kernel,
    parameters: Sequence[tuple[Tensor, ...]],
    X: Tensor,
    states: Sequence[Tensor],
    backwards: Sequence[bool],
    lengths: Tensor,
) -> tuple[Tensor, ...]:
    """Run padded sequences without their padding; the lengths travel to the host.

    Arguments and results are those of ``run``.
    """
    only_backwards = tuple(backwards) == (True,)
    # A packed sequence has at least one element; an empty one is put right at the end.
    counts, order = lengths.long().clamp(min=1).sort(descending=True)
    back = order.argsort()
    ordered = (reverse(X, lengths) if only_backwards else X).index_select(1, order)
    packed = pack_padded_sequence(ordered, counts.cpu())
    initial = [state.index_select(1, order) for state in states]
    flat = [tensor for own in parameters for tensor in own]
    data, *final = kernel(
        packed.data, packed.batch_sizes, _packed(initial), flat, *_settings(parameters)
    )
    padded = PackedSequence(data, packed.batch_sizes)
    y = pad_packed_sequence(padded, total_length=X.shape[0])[0].index_select(1, back)
    y = zero_padding(y, lengths)
    y = reverse(y, lengths) if only_backwards else y
    final = [zero_empty(state.index_select(1, back), lengths) for state in final]
    return _by_direction(y, len(backwards)), *final


def _by_direction(y: Tensor, directions: int) -> Tensor:
    return y.reshape(*y.shape[:2], directions, -1).transpose(1, 2)


def _packed(states: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    contiguous = tuple(state.contiguous() for state in states)
    return contiguous if len(contiguous) > 1 else contiguous[0]


def _settings(parameters: Sequence[tuple[Tensor, ...]]) -> tuple[bool, int, float, bool, bool]:
    """Return has_biases, num_layers, dropout, train, bidirectional.

    In evaluation cuDNN keeps nothing for the backward pass, so ``train`` is on wherever gradients
    may be asked for; without dropout nothing else depends on it.
    """
    return len(parameters[0]) == 4, 1, 0.0, torch.is_grad_enabled(), len(parameters) == 2
