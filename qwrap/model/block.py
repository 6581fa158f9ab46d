"""A module whose forward is generated text."""

from __future__ import annotations

import itertools
import linecache
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qwrap.ops import function_of, key_of

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class _Operator:
    """Stands for an operator's function in a pickle, which cannot hold a function made by one."""

    key: tuple[str, str, int]


def _named(value: Any) -> Any:
    if not callable(value) or not isinstance(value, Hashable):
        return value
    key = key_of(value)
    return value if key is None else _Operator(key)


class Block(nn.Module):
    """The nodes of one scope, run by generated code; inner scopes are inner Blocks.

    The text is kept instead of the compiled function, so that a Block can be copied and pickled;
    it is registered with ``linecache``, so that a traceback shows the line and its node.

    Attributes:
        source: text of the function ``run(self, …)``.
        namespace: the names the text uses besides its arguments.
        taps: what sits on tensors that this Block produces, by tensor name.
        path: of its scope, empty for the whole model.
    """

    def __init__(self, path: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.path = path
        self.source = ""
        self.namespace: dict[str, Any] = {}
        self._file = ""

    def set_code(self, source: str, namespace: dict[str, Any]) -> None:
        """Replace the forward of this Block."""
        self.source, self.namespace = source, namespace
        self._compile()

    def _compile(self) -> None:
        if not self.source:
            return
        self._file = f"<qwrap {type(self).__name__} {next(_numbers)}>"
        lines = self.source.splitlines(keepends=True)
        linecache.cache[self._file] = (len(self.source), None, lines, self._file)
        scope = dict(self.namespace)
        exec(compile(self.source, self._file, "exec"), scope)
        self._run = scope.pop("run")
        weakref.finalize(self._run, linecache.cache.pop, self._file, None).atexit = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the nodes; arguments and results are the tensors that cross the Block's border."""
        return self._run(self, *args, **kwargs)

    def extra_repr(self) -> str:
        """Show the parameters of this Block and their shapes."""
        return ", ".join(
            f"{name}={list(p.shape)}" for name, p in self._parameters.items() if p is not None
        )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_run", None)
        state["namespace"] = {name: _named(value) for name, value in self.namespace.items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["namespace"] = {
            name: function_of(value.key) if isinstance(value, _Operator) else value
            for name, value in state["namespace"].items()
        }
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._compile()


class Elsewhere(nn.Module):
    """Calls a module that is a submodule of another Block; it has no tensors of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._found = (module,)  # in a tuple, so that it is not a submodule of this one too

    @property
    def module(self) -> nn.Module:
        """The module that is called."""
        return self._found[0]

    def forward(self, x: Tensor) -> Any:
        """Return what it makes of ``x``."""
        return self._found[0](x)


def hold(block: nn.Module, kind: str, text: str, module: nn.Module) -> str:
    """Put ``module`` into the ModuleDict ``kind`` of ``block``; return its name there."""
    if kind not in block._modules:
        block.add_module(kind, nn.ModuleDict())
    holder = getattr(block, kind)
    assert isinstance(holder, nn.ModuleDict)
    name = text.replace(".", "_").replace('"', "_").replace("\\", "_").replace("\n", "_")
    while not name or name in holder or hasattr(holder, name):
        name += "_"
    holder[name] = module
    return name
