"""SPP-Net: images and regions of any size, its mapping of boxes, its losses and its suppression."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from warploom.models.boxes import box_iou, clip_boxes, decode_boxes, encode_boxes, nms
from warploom.models.resnet import resnet18
from warploom.models.spp_net import (
    SPPNetClassifier,
    SPPNetDetector,
    assign_proposals,
    project_windows,
)
from warploom.models.trunk import conv_trunk, resnet_trunk, zf5_trunk

SMALL = {"levels": (2, 1), "hidden_size": 16, "dropout": 0.0}


def boxes(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def random_boxes(count: int, size: float = 40.0) -> Tensor:
    corners = torch.rand(count, 4) * size
    corners[:, 2:] += corners[:, :2] + 1
    return corners


def detector(**changes) -> SPPNetDetector:
    return SPPNetDetector(conv_trunk(1, (6, 8), (2, 2)), 2, **{**SMALL, **changes})


# Boxes


def test_iou_of_known_overlaps():
    ours = boxes([0, 0, 4, 4], [1, 1, 1, 1])
    others = boxes([2, 0, 6, 4], [4, 0, 8, 4], [1, 1, 3, 3], [1, 1, 1, 1])
    expected = torch.tensor([[1 / 3, 0, 1 / 4, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(box_iou(ours, others), expected)


def greedy(boxes: Tensor, scores: Tensor, threshold: float, labels: Tensor) -> list[int]:
    """The textbook's loop."""
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -float(scores[i])):
        rivals = [j for j in kept if labels[j] == labels[i]]
        if all(float(box_iou(boxes[i : i + 1], boxes[j : j + 1])) <= threshold for j in rivals):
            kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("classes", [1, 3])
def test_nms_is_the_greedy_loop(threshold, classes):
    candidates = random_boxes(60)
    scores = (torch.rand(60) * 10).round() / 10  # with ties
    labels = torch.randint(classes, (60,))
    expected = greedy(candidates, scores, threshold, labels)
    assert nms(candidates, scores, threshold, labels).tolist() == expected


def test_a_suppressed_box_suppresses_no_other():
    """Each overlaps its neighbour: every second one stays."""
    chain = boxes(*([2.0 * i, 0, 2.0 * i + 3, 1] for i in range(9)))
    assert nms(chain, torch.arange(9, 0, -1.0), 0.1).tolist() == [0, 2, 4, 6, 8]


def test_nms_of_nothing():
    assert nms(boxes(), torch.zeros(0), 0.5).tolist() == []


def test_decoding_inverts_encoding():
    objects, proposals = random_boxes(20).double(), random_boxes(20).double()
    deltas = encode_boxes(objects, proposals)
    torch.testing.assert_close(decode_boxes(deltas, proposals), objects)
    known = encode_boxes(boxes([2, 1, 6, 9]), boxes([0, 0, 4, 4]))
    torch.testing.assert_close(known, torch.tensor([[0.5, 0.75, 0.0, math.log(2)]]))


def test_decoded_sides_are_bounded():
    grown = decode_boxes(torch.tensor([[0.0, 0.0, 100.0, -100.0]]), boxes([0, 0, 16, 16]))
    torch.testing.assert_close(grown, boxes([-492, 8, 508, 8]))
    assert clip_boxes(grown, (30, 40)).tolist() == [[0, 8, 40, 8]]


# Trunk and classifier


