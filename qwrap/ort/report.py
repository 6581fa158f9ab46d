"""What became of each node: quantized, left float, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What became of one node of the input model.

    Attributes:
        name: of the node, or of its first output where it has none.
        op_type: operator.
        quantized: whether it was quantized.
        reason: why not, or what was made of it.
    """

    name: str
    op_type: str
    quantized: bool
    reason: str = ""


@dataclass(slots=True)
class Report:
    """Filled by the entry points that are given one (``report=``).

    Attributes:
        nodes: in graph order.
        notes: what concerns no node of its own.
    """

    nodes: list[NodeReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, op_type: str, quantized: bool, reason: str = "") -> None:
        """Append what became of a node."""
        self.nodes.append(NodeReport(name, op_type, quantized, reason))

    def __str__(self) -> str:
        left = [node for node in self.nodes if not node.quantized]
        lines = [f"{len(self.nodes) - len(left)} of {len(self.nodes)} nodes quantized"]
        reasons = Counter((node.op_type, node.reason) for node in left)
        lines += [
            f"  {count} {op_type}: {reason}" for (op_type, reason), count in reasons.most_common()
        ]
        return "\n".join([*lines, *self.notes])
