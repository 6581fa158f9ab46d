"""Run a decoder on sequences, its caches fed back to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.errors import InputError, QwrapError
from qwrap.kv_cache.detect import Pair
from qwrap.model.batches import to_inputs
from qwrap.model.wrapped import WrappedModel
from qwrap.ops.element_types import TORCH_DTYPES

BRANCH = "use_cache_branch"
"""What exporters call the input of a merged decoder that says whether there is a past."""

PROBES = ((2, 5), (3, 4))


class Decoder:
    """Feeds batches to a decoder, piece by piece.

    Attributes:
        is_probing: whether what runs is no data, but shows the shapes of tensors.
        probes: how many such runs there were, this one included.
    """

    def __init__(self, model: WrappedModel, pairs: Sequence[Pair], chunk: int | None) -> None:
        self._model, self._chunk = model, chunk
        self.is_probing, self.probes = False, 0
        self._pasts = {p.past.name or "": p for p in pairs if p.past is not None}
        self._presents = {
            p.past.name or "": model.output_names.index(p.present.name or "")
            for p in pairs
            if p.past is not None and p.present is not None
        }

    @torch.no_grad()
    def run(self, batches: Iterable[Any]) -> None:
        """Run all batches.

        Raises:
            InputError: there are none, or one does not fit.
        """
        count = 0
        for batch in batches:
            if not count:
                self._probe(batch)
            self._try(batch, count)
            count += 1
        if not count:
            raise InputError("no batches: the data is empty (or an iterator that was used up)")

    def _probe(self, batch: Any) -> None:
        """Run a few tokens twice, with other numbers of them and of sequences."""
        self.is_probing = True
        try:
            for copies, length in PROBES:
                piece = next(self._pieces(self._by_name(batch), length, exactly=True))
                self.probes += 1
                self._call({name: self._tiled(name, v, copies) for name, v in piece.items()}, {})
        except (QwrapError, RuntimeError, IndexError):
            return  # such data does not fit: all that is lost is where scales could be moved to
        finally:
            self.is_probing = False

    def _tiled(self, name: str, value: Any, copies: int) -> Any:
        kind = self._model.graph.type_of(self._model.graph.values[name])
        if not kind.shape or isinstance(kind.shape[0], int):
            return value
        return torch.cat([torch.as_tensor(value)] * copies)

    def _try(self, batch: Any, index: int) -> None:
        try:
            self._run(self._by_name(batch))
        except InputError as error:
            raise InputError(f"batch {index}: {error}") from error

    def _by_name(self, batch: Any) -> dict[str, Any]:
        if isinstance(batch, Mapping):
            given = {name: batch[name] for name in self._model.input_names if name in batch}
            missing = [n for n in self._model.input_names if n not in given and self._is_asked(n)]
            if missing:
                raise InputError(
                    f"graph inputs {missing} are missing; the mapping has {sorted(map(str, batch))}"
                )
            return given
        items = list(batch) if isinstance(batch, (tuple, list)) else [batch]
        names = self._model.input_names
        if len(items) < len(names):
            names = [name for name in names if self._is_asked(name)]
        return dict(zip(names, items, strict=False))

    def _is_asked(self, name: str) -> bool:
        return name not in self._pasts and name != BRANCH

    def _run(self, given: dict[str, Any]) -> None:
        if self._chunk is None:
            self._call(given, {})
            return
        carried: dict[str, Any] = {}
        for piece in self._pieces(given, self._chunk):
            outputs = self._call(piece, carried)
            carried = {name: outputs[index] for name, index in self._presents.items()}

    def _call(self, given: Mapping[str, Any], carried: Mapping[str, Any]) -> Sequence[Tensor]:
        inputs = {**given, **carried}
        for name, pair in self._pasts.items():
            if name not in inputs:
                inputs[name] = self._empty(pair, given)
        if BRANCH in self._model.input_names and BRANCH not in inputs:
            filled = any(np.prod(inputs[name].shape) for name in self._pasts)
            inputs[BRANCH] = torch.tensor([filled])
        outputs = self._model(**to_inputs(inputs, self._model))
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def _empty(self, pair: Pair, given: Mapping[str, Any]) -> Tensor:
        """Return the cache before the first token: nothing, or a buffer of zeros."""
        shape, layout = pair.type.shape, pair.layout
        assert shape is not None
        sizes = list(shape)
        if not isinstance(sizes[layout.batch], int):
            sizes[layout.batch] = self._sequences(given)
        if not isinstance(sizes[layout.time], int):
            sizes[layout.time] = 0
        if any(not isinstance(n, int) for n in sizes):
            raise InputError(
                f"graph input {pair.name!r} is missing, and its shape {list(shape)} does not say "
                "how large it is; give it in the batches, empty as for the first token"
            )
        dtype = TORCH_DTYPES[pair.type.dtype or ir.DataType.FLOAT]
        return torch.zeros([int(n or 0) for n in sizes], dtype=dtype)

    def _sequences(self, given: Mapping[str, Any]) -> int:
        for value in given.values():
            if np.ndim(value):
                return int(np.shape(value)[0])
        raise InputError("no input says how many sequences there are; give the caches as well")

    def _pieces(
        self, given: Mapping[str, Any], size: int, *, exactly: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Yield the inputs of a few tokens at a time; masks cover those before as well."""
        along = {n: np.shape(v)[1] for n, v in given.items() if self._is_of_tokens(n, v)}
        length = max(along.values(), default=0)
        if not length or (exactly and length < size):
            raise InputError("chunk: no input has the tokens along its second axis")
        for start in range(0, length, size):
            stop = min(start + size, length)
            yield {
                name: value
                if along.get(name) != length
                else value[:, (0 if "mask" in name else start) : stop]
                for name, value in given.items()
            }

    def _is_of_tokens(self, name: str, value: Any) -> bool:
        return name not in self._pasts and np.ndim(value) >= 2
