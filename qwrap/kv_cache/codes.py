"""The nodes that turn values into codes of a cache, and codes into values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwrap.dtypes import QuantType
from qwrap.graph.constants import Constants
from qwrap.kv_cache.grids import Lie

Array = npt.NDArray[Any]
HALF_BYTE = 16
FEW_BITS = 4
RENAMING_OPSET = 21


class Chain:
    """Nodes in a row, with free names, that are in no graph yet.

    Attributes:
        nodes: as they were made.
    """

    def __init__(self, model: ir.Model, constants: Constants, stem: str) -> None:
        self.nodes: list[ir.Node] = []
        self._model, self._constants, self._stem = model, constants, stem

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        outputs: int = 1,
    ) -> ir.Value:
        """Add a node and return its first output."""
        node = ir.node(op_type, list(inputs), attributes, num_outputs=outputs)
        node.name = self._constants.unique_name(f"{self._stem}_{op_type}")
        for value in node.outputs:
            value.name = self._constants.unique_name(f"{self._stem}_{op_type}_output")
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, what: str, array: Array) -> ir.Value:
        """Make an initialiser of the outermost graph."""
        name = self._constants.unique_name(f"{self._stem}_{what}")
        return self._constants.add(self._model.graph, name, np.asarray(array))


class Code:
    """How values of one cache and their codes belong together.

    Attributes:
        dtype: of the codes.
        real: of the values.
    """

    def __init__(
        self,
        dtype: QuantType,
        real: ir.DataType,
        scale: Array,
        zero_point: Array,
        sizes: Sequence[int],
        packed: tuple[int, int] | None = None,
        channels: int = 1,
        opset: int = 0,
    ) -> None:
        """Describe a code.

        Args:
            dtype: of the codes.
            real: of the values.
            scale: float32 ``[C]``.
            zero_point: int32 ``[C]``.
            sizes: of the axes along which scales differ, whose product is C.
            packed: which axis of a ``Lie`` has two codes a byte, and how many codes.
            channels: how many channels in a row share a scale.
            opset: of ai.onnx, that the nodes are for.
        """
        self.dtype, self.real = dtype, real
        self._scale, self._zero_point, self._sizes = scale, zero_point, sizes
        self._packed, self._channels, self._opset = packed, channels, opset

    @property
    def stored(self) -> ir.DataType:
        """Type of the graph input: two codes of 4 bits share a byte."""
        return (
            ir.DataType.UINT8 if self.dtype.bits == FEW_BITS else ir.DataType(self.dtype.onnx_type)
        )

    @property
    def offset(self) -> int:
        """What is added to codes of 4 bits so that none is negative."""
        return -int(self.dtype.qmin) if self.dtype.bits == FEW_BITS else 0

    @property
    def is_packed(self) -> bool:
        """Whether two codes share a byte, so that codes have another shape than values."""
        return self._packed is not None

    def packed_axis(self, lie: Lie) -> int | None:
        """Return the axis that is half as long for codes, None if there is none."""
        return None if self._packed is None else lie.axes[self._packed[0]]

    def _zero(self, lie: Lie) -> Array:
        """Zero points as stored, as they broadcast; one number if all are the same."""
        zero = self._zero_point + self.offset
        same = zero.size and bool((zero == zero.flat[0]).all())
        return zero.flat[0].reshape(()) if same else lie.grid(zero, self._sizes)

    def of_channels(self) -> Array:
        """Return the scale of each channel of each head, ``[heads * channels]``."""
        return np.repeat(self._scale, self._channels)

    # --- writing -----------------------------------------------------------------------------

    def write(self, chain: Chain, value: ir.Value, lie: Lie) -> ir.Value:
        """Add the nodes that make codes of ``value``."""
        if self.real != ir.DataType.FLOAT:
            value = chain.op("Cast", [value], {"to": ir.DataType.FLOAT})
        scale, zero = lie.grid(self._scale, self._sizes), self._zero(lie)
        if self.dtype.bits != FEW_BITS and not zero.ndim:
            return self._quantize(chain, value, scale, zero)
        steps = chain.op("Div", [value, chain.constant("scale", scale)])
        return self._packed_codes(chain, self._clipped(chain, steps, zero), lie)

    def _quantize(self, chain: Chain, value: ir.Value, scale: Array, zero: Array) -> ir.Value:
        """QuantizeLinear, which knows scales along one axis."""
        kind = self.stored.numpy()
        axes = [axis for axis, n in enumerate(scale.shape) if n > 1]
        attributes: dict[str, Any] = {}
        if len(axes) > 1:
            value = chain.op("Div", [value, chain.constant("scale", scale)])
            one, zero_point = np.float32(1), zero.astype(kind)
            given = [
                chain.constant("one", np.asarray(one)),
                chain.constant("zero_point", zero_point),
            ]
            return chain.op("QuantizeLinear", [value, *given])
        if axes:
            attributes, scale = {"axis": axes[0]}, scale.reshape(-1)
            zero = np.full(scale.shape, zero)
        given = [
            chain.constant("scale", scale),
            chain.constant("zero_point", zero.astype(kind)),
        ]
        return chain.op("QuantizeLinear", [value, *given], attributes)

    def _clipped(self, chain: Chain, steps: ir.Value, zero: Array) -> ir.Value:
        """The codes as floats."""
        rounded = chain.op("Round", [steps])
        if zero.any():
            moved = chain.constant("zero_point", zero.astype(np.float32))
            rounded = chain.op("Add", [rounded, moved])
        ends = [int(end) + self.offset for end in (self.dtype.qmin, self.dtype.qmax)]
        names = ("least_code", "greatest_code")
        bounds = [chain.constant(n, np.float32(e)) for n, e in zip(names, ends, strict=True)]
        return chain.op("Clip", [rounded, *bounds])

    def _packed_codes(self, chain: Chain, codes: ir.Value, lie: Lie) -> ir.Value:
        """Codes as stored: of 4 bits, those of the second half in the upper half of a byte."""
        if self._packed is not None:
            index, size = self._packed
            halves = chain.constant("halves", np.array([size // 2] * 2, np.int64))
            low = chain.op("Split", [codes, halves], {"axis": lie.axes[index]}, outputs=2)
            high = chain.nodes[-1].outputs[1]
            sixteen = chain.constant("sixteen", np.float32(HALF_BYTE))
            codes = chain.op("Add", [low, chain.op("Mul", [high, sixteen])])
        return chain.op("Cast", [codes], {"to": self.stored})

    # --- reading -----------------------------------------------------------------------------

    def read(self, chain: Chain, codes: ir.Value, lie: Lie) -> ir.Value:
        """Add the nodes that make values of ``codes``.

        One pass over the cache where there is one scale, or one for each head: onnxruntime moves
        one factor on into the matrix product, but only that of a Mul. For scales along the last
        axis DequantizeLinear takes many times as long as a Cast and a Mul.
        """
        if self.is_packed:
            codes = self._unpacked(chain, codes, lie)
        scale, zero = lie.grid(self._scale, self._sizes), self._zero(lie)
        axes = [axis for axis, n in enumerate(scale.shape) if n > 1]
        is_single = len(axes) < 2 and axes != [scale.ndim - 1]
        if is_single and (axes or zero.any()) and self._is_plain:
            return self._dequantize(chain, codes, scale.reshape(-1), zero, axes)
        given = chain.constant("scale", scale.astype(self.real.numpy()))
        return chain.op("Mul", [self._steps(chain, codes, zero), given])

    def grid(self, lie: Lie) -> Array | None:
        """Return the scales as they broadcast, None if there is one, or one for each head."""
        scale = lie.grid(self._scale, self._sizes)
        axes = [axis for axis, n in enumerate(scale.shape) if n > 1]
        return scale if len(axes) > 1 or axes == [scale.ndim - 1] else None

    def steps(self, chain: Chain, codes: ir.Value, lie: Lie) -> ir.Value:
        """Add the nodes that make values in units of the scale."""
        if self.is_packed:
            codes = self._unpacked(chain, codes, lie)
        return self._steps(chain, codes, self._zero(lie))

    @property
    def _is_plain(self) -> bool:
        """Whether onnxruntime takes DequantizeLinear behind what is moved.

        From opset 21 on it moves pairs of int8 past other nodes, gives them zero points of uint8,
        and refuses what it made.
        """
        known = self.stored != ir.DataType.INT8 or self._opset < RENAMING_OPSET
        return self.real == ir.DataType.FLOAT and known

    def _dequantize(
        self, chain: Chain, codes: ir.Value, scale: Array, zero: Array, axes: Sequence[int]
    ) -> ir.Value:
        zero = zero.reshape(-1).astype(self.stored.numpy())
        if axes:
            zero, attributes = np.broadcast_to(zero, scale.shape), {"axis": axes[0]}
        else:
            scale, zero, attributes = scale.reshape(()), zero.reshape(()), {}
        given = [chain.constant("scale", scale), chain.constant("zero_point", zero)]
        return chain.op("DequantizeLinear", [codes, *given], attributes)

    def _steps(self, chain: Chain, codes: ir.Value, zero: Array) -> ir.Value:
        if zero.any() and not zero.ndim and self._is_plain:
            return self._dequantize(chain, codes, np.ones(1, np.float32), zero, ())
        values = chain.op("Cast", [codes], {"to": self.real})
        if not zero.any():
            return values
        moved = chain.constant("zero_point", zero.astype(self.real.numpy()))
        return chain.op("Sub", [values, moved])

    def _unpacked(self, chain: Chain, codes: ir.Value, lie: Lie) -> ir.Value:
        low = chain.op("BitwiseAnd", [codes, chain.constant("mask", np.uint8(HALF_BYTE - 1))])
        four = chain.constant("four", np.uint8(FEW_BITS))
        high = chain.op("BitShift", [codes, four], {"direction": "RIGHT"})
        assert self._packed is not None
        return chain.op("Concat", [low, high], {"axis": lie.axes[self._packed[0]]})
