"""The best state that a model was in."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


class Kept:
    """A copy of the state of a module, on the CPU.

    Parameters, buffers, and what else its modules save (modes, statistics).
    """

    def __init__(self, module: nn.Module) -> None:
        self._state: dict[str, Any] = {}
        self.take(module)

    def take(self, module: nn.Module) -> None:
        """Copy the state as it is now."""
        for name, value in module.state_dict().items():
            held = self._state.get(name)
            if not isinstance(value, Tensor):
                self._state[name] = copy.deepcopy(value)
            elif isinstance(held, Tensor) and held.shape == value.shape:
                held.copy_(value)
            else:
                self._state[name] = value.detach().to("cpu", copy=True)

    def restore(self, module: nn.Module) -> None:
        """Put the module back into that state, in place, bit for bit."""
        module.load_state_dict(self._state)
