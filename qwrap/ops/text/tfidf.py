"""TfIdfVectorizer: counts of known n-grams, all rows and positions at once.

The pool of n-grams becomes a tree of tokens: node 0 is the root, an edge leads from a node by a
token to the node of the sequence one longer. Windows of the input walk down it together, one
``searchsorted`` a token, however large the pool is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwrap.errors import InputError, ModelError, UnsupportedOpError
from qwrap.ops.limits import at_least
from qwrap.ops.registry import op

MODES = ("TF", "IDF", "TFIDF")


@dataclass(frozen=True, slots=True)
class Ngrams:
    """The pool of n-grams.

    Attributes:
        words: token of text -> its number, for text.
        numbers: the known tokens ascending, for integers.
        edges: ``node * token count + token`` of all edges, ascending.
        targets: where each edge leads.
        grams: node -> number of the n-gram that ends there, or their count where none does; the
            last node is where all other sequences go.
        columns: of the output, of each n-gram.
        weights: of each n-gram, all one without.
        is_weighted: whether ``weights`` are used.
        width: how many columns the output has.
        sizes: shortest and longest n-gram that counts.
        max_skip_count: how many tokens may lie between two of an n-gram.
        mode: one of ``MODES``.
    """

    words: dict[str, int]
    numbers: Tensor
    edges: Tensor
    targets: Tensor
    grams: Tensor
    columns: Tensor
    weights: Tensor
    is_weighted: bool
    width: int
    sizes: tuple[int, int]
    max_skip_count: int
    mode: str

    def tokens(self, X: Any, device: torch.device | None) -> Tensor:
        """Return the number of each token; what the pool lacks is the last number."""
        if isinstance(X, np.ndarray):
            unknown = len(self.words)
            found = np.array([self.words.get(text, unknown) for text in X.flat], np.int64)
            return torch.from_numpy(found.reshape(X.shape)).to(device)
        numbers = self.numbers.to(X.device)
        place = torch.searchsorted(numbers, X.long().contiguous())
        known = numbers[place.clamp(max=len(numbers) - 1)] == X
        return torch.where(known, place, len(numbers))

    def step(self, node: Tensor, token: Tensor) -> Tensor:
        """Return the node that each token leads to; from nowhere, to nowhere."""
        edges, targets = self.edges.to(node.device), self.targets.to(node.device)
        key = node * (max(len(self.words), len(self.numbers)) + 1) + token
        place = torch.searchsorted(edges, key).clamp(max=len(edges) - 1)
        nowhere = len(self.grams) - 1
        return torch.where(edges[place] == key, targets[place], nowhere)


def ngrams(
    *,
    max_gram_length: int,
    max_skip_count: int,
    min_gram_length: int,
    mode: str,
    ngram_counts: Sequence[int],
    ngram_indexes: Sequence[int],
    pool_int64s: Sequence[int] = (),
    pool_strings: Sequence[str] = (),
    weights: Sequence[float] | None = None,
) -> Ngrams:
    """Return the pool that the attributes describe.

    Raises:
        UnsupportedOpError: an unknown mode.
        ModelError: counts, indices and pool do not fit each other, or an n-gram comes twice.
    """
    if mode not in MODES:
        raise UnsupportedOpError(f"mode={mode!r} is none of {list(MODES)}")
    pool: Sequence[Any] = pool_strings or pool_int64s
    if not 1 <= min_gram_length <= max_gram_length <= len(ngram_counts) or not pool:
        raise ModelError("n-gram lengths, ngram_counts and pool do not fit each other")
    vocabulary = {token: number for number, token in enumerate(sorted(set(pool)))}
    grams = _grams(pool, ngram_counts)
    if len(set(grams)) != len(grams):
        raise ModelError("the pool holds an n-gram twice")
    if len(grams) != len(ngram_indexes) or (weights and len(weights) != len(grams)):
        raise ModelError(f"{len(grams)} n-grams, {len(ngram_indexes)} indices")
    if mode == "IDF" and weights and len(set(ngram_indexes)) < len(grams):
        raise UnsupportedOpError("mode='IDF' with weights where n-grams share an index")
    is_weighted = bool(weights) and mode != "TF"
    nodes: dict[tuple[int, int], int] = {}
    ends: dict[int, int] = {}
    for number, gram in enumerate(grams):
        node = 0
        for token in gram:
            node = nodes.setdefault((node, vocabulary[token]), len(nodes) + 1)
        ends[node] = number
    keys = {node * (len(vocabulary) + 1) + token: to for (node, token), to in nodes.items()}
    return Ngrams(
        words=vocabulary if pool_strings else {},
        numbers=torch.tensor([] if pool_strings else sorted(vocabulary), dtype=torch.int64),
        edges=torch.tensor(sorted(keys)),
        targets=torch.tensor([keys[key] for key in sorted(keys)]),
        grams=torch.tensor([ends.get(node, len(grams)) for node in range(len(nodes) + 2)]),
        columns=torch.tensor(ngram_indexes),
        weights=torch.tensor(weights if is_weighted else [1.0] * len(grams)),
        is_weighted=is_weighted,
        width=max(ngram_indexes) + 1,
        sizes=(min_gram_length, max_gram_length),
        max_skip_count=max_skip_count,
        mode=mode,
    )


def _grams(pool: Sequence[Any], counts: Sequence[int]) -> list[tuple[Any, ...]]:
    """Return the n-grams in order; ``counts`` says where those of each length start."""
    ends = [*counts[1:], len(pool)]
    result: list[tuple[Any, ...]] = []
    for size, (start, end) in enumerate(zip(counts, ends, strict=True), 1):
        if not 0 <= start <= end <= len(pool) or (end - start) % size:
            raise ModelError(f"ngram_counts: {start} to {end} holds no whole {size}-grams")
        result += [tuple(pool[i : i + size]) for i in range(start, end, size)]
    return result


@op("TfIdfVectorizer", since=(9,), allowed={"max_skip_count": at_least(0)}, prepare=ngrams)
def tfidf_vectorizer(
    X: Tensor | npt.NDArray[Any], *, prepared: Ngrams, device: torch.device | None = None
) -> Tensor:
    """Count the n-grams of each row, or weigh those that occur.

    Raises:
        InputError: ``X`` is neither ``[tokens]`` nor ``[rows, tokens]``.
    """
    if X.ndim > 2:
        raise InputError(f"TfIdfVectorizer: shape {list(X.shape)} is neither [C] nor [N, C]")
    tokens = prepared.tokens(X, device)
    rows = tokens.reshape(1, -1) if X.ndim < 2 else tokens
    counts = rows.new_zeros(rows.shape[0], len(prepared.columns) + 1)  # the last: no n-gram
    for gram in _hits(rows, prepared):
        counts = counts.scatter_add(1, gram, torch.ones_like(gram))
    found = counts[:, :-1].clamp(max=1) if prepared.mode == "IDF" else counts[:, :-1]
    weighted = found * prepared.weights.to(found.device)
    columns = prepared.columns.to(found.device)
    values = weighted.new_zeros(len(rows), prepared.width).index_add(1, columns, weighted)
    if prepared.mode == "IDF" and not prepared.is_weighted:
        # Of n-grams that share a column one counts.
        values = values.clamp(max=1.0)
    return values if X.ndim == 2 else values[0]


def _hits(rows: Tensor, pool: Ngrams) -> list[Tensor]:
    """Return the n-grams found: of each distance and length at every start."""
    shortest, longest = pool.sizes
    grams = pool.grams.to(rows.device)
    result = []
    for distance in range(1, pool.max_skip_count + 2):
        node = torch.zeros_like(rows)
        for size in range(1, longest + 1):
            count = rows.shape[1] - (size - 1) * distance
            if count <= 0:
                break
            reached = rows[:, (size - 1) * distance :]
            node = pool.step(node[:, :count], reached)
            node_is_new = size > 1 or distance == 1  # single tokens have no distance
            if size >= shortest and node_is_new:
                result.append(grams[node])
    return result
