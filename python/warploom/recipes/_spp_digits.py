"""scikit-learn's handwritten digits at several sizes, for one SPP-Net."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from warploom.models.spp_net import SPPNetClassifier
from warploom.models.trunk import conv_trunk
from warploom.recipes._extras import require

_TESTED = 360  # of 1797 images
_LEVELS = (4, 2, 1)


def load_digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images [N, 1, 8, 8] in [-1, 1], labels int64 [N]) to train on and to test, a random fifth."""
    digits = require("sklearn.datasets").load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    tested, trained = order[:_TESTED], order[_TESTED:]
    return (images[trained], labels[trained]), (images[tested], labels[tested])


def resized(images: Tensor, size: int) -> Tensor:
    """images [N, 1, H, W] -> [N, 1, size, size], bilinear."""
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)


class DigitsTask:
    """Each step shows a batch at one of the sizes, in turn; the test is at these and at sizes never shown.

    Args:
        sizes: sides of the images to train on.
        unseen_sizes: sides of the images to test on only.
        batch_size: images of a step.
        seed: of the split and of the batches.
    """

    title = "SPP-Net: one network, digits of several sizes"

    def __init__(
        self,
        sizes: Sequence[int],
        unseen_sizes: Sequence[int],
        batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        (images, labels), (tested, self.test_labels) = load_digits(seed)
        self.labels = labels.to(device)
        self.batches = {size: resized(images, size).to(device) for size in sizes}
        self.tests = {
            size: resized(tested, size).to(device) for size in sorted({*sizes, *unseen_sizes})
        }
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0
        trunk = conv_trunk(1, (16, 32, 64), (1, 2, 1))
        self.model = SPPNetClassifier(trunk, 10, levels=_LEVELS, hidden_size=128, dropout=0.25).to(
            device
        )

    def loss(self) -> Tensor:
        """Cross entropy of the next batch."""
        sizes = list(self.batches)
        images = self.batches[sizes[self.steps % len(sizes)]]
        self.steps += 1
        chosen = torch.randint(len(images), (self.batch_size,), generator=self.generator)
        chosen = chosen.to(images.device)
        return F.cross_entropy(self.model(images[chosen]), self.labels[chosen])

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The share of the test images that is classified right, at each size."""
        found = {
            size: self.model(images).argmax(1).cpu() == self.test_labels
            for size, images in self.tests.items()
        }
        return {f"accuracy_at_{size}": right.float().mean().item() for size, right in found.items()}

    def draw(self, axes: Any, results: dict[str, float]) -> None:
        """Bars of the accuracy at each size; those of sizes never trained on are hatched."""
        places = range(len(self.tests))
        values = [results[f"accuracy_at_{size}"] for size in self.tests]
        hatches = ["" if size in self.batches else "//" for size in self.tests]
        bars = axes.bar(places, values, color="tab:blue", hatch=hatches, edgecolor="white")
        axes.bar_label(bars, [f"{100 * value:.1f} %" for value in values])
        labels = [
            f"{size} x {size}" + ("" if size in self.batches else "\nunseen") for size in self.tests
        ]
        axes.set_xticks(list(places), labels)
        axes.set(
            ylabel="test accuracy", title="one network, digits of several sizes", ylim=(0, 1.1)
        )
