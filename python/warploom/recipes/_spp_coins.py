"""scikit-image's photograph of 24 coins: boxes found by classical means, learned by an SPP-Net's detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from warploom.models.spp_net import SPPNetDetector, assign_proposals
from warploom.models.trunk import conv_trunk
from warploom.recipes._extras import require
from warploom.recipes.voc_map import Detections, GroundTruth, mean_average_precision

#: The photograph's row between the second and the third line of coins, which no coin touches.
SPLIT_ROW = 150
_DARK, _BRIGHT, _LEAST_AREA = 30, 150, 100
_SIDES = (36, 44, 54, 66)  # of the proposed squares
_STRIDE = 4  # squares that a side moves over
_OBJECT_SHARE = 0.25
_JITTERED_OBJECTS = 6


def coin_boxes(image: Any) -> Tensor:
    """The boxes [24, 4] of the coins: a watershed of the gradient from sure background and sure coins.

    Args:
        image: scikit-image's `coins`, uint8 [303, 384].
    """
    numpy, morphology = require("numpy"), require("scipy.ndimage")
    markers = numpy.where(image < _DARK, 1, numpy.where(image > _BRIGHT, 2, 0))
    gradient = require("skimage.filters").sobel(image)
    coins = require("skimage.segmentation").watershed(gradient, markers) == 2
    measure = require("skimage.measure")
    regions = measure.regionprops(measure.label(morphology.binary_fill_holes(coins)))
    corners = [region.bbox for region in regions if region.area >= _LEAST_AREA]
    return torch.tensor([[x1, y1, x2, y2] for y1, x1, y2, x2 in corners], dtype=torch.float32)


def jittered(boxes: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """boxes [N, 4] with each corner's coordinates moved by up to a share of the box's side."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    moves = torch.rand(boxes.shape, generator=generator) * 2 - 1
    return boxes + share * sides * moves


def sliding_proposals(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Squares of several sides all over an image of size (height, width), slightly jittered: [L, 4]."""
    height, width = size
    grids = []
    for side in _SIDES:
        step = side / _STRIDE
        rows = torch.arange(0, max(1.0, height - side + step), step)
        columns = torch.arange(0, max(1.0, width - side + step), step)
        corners = torch.cartesian_prod(columns, rows)
        grids.append(torch.cat([corners, corners + side], dim=1))
    return jittered(torch.cat(grids), 0.05, generator)


def augmented(image: Tensor, boxes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An image [1, 1, H, W] resized, mirrored and of another contrast and brightness, with its boxes."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    size = [round(uniform(0.85, 1.2) * side) for side in image.shape[-2:]]
    down, across = (new / old for new, old in zip(size, image.shape[-2:]))
    boxes = boxes * boxes.new_tensor([across, down, across, down])
    image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
    for dim, first in ((-1, 0), (-2, 1)):
        if uniform(0, 1) < 0.5:
            image, boxes = image.flip(dim), boxes.clone()
            boxes[:, first::2] = image.shape[dim] - boxes[:, first::2].flip(1)
    return uniform(0.7, 1.3) * image + uniform(-0.2, 0.2), boxes


class CoinsTask:
    """Trains on augmentations of the upper half of the photograph, 12 coins; the lower 12 are held out.

    Args:
        regions: proposals of a step.
        seed: of the proposals and of the augmentations.
    """

    title = "SPP-Net: coins detected from one map of the photograph"

    def __init__(self, regions: int, seed: int, device: torch.device) -> None:
        photograph = require("skimage.data").coins()
        boxes = coin_boxes(photograph)
        self.image = torch.from_numpy(photograph).float()[None, None] / 127.5 - 1
        upper = boxes[:, 3] <= SPLIT_ROW
        down = boxes.new_tensor([0, SPLIT_ROW, 0, SPLIT_ROW])
        self.halves = {
            "trained": (self.image[:, :, :SPLIT_ROW], boxes[upper]),
            "held_out": (self.image[:, :, SPLIT_ROW:], boxes[~upper] - down),
        }
        self.regions = regions
        self.seed = seed
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        trunk = conv_trunk(1, (16, 32, 32, 32), (2, 2, 1, 1))
        self.model = SPPNetDetector(trunk, 1, hidden_size=128, dropout=0.25).to(device)

    def loss(self) -> Tensor:
        """The detector's loss on a sample of proposals of an augmented image, a quarter of them coins."""
        image, boxes = augmented(*self.halves["trained"], self.generator)
        height, width = image.shape[-2:]
        near = jittered(boxes.repeat(_JITTERED_OBJECTS, 1), 0.15, self.generator)
        proposals = torch.cat([sliding_proposals((height, width), self.generator), near])
        targets, labels = assign_proposals(proposals, boxes, torch.ones(len(boxes)).long())
        order = torch.randperm(len(labels), generator=self.generator)
        objects = order[labels[order] > 0][: round(_OBJECT_SHARE * self.regions)]
        others = order[labels[order] == 0][: self.regions - len(objects)]
        chosen = torch.cat([objects, others])
        image, sampled, targets, labels = (
            tensor.to(self.device)
            for tensor in (image, proposals[chosen], targets[chosen], labels[chosen])
        )
        return self.model.loss(image, [sampled], targets, labels)

    def detect(self, half: str) -> Detections:
        """The coins found in a half, from proposals that know nothing of the boxes."""
        image, _ = self.halves[half]
        height, width = image.shape[-2:]
        generator = torch.Generator().manual_seed(self.seed)
        proposals = sliding_proposals((height, width), generator).to(self.device)
        (found,) = self.model.detect(image.to(self.device), [proposals])
        return Detections(**{name: tensor.cpu() for name, tensor in found.items()})

    def evaluate(self) -> dict[str, float]:
        """VOC's mean average precision, by area and at 11 points, in both halves."""
        results = {}
        for half, (_, boxes) in self.halves.items():
            found = [self.detect(half)]
            truth = [GroundTruth(boxes, torch.ones(len(boxes)).long())]
            for name, method in (("map", "area"), ("map_11point", "11point")):
                results[f"{name}_{half}"] = mean_average_precision(found, truth, method=method).mean
        return results

    def draw(self, axes: Any, results: dict[str, float]) -> None:
        """The photograph, its boxes dotted, and the detections of a probability above a half."""
        axes.imshow(self.image[0, 0], cmap="gray")
        axes.axhline(SPLIT_ROW, color="white", linewidth=1)
        for half, top in (("trained", 0), ("held_out", SPLIT_ROW)):
            found = self.detect(half)
            self._draw_boxes(axes, self.halves[half][1], top, color="white", linestyle=":")
            self._draw_boxes(axes, found.boxes[found.scores > 0.5], top, color="tab:orange")
        axes.set(
            title=f"mAP: upper half (trained) {results['map_trained']:.2f}, "
            f"lower half (held out) {results['map_held_out']:.2f}"
        )
        axes.axis("off")

    def _draw_boxes(self, axes: Any, boxes: Tensor, top: int, **style: Any) -> None:
        rectangle = require("matplotlib.patches").Rectangle
        rows: Sequence[list[float]] = boxes.tolist()
        for x1, y1, x2, y2 in rows:
            axes.add_patch(rectangle((x1, y1 + top), x2 - x1, y2 - y1, fill=False, **style))
