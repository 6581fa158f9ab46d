"""Selection of bounding boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwrap.ops.registry import op


def _number(value: float | Sequence[float] | None, default: float) -> float:
    if isinstance(value, Sequence):
        return value[0] if value else default
    return default if value is None else value


@op("NonMaxSuppression", since=(10, 11), host=(2, 3, 4))
def non_max_suppression(
    boxes: Tensor,
    scores: Tensor,
    max_output_boxes_per_class: int | Sequence[int] | None = None,
    iou_threshold: float | Sequence[float] | None = None,
    score_threshold: float | Sequence[float] | None = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    """Select, best first, the boxes that overlap no better one of their class too much.

    Args:
        boxes: ``[N, boxes, 4]``.
        scores: ``[N, classes, boxes]``.

    Returns:
        A row ``(sample, class, box)`` for each selected box.
    """
    limit = min(int(_number(max_output_boxes_per_class, 0)), boxes.shape[1])
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    alive = torch.ones_like(ranked, dtype=torch.bool)
    if score_threshold is not None:
        alive = ranked > _number(score_threshold, 0.0)
    corners = _corners(boxes, center_point_box).unsqueeze(1).expand(-1, scores.shape[1], -1, -1)
    corners = corners.gather(2, order.unsqueeze(3).expand(*order.shape, 4))
    picks = _picks(corners, alive, limit, _number(iou_threshold, 0.0))
    chosen = order.gather(2, picks.clamp(min=0))
    sample, label, place = (picks >= 0).nonzero(as_tuple=True)
    return torch.stack((sample, label, chosen[sample, label, place]), 1)


def _corners(boxes: Tensor, center_point_box: int) -> Tensor:
    """Return ``(y1, x1, y2, x2)``, the smaller coordinates first."""
    if center_point_box:
        x, y, width, height = boxes.unbind(-1)
        return torch.stack((y - height / 2, x - width / 2, y + height / 2, x + width / 2), -1)
    first, second = boxes[..., :2], boxes[..., 2:]
    return torch.cat((torch.minimum(first, second), torch.maximum(first, second)), -1)


def _picks(boxes: Tensor, alive: Tensor, limit: int, threshold: float) -> Tensor:
    """Return the positions of the selected boxes of each class, -1 where none is left.

    Args:
        boxes: corners, ``[N, classes, boxes, 4]``, best first.
        alive: which boxes may be selected.
    """
    count = boxes.shape[2]
    order = torch.arange(count, 0, -1, device=boxes.device)
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    picks = []
    for _ in range(limit):
        if not alive.any():
            break
        best = torch.where(alive, order, 0).argmax(-1, keepdim=True)
        some = alive.any(-1, keepdim=True)
        picks.append(torch.where(some, best, -1))
        box = boxes.gather(2, best.unsqueeze(3).expand(*best.shape, 4))
        overlap = _overlap(boxes, area, box, area.gather(2, best), threshold)
        alive = alive & ~overlap & (order != count - best)
    if not picks:
        return alive.new_zeros((*alive.shape[:2], 0), dtype=torch.int64)
    return torch.cat(picks, -1)


def _overlap(
    boxes: Tensor, area: Tensor, box: Tensor, box_area: Tensor, threshold: float
) -> Tensor:
    """Return which boxes share with ``box`` more than ``threshold`` of what both cover."""
    low, high = (
        torch.maximum(boxes[..., :2], box[..., :2]),
        torch.minimum(boxes[..., 2:], box[..., 2:]),
    )
    shared = (high - low).clamp(min=0).prod(-1)
    union = area + box_area - shared
    real = (area > 0) & (box_area > 0) & (union > 0)
    return real & (shared / union > threshold)
