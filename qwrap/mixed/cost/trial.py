"""A file for one assignment, in which every node has a name that onnxruntime's optimiser keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwrap.config import QConfig
from qwrap.export.exporter import to_quantized_graph
from qwrap.graph.index import walk_nodes
from qwrap.graph.save import write_model
from qwrap.mixed.choices import Assignment, Group
from qwrap.mixed.cost.cost import as_tensors, prepared_with
from qwrap.mixed.cost.owners import Owners
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.calibrate import calibrate

_KEY = "qwrap.node"  # metadata property that holds the key of a node of the model
_LABEL = re.compile(r"q[nt](\d+)_")  # in names of nodes and of their outputs


@dataclass(frozen=True, slots=True)
class Trial:
    """A quantized file that is written to be timed.

    Attributes:
        assignment: what it was made for.
        path: of the file.
        owners: which group each node of the model belongs to.
        keys: of each node of the file, by its number: the node of the model that it is, None for
            what quantization added.
        operators: the operator types of the same nodes.
    """

    assignment: dict[str, Any]
    path: Path
    owners: Owners
    keys: tuple[str | None, ...]
    operators: tuple[str, ...]

    def number(self, *names: str) -> int | None:
        """Return the number of the node that the first of ``names`` with a label was made from."""
        for name in names:
            found = _LABEL.search(name)
            if found:
                return int(found[1])
        return None


def make_trial(
    model: WrappedModel,
    groups: Sequence[Group],
    assignment: Assignment,
    inputs: Mapping[str, Any],
    path: Path,
    config: QConfig | None = None,
) -> Trial:
    """Write the file of one assignment; ranges are those of ``inputs`` alone, as time needs none.

    Args:
        model: a wrapped model, unchanged.
        groups: of ``groups_of``.
        assignment: a choice for each.
        inputs: graph input -> tensor or array.
        path: of the file to make.
        config: what else the model will be quantized with.
    """
    config = replace(
        config or QConfig(), method="minmax", weight_method="minmax", kept_samples=0, bn="fold"
    )
    prepared = prepared_with(model, groups, assignment, config)
    owners = Owners(prepared, groups)
    for key, node in prepared.graph.nodes.items():
        node.metadata_props[_KEY] = key
    calibrate(prepared, [as_tensors(inputs)], progress=False)
    draft = to_quantized_graph(prepared)
    keys, operators = [], []
    for number, node in enumerate(walk_nodes(draft.graph)):
        keys.append(node.metadata_props.get(_KEY))
        operators.append(node.op_type)
        node.name = f"qn{number}_"
        for index, value in enumerate(node.outputs):
            if value.name:
                value.name = f"qt{number}_{index}_"
    write_model(draft, path)
    return Trial(dict(assignment), path, owners, tuple(keys), tuple(operators))
