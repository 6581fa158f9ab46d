"""The most memory that a forward holds in tensors of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Ledger(TorchDispatchMode):
    """Knows the storages that operators made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,  # the signature is torch's
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _owns(t)}
        self._live = {key: kept for key, kept in self._live.items() if not kept[0].expired()}
        for tensor in filter(_owns, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def _owns(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def peak_activation_bytes(call: Callable[[], object]) -> int:
    """Return the largest sum of the sizes of tensors made by ``call`` that live at one time.

    It is taken after each operator; what an operator needs inside does not count.
    """
    with _Ledger() as ledger:
        call()
    return ledger.peak
