"""What one runtime can run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Scope = Literal["faster", "kernels", "all", "named"]

FLOAT32 = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """Types that go together.

    Attributes:
        operators: types of operators; None for all that no other kernel of the target names.
        activations: names of types, "float32" for what is not quantized.
        weights: names of types of weights that go with any of these; "float32" for none.
    """

    activations: frozenset[str]
    weights: frozenset[str] = frozenset({FLOAT32})
    operators: frozenset[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The operators that a runtime has integer kernels for, and what these ask of tensors.

    Attributes:
        name: what it is asked for by.
        matrix: operators with a quantized weight; they decide what else is worth quantizing.
        elementwise: operators with an integer kernel that needs every tensor quantized.
        moving: operators that pass codes on, where input and output have the same qparams.
        absorbed: activations that become a part of the kernel in front.
        dictated: operators whose kernel is right only for the scale that their output range has.
        float_output: operators that also write float, without a pair on their output.
        lookup: operators that fetch rows of a constant table.
        least_table: elements from which storing a table as codes is worth a pair behind it.
        scope: what is quantized where nothing else is said, see ``QConfig``.
        kernels: what there are kernels for; None for any type, perhaps in float between pairs.
        quick: the same, of those that are worth it; None for all.
        symmetric: types of activations that have their zero point in the middle.
        symmetric_weights: the same of weights.
        per_channel: operators whose weights may have a scale for each channel; None for all.
        blocks: types of weights that may have a scale for each block; None for all.
        unified: operators whose inputs and output have to have one scale; what only moves values
            always has.
        power_of_two: whether every scale is a power of two.
        bias: type that biases are stored in; "float32" leaves them as they are. Of "int32" the
            scale is the product of those of input and weight; other types have their own.
        defaults: arguments of ``QConfig`` that suit it, by name.
    """

    name: str
    matrix: frozenset[str]
    elementwise: frozenset[str]
    moving: frozenset[str]
    absorbed: frozenset[str]
    dictated: frozenset[str]
    float_output: frozenset[str]
    lookup: frozenset[str]
    least_table: int
    scope: Scope = "faster"
    kernels: tuple[Kernel, ...] | None = None
    quick: tuple[Kernel, ...] | None = None
    symmetric: frozenset[str] = frozenset()
    symmetric_weights: frozenset[str] = frozenset()
    per_channel: frozenset[str] | None = None
    blocks: frozenset[str] | None = None
    unified: frozenset[str] = frozenset()
    power_of_two: bool = False
    bias: Literal["int32", "int8", "float32"] = "int32"
    defaults: tuple[tuple[str, Any], ...] = ()

    @property
    def is_cpu(self) -> bool:
        """Whether it is onnxruntime on CPUs, whose kernels are known to the last bit."""
        return self.kernels is None

    def has_channels(self, op_type: str) -> bool:
        """Whether the weight of an operator may have a scale for each channel."""
        return self.per_channel is None or op_type in self.per_channel

    def supports(self, op_type: str, activation: str, weight: str = FLOAT32) -> bool:
        """Whether an operator runs with inputs and weights of such types.

        Args:
            op_type: of the node.
            activation: name of the type of what it reads and writes; "float32" if not quantized.
            weight: name of the type of its weight; "float32" if it has none.
        """
        if self.kernels is None or (activation == weight == FLOAT32):
            return True
        return _any(self.kernels, op_type, activation, weight)

    def fast(self, op_type: str, activation: str, weight: str = FLOAT32) -> bool:
        """Whether an operator has a kernel for such types that is faster than in float32.

        Arguments as for ``supports``.
        """
        if activation == FLOAT32:
            return False
        known = self.matrix | self.elementwise | self.moving | self.absorbed
        if op_type not in known or not self.supports(op_type, activation, weight):
            return False
        return self.quick is None or _any(self.quick, op_type, activation, weight)

    def runs(self, op_type: str) -> str:
        """Return in words which types an operator runs in."""
        kernels = _kernels_of(self.kernels or (), op_type)
        texts = []
        for kernel in kernels:
            text = f"activations of {_listed(kernel.activations)}"
            if kernel.weights != {FLOAT32}:
                text += f" with weights of {_listed(kernel.weights)}"
            texts.append(text)
        return "; or ".join(texts) or "float32"


def _kernels_of(kernels: tuple[Kernel, ...], op_type: str) -> list[Kernel]:
    named = [k for k in kernels if k.operators is not None and op_type in k.operators]
    return named or [k for k in kernels if k.operators is None]


def _any(kernels: tuple[Kernel, ...], op_type: str, activation: str, weight: str) -> bool:
    return any(
        activation in kernel.activations and weight in kernel.weights
        for kernel in _kernels_of(kernels, op_type)
    )


def _listed(names: frozenset[str]) -> str:
    return " or ".join(sorted(names))