@pytest.mark.parametrize(
    ("make", "channels", "stride"),
    [
        (lambda: conv_trunk(3, (8, 4), (2, 1)), 4, 2),
        (zf5_trunk, 256, 16),
        (lambda: resnet_trunk(resnet18(), last_stage=3), 256, 16),
        (lambda: resnet_trunk(resnet18(), last_stage=4), 512, 32),
    ],
    ids=["3 x 3", "ZF-5", "ResNet-18", "all of ResNet-18"],
)
@torch.no_grad()
def test_trunks_have_their_width_and_stride(make, channels, stride):
    trunk = make().eval()
    out = trunk(torch.randn(1, 3, 96, 64))
    assert (trunk.out_channels, trunk.stride) == (channels, stride)
    assert out.shape == (1, channels, 96 // stride, 64 // stride)


def test_classifier_takes_any_size():
    model = SPPNetClassifier(conv_trunk(1, (6,), (2,)), 5, **SMALL)
    for size in ((8, 8), (13, 9), (1, 1)):
        model(torch.randn(2, 1, *size)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_classifier_is_pools_and_layers():
    model = SPPNetClassifier(conv_trunk(1, (6,), (2,)), 5, **SMALL).eval()
    image = torch.randn(2, 1, 9, 11)
    features = model.trunk(image)
    pools = [F.adaptive_max_pool2d(features, level).flatten(1) for level in (2, 1)]
    expected = model.classes(model.hidden(torch.cat(pools, dim=1)))
    torch.testing.assert_close(model(image), expected)


# Detector


def test_windows_hold_the_centres_inside_the_box():
    """Stride 16: centres at 0, 16, 32, ..."""
    given = boxes([10, 0, 70, 64], [16, 15.9, 48, 48.1], [17, 3, 30, 12], [-40, -40, -20, 500])
    expected = [[1, 1, 4, 3], [2, 1, 2, 3], [1, 0, 1, 0], [0, 0, 0, 5]]
    assert project_windows(given, 16, (6, 8)).tolist() == expected


def test_a_window_between_centres_takes_the_nearest():
    for left in torch.arange(1, 15, 0.5).tolist():
        x1, _, x2, _ = project_windows(boxes([left, 0, left + 0.25, 8]), 16, (4, 4))[0].tolist()
        assert x1 == x2 == (0 if left + 0.125 < 8 else 1)


@torch.no_grad()
def test_regions_of_a_batch_equal_regions_one_by_one():
    model = detector().eval()
    images = torch.randn(2, 1, 40, 48)
    proposals = [random_boxes(3, 20), random_boxes(4, 20)]
    logits, deltas = model(images, proposals)
    assert logits.shape == (7, 3) and deltas.shape == (7, 2, 4)
    alone = [
        model(image[None], [box[None]])
        for image, of_image in zip(images, proposals)
        for box in of_image
    ]
    for together, parts in zip((logits, deltas), zip(*alone)):
        torch.testing.assert_close(together, torch.cat(parts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["sppnet", "round"])
@torch.no_grad()
def test_a_region_is_pooled_from_its_window(rule):
    """Stride 4: (8, 8, 30, 24) is rounded to 2..8 x 2..6, its inside centres are 3..7 x 3..5."""
    model = detector(window_rule=rule).eval()
    image = torch.randn(1, 1, 40, 48)
    features = model.trunk(image)
    whole = {"round": features[:, :, 2:7, 2:9], "sppnet": features[:, :, 3:6, 3:8]}[rule]
    pools = [F.adaptive_max_pool2d(whole, level).flatten(1) for level in (2, 1)]
    expected = model.classes(model.hidden(torch.cat(pools, dim=1)))
    logits, _ = model(image, [boxes([8, 8, 30, 24])])
    torch.testing.assert_close(logits, expected)


def test_unknown_window_rule_is_refused():
    with pytest.raises(ValueError, match="window_rule: expected sppnet or round, got 'floor'"):
        detector(window_rule="floor")


@torch.no_grad()
def test_each_region_chooses_its_size_of_the_image():
    """Regions of 8 and 16 pixels are nearest to 16 at twice the size and as they are."""
    plain = detector().eval()
    scaled = detector(shortest_sides=(32, 64), roi_pixels=16 * 16).eval()
    scaled.load_state_dict(plain.state_dict())
    image = torch.randn(1, 1, 32, 48)
    small, large = boxes([3, 5, 11, 13]), boxes([8, 4, 24, 20])
    logits, _ = scaled(image, [torch.cat([small, large, small])])
    enlarged = F.interpolate(image, scale_factor=2, mode="bilinear")
    of_small, _ = plain(enlarged, [2 * small])
    of_large, _ = plain(image, [large])
    torch.testing.assert_close(logits, torch.cat([of_small, of_large, of_small]))
    assert scaled(image, [boxes()])[0].shape == (0, 3)


def test_proposals_become_the_object_that_they_overlap_most():
    objects, labels = boxes([0, 0, 10, 10], [8, 0, 18, 10]), torch.tensor([2, 1])
    proposals = boxes([0, 0, 10, 9], [7, 0, 17, 10], [4, 0, 14, 10], [0, 0, 10, 5])
    nearest, assigned = assign_proposals(proposals, objects, labels)
    assert assigned.tolist() == [2, 1, 0, 2]  # the third has 3/7 of each
    assert torch.equal(nearest[:2], objects)
    _, nothing = assign_proposals(proposals, boxes(), labels[:0])
    assert nothing.tolist() == [0, 0, 0, 0]


def test_loss_is_cross_entropy_and_smooth_l1_of_objects():
    model = detector().eval()
    image = torch.randn(1, 1, 40, 40)
    proposals, objects = random_boxes(3, 20), random_boxes(3, 20)
    labels = torch.tensor([0, 2, 1])
    logits, deltas = model(image, [proposals])
    targets = encode_boxes(objects, proposals) / torch.tensor([0.1, 0.1, 0.2, 0.2])
    distance = F.smooth_l1_loss(deltas[1, 1], targets[1], reduction="sum")
    distance = distance + F.smooth_l1_loss(deltas[2, 0], targets[2], reduction="sum")
    expected = F.cross_entropy(logits, labels) + distance / 3
    loss = model.loss(image, [proposals], objects, labels)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_loss_without_objects_is_finite():
    proposals = random_boxes(3, 20)
    model = detector()
    loss = model.loss(torch.randn(1, 1, 40, 40), [proposals], proposals, torch.zeros(3).long())
    loss.backward()
    assert loss.isfinite() and model.boxes.weight.grad is not None


def test_detections_are_moved_clipped_and_suppressed(monkeypatch):
    """Two images; of the first, two boxes become one place, and one leaves the image."""
    model = detector()
    logits = torch.tensor([[0, 8.0, 0], [0, 9.0, 0], [0, 0, 7.0], [9.0, 0, 0], [0, 7.0, 0]])
    deltas = torch.zeros(5, 2, 4)
    deltas[1, 0, 0] = -5.0  # half a side to the left, in tenths
    monkeypatch.setattr(model, "forward", lambda images, proposals: (logits, deltas))
    proposals = [
        boxes([10, 10, 20, 20], [15, 10, 25, 20], [30, 30, 44, 44], [0, 0, 9, 9]),
        boxes([1, 2, 3, 4]),
    ]
    first, second = model.detect(torch.zeros(2, 1, 40, 40), proposals)
    torch.testing.assert_close(first["boxes"], boxes([10, 10, 20, 20], [30, 30, 40, 40]))
    assert first["labels"].tolist() == [1, 2]
    torch.testing.assert_close(first["scores"], logits[1:3].softmax(1)[[0, 1], [1, 2]])
    assert second["boxes"].tolist() == [[1, 2, 3, 4]]
    (one, _) = model.detect(torch.zeros(2, 1, 40, 40), proposals, max_detections=1)
    assert one["labels"].tolist() == [1]
