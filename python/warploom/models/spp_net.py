"""SPP-Net: a classifier of images of any size, and a detector that computes the convolutions once per image.

He et al., "Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition"
(arXiv:1406.4729): section 3 the classifier, section 4 and appendix A the detector. A softmax and box
regression for each class stand in the place of the paper's SVMs, as in Fast R-CNN (arXiv:1504.08083).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warploom.models.boxes import (
    box_area,
    box_iou,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    nms,
)
from warploom.models.trunk import Trunk
from warploom.nn.spp import Level, RoISpatialPyramidPool, SpatialPyramidPool

WINDOW_RULES = ("sppnet", "round")
#: What regression targets are divided by, as in Fast R-CNN, so that they are about 1.
_DELTA_SCALE = (0.1, 0.1, 0.2, 0.2)


def _hidden_layers(inputs: int, width: int, dropout: float) -> nn.Sequential:
    """fc6 and fc7."""
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(width, width),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
    )


class SPPNetClassifier(nn.Module):
    """Trunk, pyramid, two hidden layers and logits: the images of a batch may have any one size.

    Args:
        trunk: the convolutions.
        num_classes: logits.
        levels: of the pyramid, arXiv:1406.4729's 50 bins by default.
        hidden_size: width of the hidden layers.
        dropout: after each of them.
    """

    def __init__(
        self,
        trunk: Trunk,
        num_classes: int,
        *,
        levels: Sequence[Level] = (6, 3, 2, 1),
        hidden_size: int = 4096,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.pool = SpatialPyramidPool(levels)
        self.hidden = _hidden_layers(trunk.out_channels * self.pool.bins, hidden_size, dropout)
        self.classes = nn.Linear(hidden_size, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> logits [B, num_classes]."""
        out: Tensor = self.classes(self.hidden(self.pool(self.trunk(images))))
        return out


def project_windows(boxes: Tensor, stride: int, map_size: tuple[int, int]) -> Tensor:
    """The responses whose centres lie strictly inside each box: arXiv:1406.4729, appendix A.

    Left and top are floor(x / stride) + 1, right and bottom ceil(x / stride) - 1. A box between two centres
    takes the nearest, and windows end at the map's border.

    Args:
        boxes: [K, 4] in the image.
        map_size: (height, width) of the map.

    Returns: [K, 4], whole numbers, the last response included.
    """
    scaled = boxes / stride
    nearest = ((scaled[:, :2] + scaled[:, 2:]) / 2).round()
    first, last = scaled[:, :2].floor() + 1, scaled[:, 2:].ceil() - 1
    between = first > last
    first, last = (torch.where(between, nearest, edge) for edge in (first, last))
    height, width = map_size
    limits = boxes.new_tensor([width - 1, height - 1])
    return torch.cat([torch.minimum(edge.clamp(min=0), limits) for edge in (first, last)], dim=1)


