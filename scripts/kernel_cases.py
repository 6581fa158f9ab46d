"""The operators and shapes that the cost rates are fitted on."""

from __future__ import annotations

from collections.abc import Iterator

from kernel_models import Case


def cases() -> Iterator[Case]:
    """All of them; sizes as in mobile and desktop networks."""
    yield from _convolutions()
    yield from _products()
    yield from _elementwise()
    yield from _pools_and_moves()


def _conv(cin: int, cout: int, kernel: int, size: int, group: int = 1, stride: int = 1) -> Case:
    pad = kernel // 2
    attributes = {"group": group, "pads": [pad] * 4, "strides": [stride] * 2}
    return Case(
        op_type="Conv",
        x=(1, cin, size, size),
        weight=(cout, cin // group, kernel, kernel),
        attributes={**attributes, "kernel_shape": [kernel] * 2},
    )


def _convolutions() -> Iterator[Case]:
    for cin, cout, size in [(16, 16, 32), (16, 64, 28), (32, 32, 56), (64, 64, 28), (64, 256, 14),
                            (128, 128, 14), (96, 24, 56), (240, 40, 20), (256, 256, 14),
                            (256, 64, 28), (512, 512, 7), (48, 48, 10), (24, 24, 80)]:  # fmt: skip
        yield _conv(cin, cout, 1, size)
    for cin, cout, size in [(16, 16, 32), (32, 32, 16), (32, 32, 56), (64, 64, 28), (64, 64, 8),
                            (128, 128, 14), (64, 32, 28), (16, 64, 54), (256, 256, 7)]:  # fmt: skip
        yield _conv(cin, cout, 3, size)
    for cin, cout, kernel, size, stride in [(1, 8, 5, 28, 1), (3, 16, 3, 32, 1), (3, 32, 3, 64, 2),
                                            (3, 64, 7, 112, 2), (8, 16, 5, 14, 1), (8, 8, 3, 48, 1),
                                            (3, 24, 3, 160, 2), (8, 32, 1, 48, 1)]:  # fmt: skip
        yield _conv(cin, cout, kernel, size, stride=stride)
    for channels, kernel, size, stride in [(16, 3, 64, 1), (32, 3, 56, 1), (32, 5, 32, 1),
                                           (96, 3, 28, 1), (144, 3, 56, 2), (240, 5, 14, 1),
                                           (64, 5, 40, 2), (480, 3, 7, 1), (120, 3, 40, 1),
                                           (24, 3, 80, 1), (116, 3, 20, 1), (64, 3, 28, 1),
                                           (128, 3, 14, 1), (72, 5, 28, 1),
                                           (40, 3, 40, 1)]:  # fmt: skip
        yield _conv(channels, channels, kernel, size, channels, stride)
    for cin, cout, kernel, size, group in [(64, 64, 1, 32, 4), (128, 128, 1, 16, 4),
                                           (256, 256, 1, 16, 4), (32, 32, 1, 64, 4),
                                           (64, 128, 1, 32, 4), (24, 24, 3, 40, 4),
                                           (48, 24, 1, 32, 4),
                                           (64, 64, 3, 28, 4), (128, 64, 1, 32, 2),
                                           (50, 10, 3, 64, 10), (128, 48, 3, 64, 16),
                                           (256, 64, 3, 32, 16), (10, 10, 3, 128, 10),
                                           (10, 10, 3, 64, 10), (64, 64, 3, 16, 8),
                                           (128, 32, 3, 32, 16)]:  # fmt: skip
        yield _conv(cin, cout, kernel, size, group)


def _products() -> Iterator[Case]:
    for rows in (1, 8, 16, 64, 256):
        for depth, columns in [(16, 16), (16, 64), (64, 16), (64, 64), (64, 172), (172, 64),
                               (96, 96), (64, 384), (384, 384), (384, 1536),
                               (1536, 384)]:  # fmt: skip
            yield Case(op_type="MatMul", x=(rows, depth), weight=(depth, columns))
    for shape in [(1, 12, 16, 32), (1, 12, 64, 32), (1, 8, 64, 8), (1, 8, 32, 64), (1, 4, 128, 64)]:
        yield Case(op_type="MatMul", x=shape, operands=2)


_MAPS = [(1, 16, 16, 16), (1, 32, 32, 32), (1, 64, 28, 28), (1, 32, 64, 64), (1, 64, 56, 56)]


def _elementwise() -> Iterator[Case]:
    for shape in _MAPS:
        for op_type in ("Add", "Mul"):
            yield Case(op_type=op_type, x=shape, operands=2)
        for op_type in ("LeakyRelu", "Sigmoid"):
            yield Case(op_type=op_type, x=shape)
        yield Case(op_type="PRelu", x=shape, weight=(shape[1], 1, 1))
        yield Case(op_type="Concat", x=shape, operands=2, attributes={"axis": 1})
        yield Case(op_type="Softmax", x=(shape[1] * 4, shape[2] * shape[3] // 4))


def _pools_and_moves() -> Iterator[Case]:
    for shape in _MAPS:
        yield Case(op_type="GlobalAveragePool", x=shape, behind_conv=True)
        for op_type in ("AveragePool", "MaxPool"):
            for kernel in (2, 3):
                attributes = {"kernel_shape": [kernel] * 2, "strides": [2, 2]}
                yield Case(op_type=op_type, x=shape, behind_conv=True, attributes=attributes)
        yield Case(op_type="Transpose", x=shape, attributes={"perm": [0, 2, 1, 3]})
        yield Case(op_type="Transpose", x=shape, attributes={"perm": [0, 2, 3, 1]})
