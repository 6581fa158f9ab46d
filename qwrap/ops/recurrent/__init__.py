"""RNN, GRU and LSTM: torch's own kernels where they mean the same, else a loop over time."""

from qwrap.ops.recurrent import layers

__all__ = ["layers"]
