"""Boxes (x1, y1, x2, y2) in continuous coordinates: overlap, suppression, regression targets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Greatest log of a predicted side's ratio to the proposal's: a box may grow to 1000 pixels from 16.
_LARGEST_LOG_RATIO = math.log(1000.0 / 16.0)


def box_area(boxes: Tensor) -> Tensor:
    """boxes [..., 4] -> areas [...]; a box with a side below 0 has area 0."""
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """boxes [N, 4], others [M, 4] -> intersection over union [N, M]; 0 where both are empty."""
    top_left = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    bottom_right = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = box_area(torch.cat([top_left, bottom_right], dim=-1))
    union = box_area(boxes)[:, None] + box_area(others)[None] - shared
    return torch.where(union > 0, shared / union, torch.zeros_like(union))


def nms(boxes: Tensor, scores: Tensor, threshold: float, labels: Tensor | None = None) -> Tensor:
    """Greedy non-maximum suppression: a box goes if it overlaps a better one that stays.

    Deterministic: equal scores keep their order. It is computed for all boxes at once: "box j stays unless
    some better i stays and overlaps it" has one solution, and a pass over the N x N overlaps settles at least
    one more rank, usually nearly all, until nothing changes.

    Args:
        boxes: [N, 4].
        scores: [N].
        threshold: the intersection over union above which two boxes overlap.
        labels: [N]; boxes of different labels never suppress each other. Default: one label.

    Returns: int64 indices of the boxes that stay, best first.
    """
    order = scores.argsort(descending=True, stable=True)
    ranked = boxes[order]
    overlaps = box_iou(ranked, ranked) > threshold
    if labels is not None:
        overlaps &= labels[order][:, None] == labels[order][None]
    suppresses = overlaps.triu(diagonal=1)
    stays = torch.ones_like(order, dtype=torch.bool)
    while True:
        next_stays = ~(suppresses & stays[:, None]).any(0)
        if torch.equal(next_stays, stays):
            return order[stays]
        stays = next_stays


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """boxes [..., 4] inside an image of size (height, width)."""
    height, width = size
    limits = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limits)


def _centers_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def encode_boxes(boxes: Tensor, proposals: Tensor) -> Tensor:
    """Regression targets: ((center - proposal's) / proposal's side, log(side / proposal's side)).

    Girshick et al., R-CNN (arXiv:1311.2524), appendix C.

    Args:
        boxes, proposals: [..., 4], with sides above 0.

    Returns: [..., 4] (dx, dy, dw, dh).
    """
    center, sides = _centers_and_sides(boxes)
    anchor, anchor_sides = _centers_and_sides(proposals)
    return torch.cat([(center - anchor) / anchor_sides, (sides / anchor_sides).log()], dim=-1)


def decode_boxes(deltas: Tensor, proposals: Tensor) -> Tensor:
    """The boxes [..., 4] that `encode_boxes` gave as deltas; a side grows at most 62.5 times."""
    anchor, anchor_sides = _centers_and_sides(proposals)
    center = anchor + deltas[..., :2] * anchor_sides
    half = anchor_sides * deltas[..., 2:].clamp(max=_LARGEST_LOG_RATIO).exp() / 2
    return torch.cat([center - half, center + half], dim=-1)
