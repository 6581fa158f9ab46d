"""What computes one node from other constants than the graph has there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

Tap = Callable[[Tensor], Tensor]


class Substitute(nn.Module, ABC):
    """Computes one node in every program that has no kernel for it.

    What the model stores for some inputs of the node are then parameters in another form, from
    which the substitute makes the constants that the graph means.

    Attributes:
        indices: the inputs of the node that these are.
    """

    indices: ClassVar[Sequence[int]]

    @abstractmethod
    def forward(
        self,
        function: Callable[..., Any],
        taps: Sequence[Tap | None],
        *inputs: Any,
        **keywords: Any,
    ) -> Any:
        """Compute the node.

        Args:
            function: its operator.
            taps: what sits on the inputs in ``indices``, None for nothing; not called yet.
            *inputs: of the node, those in ``indices`` as they are stored.
            **keywords: its attributes.
        """

    @abstractmethod
    def made(self, index: int, stored: Tensor) -> Tensor:
        """Return the constant that the graph means by what is stored for input ``index``."""

    @abstractmethod
    def unmade(self, index: int, wanted: Tensor) -> Tensor:
        """Return what has to be stored so that ``made`` returns ``wanted``, but for rounding."""