class SPPNetDetector(nn.Module):
    """Classes and boxes of proposed regions, all pooled from one map of the image.

    Args:
        trunk: the convolutions.
        num_classes: classes of objects; label 0 is the background, objects have 1 to num_classes.
        levels: of each region's pyramid; the paper's 50 bins by default.
        hidden_size, dropout: of the two hidden layers.
        window_rule: "sppnet", the paper's mapping of boxes to the map (see `project_windows`), or "round",
            Fast R-CNN's: both corners rounded.
        shortest_sides: sizes that an image is resized to, given by its shortest side; each region is pooled
            from the one in which its area is nearest `roi_pixels`. Default: the image as it comes.
        roi_pixels: the paper's 224 x 224.
    """

    def __init__(
        self,
        trunk: Trunk,
        num_classes: int,
        *,
        levels: Sequence[Level] = (6, 3, 2, 1),
        hidden_size: int = 4096,
        dropout: float = 0.5,
        window_rule: str = "sppnet",
        shortest_sides: Sequence[int] = (),
        roi_pixels: int = 224 * 224,
    ) -> None:
        super().__init__()
        if window_rule not in WINDOW_RULES:
            raise ValueError(
                f"SPPNetDetector: window_rule: expected sppnet or round, got {window_rule!r}"
            )
        self.num_classes = num_classes
        self.window_rule = window_rule
        self.shortest_sides = tuple(shortest_sides)
        self.roi_pixels = roi_pixels
        self.trunk = trunk
        self.pool = RoISpatialPyramidPool(
            levels, 1.0 if window_rule == "sppnet" else 1.0 / trunk.stride
        )
        self.hidden = _hidden_layers(trunk.out_channels * self.pool.bins, hidden_size, dropout)
        self.classes = nn.Linear(hidden_size, 1 + num_classes)
        self.boxes = nn.Linear(hidden_size, 4 * num_classes)

    def forward(self, images: Tensor, proposals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [K, 1 + num_classes] and deltas [K, num_classes, 4] of all images' proposals, in order.

        Args:
            images: [B, C, H, W].
            proposals: B tensors [L, 4].
        """
        indices = [boxes.new_full((len(boxes), 1), i) for i, boxes in enumerate(proposals)]
        rois = torch.cat([torch.cat(indices), torch.cat(list(proposals))], dim=1)
        hidden = self.hidden(self._pooled(images, rois))
        return self.classes(hidden), self.boxes(hidden).unflatten(1, (self.num_classes, 4))

    def _pooled(self, images: Tensor, rois: Tensor) -> Tensor:
        """rois [K, 5] -> their pyramids [K, channels bins], each of its size of the image."""
        if not self.shortest_sides:
            return self._pooled_of_map(self.trunk(images), rois)
        height, width = images.shape[-2:]
        scales = rois.new_tensor(self.shortest_sides) / min(height, width)
        areas = box_area(rois[:, 1:])[:, None] * scales.square()
        nearest = (areas - self.roi_pixels).abs().argmin(1)
        parts, places = [], []
        for index in nearest.unique().tolist() or [0]:
            size = [round(side * float(scales[index])) for side in (height, width)]
            resized = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
            place = (nearest == index).nonzero().flatten()
            across, down = size[1] / width, size[0] / height
            moved = rois[place] * rois.new_tensor([1, across, down, across, down])
            parts.append(self._pooled_of_map(self.trunk(resized), moved))
            places.append(place)
        return torch.cat(parts)[torch.cat(places).argsort()]

    def _pooled_of_map(self, features: Tensor, rois: Tensor) -> Tensor:
        if self.window_rule == "sppnet":
            height, width = features.shape[-2:]
            windows = project_windows(rois[:, 1:], self.trunk.stride, (height, width))
            rois = torch.cat([rois[:, :1], windows], dim=1)
        pooled: Tensor = self.pool(features, rois)
        return pooled

    def loss(
        self, images: Tensor, proposals: Sequence[Tensor], boxes: Tensor, labels: Tensor
    ) -> Tensor:
        """Mean cross entropy, plus the objects' smooth L1 of the deltas over the number of proposals.

        Args:
            images, proposals: as `forward`.
            boxes: [K, 4], the object that each proposal is to become; read where its label is above 0.
            labels: int64 [K]; see `assign_proposals`.
        """
        logits, deltas = self(images, proposals)
        of_object = labels.nonzero().flatten()
        targets = encode_boxes(boxes[of_object], torch.cat(list(proposals))[of_object])
        predicted = deltas[of_object, labels[of_object] - 1]
        distance = F.smooth_l1_loss(
            predicted, targets / targets.new_tensor(_DELTA_SCALE), reduction="sum"
        )
        return F.cross_entropy(logits, labels) + distance / max(1, len(labels))

    @torch.no_grad()
    def detect(
        self,
        images: Tensor,
        proposals: Sequence[Tensor],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.3,
        max_detections: int = 100,
    ) -> list[dict[str, Tensor]]:
        """What is in each image, best first: {"boxes" [N, 4], "scores" [N], "labels" int64 [N]}.

        Args:
            images, proposals: as `forward`.
            score_threshold: the least probability of a detection.
            nms_threshold: the overlap above which the worse of two boxes of a class goes.
            max_detections: the most in an image.
        """
        logits, deltas = self(images, proposals)
        scores = logits.softmax(1)[:, 1:]
        corners = torch.cat(list(proposals))[:, None]
        boxes = decode_boxes(deltas * deltas.new_tensor(_DELTA_SCALE), corners)
        height, width = images.shape[-2:]
        boxes = clip_boxes(boxes, (height, width))
        found = []
        counts = [len(one) for one in proposals]
        for of_image, score in zip(boxes.split(counts), scores.split(counts)):
            place, label = (score >= score_threshold).nonzero(as_tuple=True)
            kept = nms(of_image[place, label], score[place, label], nms_threshold, label)
            place, label = place[kept[:max_detections]], label[kept[:max_detections]]
            found.append(
                {
                    "boxes": of_image[place, label],
                    "scores": score[place, label],
                    "labels": label + 1,
                }
            )
        return found


def assign_proposals(
    proposals: Tensor, boxes: Tensor, labels: Tensor, iou_threshold: float = 0.5
) -> tuple[Tensor, Tensor]:
    """What each proposal of an image is to become: the object that it overlaps most, or background.

    Args:
        proposals: [L, 4].
        boxes, labels: [M, 4], int64 [M], the objects, labelled from 1.
        iou_threshold: the least overlap of a proposal that becomes an object.

    Returns: (boxes [L, 4], labels int64 [L]); label 0 is background, whose box means nothing.
    """
    if not len(boxes):
        return proposals, labels.new_zeros(len(proposals))
    overlap, nearest = box_iou(proposals, boxes).max(1)
    is_object = overlap >= iou_threshold
    return boxes[nearest], torch.where(is_object, labels[nearest], 0)
