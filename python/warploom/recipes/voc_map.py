"""Mean average precision by the rules of the PASCAL VOC challenge.

Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge" (IJCV 2010), section 4.2. Boxes are in
continuous coordinates, as everywhere in this library; the challenge's own programs add a pixel to each side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from warploom.models.boxes import box_iou

METHODS = ("area", "11point")


@dataclass(frozen=True)
class Detections:
    """What was found in an image: boxes [N, 4], scores [N], labels int64 [N]."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class GroundTruth:
    """What is in an image: boxes [M, 4], labels int64 [M].

    Attributes:
        difficult: bool [M], objects that need not be found: to find one counts neither for nor against.
    """

    boxes: Tensor
    labels: Tensor
    difficult: Tensor | None = None


@dataclass(frozen=True)
class MeanAveragePrecision:
    """The average precision of each class that occurs in the ground truth, and their mean."""

    mean: float
    of_class: dict[int, float]


def average_precision(recall: Tensor, precision: Tensor, method: str = "area") -> float:
    """The area under a curve of precision, made monotone, over recall; or its mean at 11 recalls.

    Args:
        recall, precision: [N], after each detection, best first; recall never falls.
        method: "area" (VOC 2010 and later) or "11point" (VOC 2007: the mean, over the recalls 0, 0.1, ...,
            1, of the greatest precision at that recall or a higher one).
    """
    if method not in METHODS:
        raise ValueError(f"average_precision: method: expected area or 11point, got {method!r}")
    recall, precision = recall.double(), precision.double()
    best_from_here = precision.flip(0).cummax(0).values.flip(0)
    if method == "area":
        steps = torch.diff(recall, prepend=recall.new_zeros(1))
        return float((steps * best_from_here).sum())
    points = torch.arange(11, dtype=torch.float64) / 10
    # A recall of 3/10 is the point 0.3, whichever way it was rounded.
    first = torch.searchsorted(recall, points - 1e-9)
    padded = torch.cat([best_from_here, best_from_here.new_zeros(1)])
    return float(padded[first].mean())


def precision_recall(
    detections: Sequence[Detections],
    truths: Sequence[GroundTruth],
    label: int,
    iou_threshold: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """(recall [N], precision [N]) of a class after each of its detections, best score first.

    A detection is compared with the object of its image that it overlaps most. It is right if they overlap by
    `iou_threshold` at least and no better detection has found that object; a second one of it is wrong.
    """
    hits: list[tuple[float, bool]] = []
    objects = 0
    for found, truth in zip(detections, truths, strict=True):
        mine = truth.labels == label
        boxes = truth.boxes[mine]
        difficult = torch.zeros(len(boxes), dtype=torch.bool)
        if truth.difficult is not None:
            difficult = truth.difficult[mine].cpu()
        objects += int((~difficult).sum())
        chosen = found.labels == label
        scores, overlaps = found.scores[chosen], box_iou(found.boxes[chosen], boxes)
        taken = set()
        for rank in scores.argsort(descending=True, stable=True).tolist():
            score, hit = float(scores[rank]), False
            if len(boxes):
                nearest = int(overlaps[rank].argmax())
                hit = float(overlaps[rank, nearest]) >= iou_threshold
                if hit and bool(difficult[nearest]):
                    continue
                hit = hit and nearest not in taken
                if hit:
                    taken.add(nearest)
            hits.append((score, hit))
    hits.sort(key=lambda entry: -entry[0])
    right = torch.tensor([hit for _, hit in hits], dtype=torch.float64).cumsum(0)
    return right / max(1, objects), right / torch.arange(1, len(hits) + 1)


def mean_average_precision(
    detections: Sequence[Detections],
    truths: Sequence[GroundTruth],
    *,
    iou_threshold: float = 0.5,
    method: str = "area",
) -> MeanAveragePrecision:
    """The mean over the classes with an object that is not difficult; NaN if there is none.

    Args:
        detections, truths: one of each for an image.
        iou_threshold: the least overlap of a detection that is right.
        method: see `average_precision`.
    """
    classes: set[int] = set()
    for truth in truths:
        labels = truth.labels if truth.difficult is None else truth.labels[~truth.difficult]
        classes |= set(labels.tolist())
    of_class = {
        label: average_precision(
            *precision_recall(detections, truths, label, iou_threshold), method=method
        )
        for label in sorted(classes)
    }
    mean = sum(of_class.values()) / len(of_class) if of_class else float("nan")
    return MeanAveragePrecision(mean, of_class)
