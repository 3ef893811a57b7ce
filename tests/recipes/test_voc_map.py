"""VOC's average precision, against cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from warploom.recipes.voc_map import (
    Detections,
    GroundTruth,
    average_precision,
    mean_average_precision,
    precision_recall,
)

FIRST, SECOND, THIRD = [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]
NOWHERE = [100, 100, 110, 110]


def boxes(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def found(*entries: tuple[list[float], float], label: int = 1) -> Detections:
    return Detections(
        boxes(*(box for box, _ in entries)),
        torch.tensor([score for _, score in entries]),
        torch.full((len(entries),), label),
    )


def truth(*rows: list[float], label: int = 1, difficult: list[bool] | None = None) -> GroundTruth:
    flags = None if difficult is None else torch.tensor(difficult)
    return GroundTruth(boxes(*rows), torch.full((len(rows),), label), flags)


def test_area_under_the_monotone_curve():
    """Right, wrong, right, wrong of 3 objects: recall 1/3 at precision 1, then 2/3 at 2/3."""
    detections = found((FIRST, 0.9), (NOWHERE, 0.8), (SECOND, 0.7), (NOWHERE, 0.6))
    recall, precision = precision_recall([detections], [truth(FIRST, SECOND, THIRD)], 1)
    assert recall.tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2])
    assert average_precision(recall, precision) == pytest.approx(1 / 3 + 2 / 9)
    # Recalls 0, .1, .2, .3 are reached at precision 1; .4, .5, .6 at 2/3; .7 and above never.
    assert average_precision(recall, precision, "11point") == pytest.approx((4 + 3 * 2 / 3) / 11)


@pytest.mark.parametrize("method", ["area", "11point"])
@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        (found((FIRST, 0.9), (SECOND, 0.8)), 1.0),
        (found((NOWHERE, 0.9)), 0.0),
        (found(), 0.0),
    ],
    ids=["all found", "none right", "no detections"],
)
def test_the_ends_of_the_scale(detections, expected, method):
    result = mean_average_precision([detections], [truth(FIRST, SECOND)], method=method)
    assert result.mean == pytest.approx(expected)


def test_recall_of_tenths_is_at_the_points():
    """3 right of 10 objects: the points 0, 0.1, 0.2 and 0.3."""
    recall = torch.tensor([0.1, 0.2, 0.1 * 3])
    assert average_precision(recall, torch.ones(3), "11point") == pytest.approx(4 / 11)


def test_second_detection_of_an_object_is_wrong():
    detections = found((FIRST, 0.9), ([0, 0, 10, 9], 0.8), (SECOND, 0.7))
    recall, precision = precision_recall([detections], [truth(FIRST, SECOND)], 1)
    assert recall.tolist() == [0.5, 0.5, 1.0]
    assert precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3])


def test_the_better_detection_takes_the_object():
    worse_first = found(([0, 0, 10, 9], 0.3), (FIRST, 0.9))
    _, precision = precision_recall([worse_first], [truth(FIRST)], 1)
    assert precision.tolist() == [1.0, 0.5]


def test_detections_of_all_images_are_ranked_together():
    detections = [found((FIRST, 0.5)), found((NOWHERE, 0.9))]
    recall, precision = precision_recall(detections, [truth(FIRST), truth(FIRST)], 1)
    assert recall.tolist() == [0.0, 0.5]
    assert precision.tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("height", "right"), [(5.0, True), (4.9, False)], ids=["half", "below half"]
)
def test_half_an_overlap_is_right(height, right):
    result = mean_average_precision([found(([0, 0, 10, height], 1.0))], [truth(FIRST)])
    assert result.mean == float(right)


def test_difficult_objects_count_neither_way():
    image = truth(FIRST, SECOND, difficult=[False, True])
    both = found((SECOND, 0.9), (SECOND, 0.8), (FIRST, 0.7))
    recall, precision = precision_recall([both], [image], 1)
    assert recall.tolist() == precision.tolist() == [1.0]
    assert mean_average_precision([found((FIRST, 1.0))], [image]).mean == 1.0


def test_mean_over_classes_of_the_ground_truth():
    """Class 1 is found, class 2 is not; class 3 has detections but no object."""
    truths = [truth(FIRST), truth(SECOND, label=2)]
    detections = [found((FIRST, 0.9)), found((SECOND, 0.9), label=3)]
    result = mean_average_precision(detections, truths)
    assert result.of_class == {1: 1.0, 2: 0.0}
    assert result.mean == 0.5


def test_nothing_to_find_has_no_mean():
    assert math.isnan(mean_average_precision([found((FIRST, 0.9))], [truth()]).mean)


def test_method_is_checked():
    with pytest.raises(ValueError, match="expected area or 11point, got 'coco'"):
        average_precision(torch.ones(1), torch.ones(1), "coco")
