"""Squeezing against PyTorch's pixel_unshuffle and pixel_shuffle, and against eager's view and permute.

The floor moves x and z once: 2 N elements.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F
from warploom.ops.coupling import squeeze

from bench.harness import Case, close_to

SHAPE = (64, 24, 64, 64)


def eager(x: Tensor, factor: int) -> Tensor:
    """What flows do: [B, C, H / f, f, W / f, f], permuted and copied."""
    blocks = x.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))
    return blocks.permute(0, 1, 3, 5, 2, 4).reshape(
        len(x), -1, x.shape[2] // factor, x.shape[3] // factor
    )


def eager_inverse(x: Tensor, factor: int) -> Tensor:
    blocks = x.unflatten(1, (-1, factor, factor))  # [B, C, f, f, H, W]
    return blocks.permute(0, 1, 4, 2, 5, 3).reshape(
        len(x), -1, x.shape[2] * factor, x.shape[3] * factor
    )


def cases(device: str) -> list[Case]:
    found = []
    directions = {
        "squeeze": (squeeze, F.pixel_unshuffle, eager, SHAPE),
        "squeeze inverse": (
            functools.partial(squeeze, inverse=True),
            F.pixel_shuffle,
            eager_inverse,
            (SHAPE[0], 4 * SHAPE[1], SHAPE[2] // 2, SHAPE[3] // 2),
        ),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for layout, memory in (("", torch.contiguous_format), (", NHWC", torch.channels_last)):
            for op, (run, torch_op, plain, shape) in directions.items():
                x = torch.randn(shape, device=device).to(dtype, memory_format=memory)
                peers = {"torch": torch_op, "eager": plain, "compile": torch.compile(plain)}
                found.append(
                    Case(
                        family="coupling",
                        op=op,
                        shape=" x ".join(map(str, shape)) + layout,
                        dtype=dtype,
                        run=functools.partial(run, x),
                        peers={peer: functools.partial(f, x, 2) for peer, f in peers.items()},
                        verify=close_to(run, lambda x, plain=plain: plain(x, 2), [x[:2]]),
                        bytes=2 * x.numel() * x.element_size(),
                    )
                )
    return found
