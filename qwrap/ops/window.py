"""The arithmetic of sliding windows, shared by convolution and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Window:
    """A window sliding over the spatial axes, one entry per axis.

    Attributes:
        kernel: elements the window covers.
        strides: elements from one position to the next.
        dilations: elements from one covered element to the next.
        begin: padding before the first element.
        end: padding after the last element.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def symmetric(self) -> bool:
        """Whether torch's single padding per axis can express the padding."""
        return self.begin == self.end and all(p >= 0 for p in self.begin)

    @property
    def extents(self) -> tuple[int, ...]:
        """Elements from the first to the last covered one, both included."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))


def window(
    x: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int] | None,
    dilations: Sequence[int] | None,
    pads: Sequence[int] | None,
    auto_pad: str,
    *,
    same_undilated: bool = False,
) -> Window:
    """Return the window that the attributes of a node mean for an input ``[N, C, ...]``.

    With ``same_undilated`` ``SAME_UPPER`` and ``SAME_LOWER`` pad as if the window were not
    dilated, as onnxruntime does for pooling; fewer windows than the standard wants then fit.
    """
    rank = len(kernel)
    step = tuple(strides) if strides else (1,) * rank
    dilation = tuple(dilations) if dilations else (1,) * rank
    begin, end = (0,) * rank, (0,) * rank
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        spread = (1,) * rank if same_undilated else dilation
        extents = [(k - 1) * d + 1 for k, d in zip(kernel, spread, strict=True)]
        totals = [
            max((-(-n // s) - 1) * s + e - n, 0)  # ceil(n / s) positions are wanted
            for n, s, e in zip(x.shape[2:], step, extents, strict=True)
        ]
        begin, end = split_padding(totals, auto_pad)
    elif pads and auto_pad != "VALID":
        begin, end = tuple(pads[:rank]), tuple(pads[rank:])
    return Window(tuple(kernel), step, dilation, begin, end)


def split_padding(totals: Sequence[int], auto_pad: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what goes before and after; SAME_UPPER puts the odd element after."""
    less = tuple(total // 2 for total in totals)
    more = tuple(total - total // 2 for total in totals)
    return (more, less) if auto_pad == "SAME_LOWER" else (less, more)


def torch_pads(begin: Sequence[int], end: Sequence[int]) -> list[int]:
    """Return paddings in the order of ``F.pad``: last axis first, before and after it."""
    return [p for pair in reversed(list(zip(begin, end, strict=True))) for p in pair]
