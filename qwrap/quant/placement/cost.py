"""What an operator costs in onnxruntime on CPU, as float and as integer kernel, in nanoseconds.

A static estimate from shapes alone, the same wherever it is computed: it decides which nodes are
worth their conversions, it does not predict a latency. Every kernel is a *work* (how often it
multiplies, gathers and writes, counted as the kernel pads and loops) times its *rate*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

Shape = tuple[int, ...]

_LANES = 16  # float32 lanes of a vector register; channel block of NCHWc, column tile of the GEMMs
_DOT = 4  # bytes that one integer dot product instruction sums


@dataclass(frozen=True, slots=True)
class Work:
    """How much one kernel does.

    Attributes:
        kernel: row of the table of rates.
        macs: multiplications and additions, of padding too.
        gathered: elements collected before multiplying: windows laid out as rows, weights read.
        written: elements of the output.
    """

    kernel: str
    macs: float = 0
    gathered: float = 0
    written: float = 0


@dataclass(frozen=True, slots=True)
class Rate:
    """Nanoseconds: once per node, per multiplication, per gathered and per written element."""

    fixed: float = 0.0
    mac: float = 0.0
    gather: float = 0.0
    write: float = 0.0

    def cost(self, work: Work) -> float:
        """Return the estimated time of ``work`` in nanoseconds."""
        return (
            self.fixed
            + self.mac * work.macs
            + self.gather * work.gathered
            + self.write * work.written
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCosts:
    """The rates of one runtime on one class of machine.

    Attributes:
        rates: kernel name of a ``Work`` -> rate.
    """

    rates: Mapping[str, Rate]

    def cost(self, work: Work | None) -> float:
        """Return nanoseconds for one node; infinity where there is no kernel."""
        return math.inf if work is None else self.rates[work.kernel].cost(work)


# --- how much a node does ------------------------------------------------------------------------

_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_CHEAP = frozenset({
    "Abs",
    "Clip",
    "Floor",
    "HardSigmoid",
    "LeakyRelu",
    "Max",
    "Min",
    "Neg",
    "Relu",
})
_BINARY = frozenset({"Add", "Div", "Equal", "Greater", "Less", "Mul", "Sub", "Where"})
_CURVES = frozenset({
    "Elu", "Erf", "Exp", "Gelu", "HardSwish", "Log", "Pow", "Sigmoid", "Softplus", "Sqrt", "Tanh",
})  # fmt: skip
_INTEGER_ELEMENTWISE = {
    "Add": "integer add",
    "Concat": "integer concat",
    "LeakyRelu": "integer lookup",
    "Mul": "integer mul",
    "Sigmoid": "integer lookup",
    "Softmax": "integer softmax",
    "Where": "integer lookup",
}
_MOVES = frozenset({
    "Expand", "Gather", "GatherElements", "Resize", "Slice", "Split", "Tile",
})  # fmt: skip


def float_work(
    op_type: str,
    inputs: Sequence[Shape],
    output: Shape,
    weight_shape: Shape | None = None,
    group: int = 1,
    window: int = 9,
) -> Work:
    """Return what the float kernel of a node does; parameters as in ``float_cost``."""
    size = math.prod(output)
    if op_type == "Conv" and weight_shape is not None:
        return _float_conv(output, weight_shape, group)
    if op_type in ("Gemm", "MatMul"):
        return _gemm("float", inputs, output, weight_shape, 1)
    if op_type in ("AveragePool", "MaxPool"):
        return Work("float pool", gathered=size * window, written=size)
    if op_type in ("GlobalAveragePool", "GlobalMaxPool") or op_type.startswith("Reduce"):
        return Work("float reduce", gathered=math.prod(inputs[0]), written=size)
    if op_type == "PRelu":
        return Work("float prelu", written=size)
    if op_type in _VIEWS:
        return Work("view")
    if op_type == "DepthToSpace":
        return Work("float depth to space", written=size)
    if op_type == "Transpose":
        return Work("float transpose", written=size)
    if op_type in _MOVES or op_type == "Concat":
        return Work("float move", written=size)
    if op_type in _CHEAP:
        return Work("float unary", written=size)
    if op_type in _BINARY:
        return Work("float binary", written=size)
    return Work("float curve" if op_type in _CURVES else "float softmax", written=size)


def integer_work(
    op_type: str,
    inputs: Sequence[Shape],
    output: Shape,
    weight_shape: Shape | None = None,
    group: int = 1,
    window: int = 9,
) -> Work | None:
    """Return what the integer kernel of a node does, None where there is none."""
    size = math.prod(output)
    if op_type == "Conv" and weight_shape is not None:
        return _integer_conv(output, weight_shape, group)
    if op_type in ("Gemm", "MatMul"):
        return _gemm("integer", inputs, output, weight_shape, _DOT)
    if op_type == "AveragePool":
        return Work("integer average", gathered=size * window, written=size)
    if op_type == "MaxPool":
        return Work("integer maximum", gathered=size * window, written=size)
    if op_type == "GlobalAveragePool":
        return Work("integer reduce", gathered=math.prod(inputs[0]), written=size)
    if op_type in _VIEWS:
        return Work("view")
    if op_type == "DepthToSpace":
        return Work("integer depth to space", written=size)
    if op_type == "Transpose":
        return Work("integer transpose", written=size)
    if op_type in _MOVES:
        return Work("integer move", written=size)
    kernel = _INTEGER_ELEMENTWISE.get(op_type)
    return None if kernel is None else Work(kernel, written=size)


def _float_conv(output: Shape, weight_shape: Shape, group: int) -> Work:
    """Blocked by channels (NCHWc) where the channels allow it, else rows of windows and a GEMM."""
    channels, depth, window, places = _conv_sizes(output, weight_shape)
    size = math.prod(output)
    blocked = len(output) == 4
    if group > 1 and depth == 1 and channels == group and blocked and channels % 4 == 0:
        macs = places * _round_up(channels, _LANES) * window
        return Work("float conv depthwise", macs=macs, written=size)
    columns = channels // group
    macs = places * group * _round_up(columns, _LANES) * depth * window
    if group == 1 and depth < _LANES and blocked:
        return Work("float conv shallow", macs=macs, written=size)
    aligned = depth % 4 == 0 if group == 1 else depth % _LANES == 0 and columns % _LANES == 0
    if not (blocked and aligned):
        rows = places * group * depth * window if window > 1 else 0
        return Work("float conv rows", macs=size * depth * window, gathered=rows, written=size)
    return Work("float conv 1x1" if window == 1 else "float conv", macs=macs, written=size)


def _integer_conv(output: Shape, weight_shape: Shape, group: int) -> Work:
    """Depthwise directly; else windows laid out as rows, and one GEMM for each group.

    Gathering costs by the piece, the channels of one group at one place of a window, not by the
    byte: a convolution of few channels spends most of its time there.
    """
    channels, depth, window, places = _conv_sizes(output, weight_shape)
    size = math.prod(output)
    if group > 1 and depth == 1 and channels == group:
        kernel = "integer conv depthwise"
        if channels % _LANES:  # leftover channels run one by one
            kernel = "integer conv depthwise uneven"
        return Work(kernel, macs=size * window, gathered=places * window, written=size)
    columns = _round_up(channels // group, _LANES)
    macs = places * group * columns * _round_up(depth * window, _DOT)
    pieces = 0 if window == 1 and group == 1 else places * group * window
    kernel = "integer conv" if group == 1 else "integer conv grouped"
    return Work(kernel, macs=macs, gathered=pieces, written=size)


def _conv_sizes(output: Shape, weight_shape: Shape) -> tuple[int, int, int, int]:
    """Return output channels, input channels of a group, window size, output positions."""
    places = output[0] * math.prod(output[2:])
    return weight_shape[0], weight_shape[1], math.prod(weight_shape[2:]), places


def _gemm(
    kind: str, inputs: Sequence[Shape], output: Shape, weight_shape: Shape | None, dot: int
) -> Work:
    depth, columns = inputs[0][-1], output[-1]
    macs = math.prod(output[:-1]) * _round_up(columns, _LANES) * _round_up(depth, dot)
    size = math.prod(output)
    if weight_shape is not None:
        return Work(f"{kind} gemm", macs=macs, gathered=depth * columns, written=size)
    matrices = math.prod(output[:-2])
    return Work(f"{kind} product", macs=macs, gathered=matrices * depth * columns, written=size)


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


# --- what it costs -------------------------------------------------------------------------------

# Fitted by scripts/fit_costs.py to onnxruntime 1.31 on one thread of a CPU with AVX512-VNNI, each
# kernel on its own at sizes of mobile networks; columns: fixed, mac, gather, write. Median error of
# a row mostly below 10 %, worst 35 % (60 % for small "integer conv", 80 % for layouts and moves).
# Whole networks find caches colder and take 1.1 to 2 times as long, float and integer alike.
# Two are therefore taken from networks instead: what a GEMM pays for its weights ("gather"; alone
# 0.027 and 0.006), and "float prelu", which mispredicts a branch on each change of sign.
ORT_CPU_COSTS = KernelCosts(
    rates=MappingProxyType({
        "quantize": Rate(1000, 0, 0, 0.0555),
        "dequantize": Rate(900, 0, 0, 0.09),
        "float layout": Rate(700, 0, 0, 0.081),
        "integer layout": Rate(700, 0, 0, 0.037),
        "view": Rate(700, 0, 0, 0),
        "float conv": Rate(2740, 0.00757, 0, 0.246),
        "float conv 1x1": Rate(1070, 0.00819, 0, 0.0126),
        "float conv depthwise": Rate(2490, 0.00991, 0, 0.0535),
        "float conv rows": Rate(0, 0.0302, 0.0955, 0),
        "float conv shallow": Rate(2570, 0.00829, 0, 0.085),
        "integer conv": Rate(1980, 0.00194, 1.0, 0.051),
        "integer conv depthwise": Rate(1840, 0.0109, 0.559, 0.074),
        "integer conv depthwise uneven": Rate(10500, 0.0267, 1.68, 0.151),
        "integer conv grouped": Rate(4670, 0.00214, 3.07, 0.0827),
        "float gemm": Rate(958, 0.00747, 0.2, 0),
        "float product": Rate(1860, 0.00798, 0.0749, 0),
        "integer gemm": Rate(1350, 0.00195, 0.05, 0.131),
        "integer product": Rate(3030, 0.00459, 0.0145, 0.189),
        "float binary": Rate(700, 0, 0, 0.105),
        "integer add": Rate(1820, 0, 0, 0.0925),
        "integer mul": Rate(1820, 0, 0, 0.179),
        "float unary": Rate(1210, 0, 0, 0.185),
        "float curve": Rate(1200, 0, 0, 0.231),
        "float softmax": Rate(1080, 0, 0, 0.193),
        "float prelu": Rate(1200, 0, 0, 1.7),
        "integer lookup": Rate(1150, 0, 0, 0.25),
        "integer softmax": Rate(1570, 0, 0, 2.03),
        "float pool": Rate(780, 0, 0.0134, 0.06),
        "integer average": Rate(1510, 0, 0.374, 5.08),
        "integer maximum": Rate(1060, 0, 0.0105, 0.131),
        "float reduce": Rate(964, 0, 0.0341, 0),
        "integer reduce": Rate(1110, 0, 0.0244, 0),
        "integer concat": Rate(1220, 0, 0, 0.112),
        "float move": Rate(700, 0, 0, 0.065),
        "integer move": Rate(700, 0, 0, 0.035),
        "float depth to space": Rate(1000, 0, 0, 1.05),
        "integer depth to space": Rate(1000, 0, 0, 0.74),
        "float transpose": Rate(930, 0, 0, 0.129),
        "integer transpose": Rate(1170, 0, 0, 0.041),
    })
)


def float_cost(
    op_type: str,
    inputs: Sequence[Shape],
    output: Shape,
    weight_shape: Shape | None = None,
    group: int = 1,
    window: int = 9,
) -> float:
    """Return nanoseconds of a node as a float kernel, standing alone.

    An activation that onnxruntime fuses into the Conv before it costs nothing of its own: leave
    it out.

    Args:
        op_type: ONNX operator; one not known counts as a dear elementwise one, Resize as nearest
            (the other modes have no integer kernel to compare with).
        inputs: shapes of the data inputs.
        output: shape of the first output.
        weight_shape: shape of a stored weight of Conv, Gemm or MatMul; None if it is computed.
        group: as the attribute of Conv.
        window: elements in the window of a pooling operator.
    """
    return ORT_CPU_COSTS.cost(float_work(op_type, inputs, output, weight_shape, group, window))


def integer_cost(
    op_type: str,
    inputs: Sequence[Shape],
    output: Shape,
    weight_shape: Shape | None = None,
    group: int = 1,
    window: int = 9,
) -> float:
    """Return nanoseconds of a node as an integer kernel; infinity if there is none.

    Parameters as in ``float_cost``; conversions at the border are not included.
    """
    return ORT_CPU_COSTS.cost(integer_work(op_type, inputs, output, weight_shape, group, window))


def quantize_cost(elements: int) -> float:
    """Return nanoseconds of a QuantizeLinear from float32 to 8 bits."""
    return ORT_CPU_COSTS.cost(Work("quantize", written=elements))


def dequantize_cost(elements: int) -> float:
    """Return nanoseconds of a DequantizeLinear from 8 bits to float32."""
    return ORT_CPU_COSTS.cost(Work("dequantize", written=elements))


def integer_layout_cost(elements: int) -> float:
    """Return nanoseconds to bring codes into or out of the layout of integer convolutions."""
    return ORT_CPU_COSTS.cost(Work("integer layout", written=elements))


def float_layout_cost(elements: int) -> float:
    """Return nanoseconds to bring floats into or out of the layout of float convolutions."""
    return ORT_CPU_COSTS.cost(Work("float layout", written=elements))
