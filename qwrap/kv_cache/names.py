"""What exporters call the caches of a decoder."""

from __future__ import annotations

import re
from typing import Literal

Role = Literal["key", "value", ""]

_PAST = {"past", "pasts", "pkv", "cache", "caches"}
_PRESENT = {*_PAST, "present", "presents", "new", "next", "updated"}
_NEUTRAL = {
    *_PRESENT,
    "in",
    "input",
    "out",
    "output",
    "keyvalues",
    "kv",
    "self",
    "decoder",
}
_ROLES: dict[str, Role] = {
    "key": "key",
    "keys": "key",
    "k": "key",
    "value": "value",
    "values": "value",
    "v": "value",
}


def words(name: str) -> list[str]:
    """Return the words and numbers in a name: ``past_key_values.0.key`` has four."""
    joined = re.sub(
        r"key_?values?(?![a-z])", "keyvalues", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    )
    return re.findall(r"[a-z]+|[0-9]+", joined)


def is_past(name: str) -> bool:
    """Whether a graph input is called as caches are."""
    return bool(_PAST & set(words(name)))


def is_present(name: str) -> bool:
    """Whether a graph output is called as caches are."""
    return bool(_PRESENT & set(words(name)))


def slot(name: str) -> tuple[str, ...]:
    """Return which layer, of what and whether keys or values a name speaks of, in any order.

    It is the same for what comes in and what goes out: ``past_key_values.0.key`` and
    ``present.0.key``, ``past_key_self_0`` and ``present_key_self_0``, ``cache_k_3`` and
    ``new_cache_k_3``, ``past_2`` and ``present_2``.
    """
    known = [word for word in words(name) if word not in _NEUTRAL]
    return tuple(sorted(_ROLES.get(word, word) for word in known))


def role(name: str) -> Role:
    """Return whether a name speaks of keys or of values; nothing if of neither or both."""
    found = {_ROLES[word] for word in words(name) if word in _ROLES}
    return found.pop() if len(found) == 1 else ""
