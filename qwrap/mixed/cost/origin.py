"""What a table of latencies holds for."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from qwrap.errors import TableError
from qwrap.mixed.choices import Group
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.statistics.fingerprint import Fingerprint

_CPU_INFO = Path("/proc/cpuinfo")
_DIGEST = 16  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Model, groups, inputs, runtime and machine of a table of latencies.

    Attributes:
        model: digest of the graph and the types and shapes of its weights; their values do not
            matter.
        groups: digest of the groups and their choices.
        shapes: graph input -> its shape.
        onnxruntime: version.
        threads: that one operator may use; 0 for the default.
        cpu: name of the processor, or its architecture where there is no other.
        cores: how many this process sees.
    """

    model: str
    groups: str
    shapes: dict[str, list[int]]
    onnxruntime: str
    threads: int
    cpu: str
    cores: int

    @classmethod
    def here(
        cls,
        model: WrappedModel,
        groups: Sequence[Group],
        inputs: Mapping[str, Any],
        threads: int,
    ) -> Origin:
        """Return what a table has that is measured here and now."""
        return cls(
            model=_digest(_structure(model)),
            groups=_digest([[g.name, g.nodes, [str(c) for c in g.choices]] for g in groups]),
            shapes={name: list(np.shape(inputs[name])) for name in sorted(inputs)},
            onnxruntime=onnxruntime.__version__,
            threads=threads,
            cpu=cpu_name(),
            cores=os.cpu_count() or 1,
        )

    def difference(self, other: Origin) -> str | None:
        """Say in which respect this ("here") is not ``other`` ("there"), None if in none."""
        mine, theirs = asdict(self), asdict(other)
        wrong = [name for name in mine if mine[name] != theirs[name]]
        texts = [f"{name} {mine[name]!r} here, {theirs[name]!r} there" for name in wrong]
        return "; ".join(texts) or None

    @classmethod
    def from_dict(cls, content: Any) -> Origin:
        """Take over what ``dataclasses.asdict`` returned.

        Raises:
            TableError: it is no such thing.
        """
        names = {f.name: f.type for f in fields(cls)}
        if not isinstance(content, dict) or set(content) != set(names):
            raise TableError(f"origin: expected the entries {sorted(names)}")
        kinds = {"str": str, "int": int}
        for name, kind in names.items():
            if str(kind) in kinds and type(content[name]) is not kinds[str(kind)]:
                raise TableError(f"origin: {name} is {content[name]!r}, expected {kind}")
        shapes = content["shapes"]
        if not isinstance(shapes, dict) or not all(map(_is_shape, shapes.values())):
            raise TableError("origin: shapes have to be lists of numbers by graph input")
        return cls(**content)


def cpu_name() -> str:
    """Return the name of the processor, or its architecture where the system does not say."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(filter(None, names), platform.processor() or platform.machine())


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)


def _structure(model: WrappedModel) -> Any:
    content = Fingerprint.of(model).to_dict()
    weights = content.get("weights", {})
    content["weights"] = {name: text.rpartition(" ")[0] for name, text in weights.items()}
    return content


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST).hexdigest()
