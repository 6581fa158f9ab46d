"""Compiling a pass once for the whole process, and what happens where that cannot be done."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType, TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qwrap.errors import ConfigError, QwrapWarning

How = Literal["auto", "compiled", "eager"]

WORTHWHILE = {"cpu": 2**16}
"""Elements from which "auto" compiles. Below, one piece of the eager pass takes no longer than the
call of a compiled one, some 20 us on a CPU; on other devices eager starts a dozen kernels."""
ELSEWHERE = 2**12

DIVISION = "eager_numerics.division_rounding"
"""The option of inductor that makes Triton's division the IEEE one; older versions have none."""

_how: How = "auto"
_compiled: dict[object, Callable[..., Any]] = {}
_process: list[int] = []
_broken: list[str] = []
_lock = threading.Lock()


class use:  # noqa: N801 -- reads as a verb, as torch.no_grad does
    """Set how the passes are run from now on, in this process; in ``with``, until its end.

    "auto" compiles where tensors are large enough to gain from it, "compiled" everywhere, "eager"
    nowhere. Values and the gradient of the tensor are the same bit for bit in all three; sums
    differ in their last bits, by the order of addition. The first call of each kind of tensor takes
    the seconds that its compilation takes; torch keeps the results on disk. A process forked from
    one that has compiled runs in eager form, as OpenMP does not survive a fork.

    Args:
        how: "auto" falls back to eager with one ``QwrapWarning`` where compiling fails, say for
            want of a compiler; "compiled" raises ``ConfigError``.

    Raises:
        ConfigError: ``how`` is none of the three.
    """

    def __init__(self, how: How) -> None:
        global _how
        if how not in get_args(How):
            raise ConfigError(f"use({how!r}): expected one of {', '.join(get_args(How))}")
        self._before, _how = _how, how

    def __enter__(self) -> None:
        """Nothing is left to do."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Go back to the setting before."""
        global _how
        _how = self._before


def is_traced(x: Tensor) -> bool:
    """Whether ``x`` has no values to compute with, or is a tensor of another library."""
    return torch.compiler.is_compiling() or type(x) not in _PLAIN or x.device.type == "meta"


_PLAIN = (Tensor, nn.Parameter)


def is_worthwhile(x: Tensor) -> bool:
    """Whether a pass over ``x`` is to be compiled."""
    if _how == "eager" or not x.numel() or not _is_exact(x.device.type):
        return False
    if _how == "compiled":
        return True
    if _broken or (_process and _process[0] != os.getpid()):
        return False
    return x.numel() >= WORTHWHILE.get(x.device.type, ELSEWHERE)


@lru_cache
def _is_exact(device: str) -> bool:
    """Whether a division can be compiled for ``device``: Triton's is approximate unless asked."""
    return device == "cpu" or DIVISION in _options()


def run(function: Callable[..., Any], kind: object, *inputs: Tensor, **flags: object) -> Any:
    """Return what ``function`` returns, compiled; None where it cannot be compiled.

    Args:
        function: plain operations on tensors.
        kind: whatever needs a kernel of its own beyond ``flags``: element types, and which sizes
            are 1, as the compiler treats these as constants.
        inputs: contiguous tensors without gradient.
        flags: constants.

    Raises:
        ConfigError: it cannot be compiled, and ``use("compiled")`` asks for it.
    """
    key = (function, kind, *flags.items())
    compiled = _compiled.get(key)
    try:
        if compiled is not None:
            return compiled(*inputs, **flags)
        return _first(key, function, *inputs, **flags)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in every way there is
        _give_up(error)
        return None


def _first(key: object, function: Callable[..., Any], *inputs: Tensor, **flags: object) -> Any:
    """Compile ``function`` and run it.

    torch counts the versions of one code object and gives up at the ninth; so each kind gets a
    copy, whose versions are then few: one for each number of threads and the like.
    """
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own modules
        compiled = _compiled.get(key)
        if compiled is None:
            assert isinstance(function, FunctionType)
            copy = FunctionType(
                function.__code__.replace(), function.__globals__, function.__name__
            )
            copy.__kwdefaults__ = function.__kwdefaults__
            options = _exact(inputs[0].device.type)
            compiled = torch.compile(copy, dynamic=True, fullgraph=True, options=options)
        result = compiled(*inputs, **flags)
        _compiled[key] = compiled
        _process[:] = [os.getpid()]
    return result


def _exact(device: str) -> dict[str, Any]:
    """Return options that keep every operation an IEEE operation, whatever the user has set."""
    if device != "cpu":
        return {DIVISION: True}
    wanted = {
        "cpp.enable_unsafe_math_opt_flag": False,
        "cpp.enable_floating_point_contract_flag": "off",
    }
    return {name: value for name, value in wanted.items() if name in _options()}


def _options() -> list[str]:
    return torch._inductor.list_options()


def _give_up(error: Exception) -> None:
    """Say once that everything runs in eager form from now on."""
    reason = getattr(error, "inner_exception", error)  # torch wraps what the compiler said
    first_line = (str(reason).strip() or type(reason).__name__).splitlines()[0]
    if _how == "compiled":
        raise ConfigError(
            f"fused passes cannot be compiled: {first_line}; set qwrap.fused.use('auto') or 'eager'"
        ) from error
    if not _broken:
        _broken.append(first_line)
        warnings.warn(
            f"fused passes run uncompiled, slower than need be: {first_line}; torch needs a "
            "C++ compiler on a CPU and Triton on CUDA; qwrap.fused.use('eager') silences this",
            QwrapWarning,
            stacklevel=4,
        )
