"""The cascade of max pools against PyTorch's, forward and training."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F
from warploom.ops.spp import sppf

from bench.harness import Case, training

SHAPES = ((16, 256, 20, 20), (4, 128, 40, 40))
LAYOUTS = {"": torch.contiguous_format, ", channels-last": torch.channels_last}


def cascade(x: Tensor) -> Tensor:
    slices = [x]
    for _ in range(3):
        slices.append(F.max_pool2d(slices[-1], 5, 1, 2))
    return torch.cat(slices, 1)


def verify(x: Tensor) -> None:
    torch.testing.assert_close(sppf(x), cascade(x), rtol=0, atol=0)


def cases(device: str) -> list[Case]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            for name, layout in LAYOUTS.items():
                x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
                size = x.numel() * x.element_size()
                label = " x ".join(map(str, shape)) + name
                shared = {"family": "spp", "shape": label, "dtype": dtype}
                check = functools.partial(verify, x)
                found.append(
                    Case(
                        op="sppf",
                        run=lambda x=x: sppf(x),
                        peers={"torch": lambda x=x: cascade(x)},
                        verify=check,
                        bytes=5 * size,
                        **shared,
                    )
                )
                # Backward reads three slices of the output and four of its gradient.
                found.append(
                    Case(
                        op="sppf forward+backward",
                        run=training(sppf, [x]),
                        peers={"torch": training(cascade, [x])},
                        verify=check,
                        bytes=13 * size,
                        **shared,
                    )
                )
    return found
