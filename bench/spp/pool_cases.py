"""Spatial pyramid pooling against PyTorch's adaptive pools and cat, and against one read of the input.

Levels 1, 2, 4 of feature maps as the trunks of a detector (64 x 64) and of a classifier (13 x 13) give them,
NCHW and channels-last; and of a hundred regions of one image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from warploom.ops.spp import spatial_pyramid_pool

from bench.harness import Case, Run, close_to, training

LEVELS = (1, 2, 4)
SHAPES = ((32, 256, 64, 64), (16, 512, 13, 13))
REGIONS = 100


def torch_pools(mode: str, x: Tensor) -> Tensor:
    pool = F.adaptive_max_pool2d if mode == "max" else F.adaptive_avg_pool2d
    return torch.cat([pool(x, level).flatten(1) for level in LEVELS], dim=1)


def torch_regions(boxes: list[list[int]], x: Tensor) -> Tensor:
    """One region after the other, each pooled from its slice."""
    return torch.cat(
        [torch_pools("max", x[:, :, top:bottom, left:right]) for left, top, right, bottom in boxes]
    )


def read(x: Tensor) -> Run:
    return lambda: x.sum()


def read_and_fill(x: Tensor) -> Run:
    gradient = torch.empty_like(x)
    return lambda: (x.sum(), gradient.zero_())


def map_cases(device: str, dtype: torch.dtype) -> list[Case]:
    found = []
    for shape in SHAPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
            name = " x ".join(map(str, shape))
            name += ", channels-last" if layout == torch.channels_last else ""
            for mode in ("max", "avg"):
                ours: Callable[[Tensor], Tensor] = functools.partial(
                    spatial_pyramid_pool, mode=mode
                )
                theirs = functools.partial(torch_pools, mode)
                needs_gradient = x.detach().requires_grad_()
                verify = close_to(ours, theirs, [x])
                size = x.numel() * x.element_size()
                rows: list[tuple[str, Run, dict[str, Run], int]] = [
                    ("", lambda f=ours, i=x: f(i),
                     {"torch": lambda f=theirs, i=x: f(i), "read": read(x)}, size),
                    (" forward+backward", training(ours, [x]),
                     {"torch": training(theirs, [x]), "read + fill": read_and_fill(x)}, 2 * size),
                ]  # fmt: skip
                if mode == "max":
                    run = functools.partial(ours, needs_gradient)
                    peer = functools.partial(theirs, needs_gradient)
                    rows.insert(1, (" with indices", run, {"torch": peer, "read": read(x)}, size))
                for suffix, run, peers, moved in rows:
                    found.append(
                        Case(
                            family="spp",
                            op=f"spatial_pyramid_pool {mode}{suffix}",
                            shape=name,
                            dtype=dtype,
                            run=run,
                            peers=peers,
                            verify=verify,
                            bytes=moved,
                        )
                    )
    return found


def region_cases(device: str, dtype: torch.dtype) -> list[Case]:
    x = torch.randn(1, 256, 50, 50, device=device).to(dtype)
    corner, extent = torch.randint(0, 30, (REGIONS, 2)), torch.randint(4, 20, (REGIONS, 2))
    boxes = torch.cat((corner, corner + extent), dim=1)
    # A region ends at the pixel of its corner, and with it.
    slices = torch.cat((corner, corner + extent + 1), dim=1).tolist()
    rois = [boxes.to(device, torch.float32)]
    ours: Callable[[Tensor], Tensor] = functools.partial(spatial_pyramid_pool, rois=rois)
    theirs = functools.partial(torch_regions, slices)
    verify = close_to(ours, theirs, [x])
    shared = {"family": "spp", "shape": f"{REGIONS} regions of 256 x 50 x 50", "dtype": dtype}
    size = x.numel() * x.element_size()
    return [
        Case(
            op="spatial_pyramid_pool of regions",
            run=lambda: ours(x),
            peers={"torch": lambda: theirs(x)},
            verify=verify,
            bytes=size,
            **shared,
        ),
        Case(
            op="spatial_pyramid_pool of regions forward+backward",
            run=training(ours, [x]),
            peers={"torch": training(theirs, [x])},
            verify=verify,
            bytes=2 * size,
            **shared,
        ),
    ]


def cases(device: str) -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    return [
        case
        for dtype in dtypes
        for make in (map_cases, region_cases)
        for case in make(device, dtype)
    ]
