"""RoIAlign against `F.grid_sample` where the samples lie, region by region."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from warploom.ops.spp import roi_align

from bench.harness import Case, close_to, training

CHANNELS, HEIGHT, WIDTH = 256, 50, 64
REGIONS, BINS, SAMPLES = 128, 7, 2


def sampled(rois: Tensor, x: Tensor) -> Tensor:
    places = (torch.arange(BINS * SAMPLES, device=x.device, dtype=x.dtype) + 0.5) / (BINS * SAMPLES)
    regions = []
    for _, x1, y1, x2, y2 in rois.to(x.dtype):
        # In grid_sample's coordinates -1 and 1 are the outer edges of the outer pixels.
        across = 2 * (x1 + places * (x2 - x1)) / WIDTH - 1
        down = 2 * (y1 + places * (y2 - y1)) / HEIGHT - 1
        grid = torch.stack(torch.broadcast_tensors(across, down[:, None]), -1).to(x.dtype)
        samples = F.grid_sample(x, grid[None], padding_mode="border", align_corners=False)
        regions.append(F.avg_pool2d(samples, SAMPLES))
    return torch.cat(regions)


def cases(device: str) -> list[Case]:
    corners = torch.rand(REGIONS, 2, 2) * torch.tensor([WIDTH - 16.0, HEIGHT - 16.0])
    boxes = torch.cat((corners.amin(1), corners.amax(1) + 8), 1)
    rois = torch.cat((torch.zeros(REGIONS, 1), boxes), 1).to(device)
    x = torch.randn(1, CHANNELS, HEIGHT, WIDTH, device=device)

    def ours(x: Tensor) -> Tensor:
        return roi_align(x, rois, BINS, sampling_ratio=SAMPLES)

    def theirs(x: Tensor) -> Tensor:
        return sampled(rois, x)

    moved = (x.numel() + REGIONS * CHANNELS * BINS**2) * x.element_size()
    shared = {
        "family": "spp",
        "shape": f"{CHANNELS} x {HEIGHT} x {WIDTH}, {REGIONS} regions of {BINS} x {BINS}",
        "dtype": x.dtype,
        "verify": close_to(ours, theirs, [x]),
    }
    return [
        Case(
            op="roi_align",
            run=lambda: ours(x),
            peers={"grid_sample": lambda: theirs(x)},
            bytes=moved,
            **shared,
        ),
        Case(
            op="roi_align forward+backward",
            run=training(ours, [x]),
            peers={"grid_sample": training(theirs, [x])},
            bytes=2 * moved,
            **shared,
        ),
    ]
