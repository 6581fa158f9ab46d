"""Activations that quantizing their output makes superfluous, such as Relu before codes from 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import NodeProto

if TYPE_CHECKING:
    from qwrap.ort.qdq.scope import QuantizedGraph


class FoldedActivations:
    """Nodes whose input was renamed to their output, so that they can be removed.

    A reader of floats still needs them: what it would read lacks the clipping of the codes.
    """

    def __init__(self, quantizer: QuantizedGraph) -> None:
        self._quantizer = quantizer
        self._renames: list[tuple[str, str]] = []

    def fold(self, upstream: str, output: str) -> bool:
        """Rename tensor ``upstream`` to ``output``, in place, if only one node reads it.

        Returns:
            Whether that was done. It is not where either tensor is converted or has no range, or
            where ``upstream`` is an input or output of the graph or captured by a body.
        """
        quantizer, uses = self._quantizer, self._quantizer.uses
        params = [quantizer.quantization_params.get(name) for name in (output, upstream)]
        if any(found is None or found.converted is not None for found in params):
            return False
        if len(uses.readers(upstream)) != 1 or upstream in uses.captured:
            return False
        if upstream in uses.outputs or upstream in uses.inputs or not uses.makers(upstream):
            return False
        uses.rename_output(upstream, output)
        quantizer.tensors_to_quantize.pop(upstream, None)
        self._renames.append((upstream, output))
        return True

    def restore(self) -> None:
        """Bring back, in place, nodes whose output is read as float by some node or body."""
        for upstream, output in reversed(self._renames):
            if self._quantizer.is_only_read_as_codes(output):
                continue
            node = self._node(upstream, output)
            if node is not None:
                self._quantizer.uses.rename_output(output, upstream, keep=node)
                self._quantizer.keep_node(node)

    def _node(self, upstream: str, output: str) -> NodeProto | None:
        removed = self._quantizer.nodes_to_remove
        return next((n for n in removed if upstream in n.input and output in n.output), None)
