"""Samples of a flow and ways through its latent, as PNG."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from warploom.models.flows import Flow
from warploom.recipes._extras import require


def draw_images(images: Tensor, path: Path, *, columns: int, levels: int, title: str) -> None:
    """Images [n, 1, H, W] of levels 0 to levels - 1, row by row on one grid."""
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    height, width = images.shape[2:]
    rows = len(images) // columns
    framed = torch.nn.functional.pad(images[: rows * columns, 0].float(), (0, 1, 0, 1))
    grid = framed.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2).flatten(0, 1)
    size = (0.06 * columns * (width + 1), 0.06 * rows * (height + 1) + 0.4)
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.imshow(grid.cpu(), cmap="gray", vmin=0, vmax=levels - 1, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.axis("off")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


@torch.no_grad()
def interpolations(
    flow: Flow, first: Tensor, second: Tensor, context: Tensor | None, count: int = 9
) -> Tensor:
    """Levels [n * count, 1, H, W]: from each image to its partner, in equal steps of the latent.

    Args:
        first, second: levels [n, 1, H, W]; both ends of each row are given back by the flow itself.
        context: of both, [n] or [n, context_features].
        count: images of a row.
    """
    ends = [
        flow.encode((part.float() + 0.5) / flow.config.levels, context)[0]
        for part in (first, second)
    ]
    weights = torch.linspace(0.0, 1.0, count, device=ends[0].device)[:, None]
    between = torch.lerp(ends[0][:, None], ends[1][:, None], weights)
    repeated = None if context is None else context.repeat_interleave(count, 0)
    return flow.quantize(flow.decode(between.flatten(0, 1), repeated)[0])
