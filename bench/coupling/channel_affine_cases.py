"""A scale and a shift per channel against PyTorch, eager and compiled: forward, and with backward.

The floor moves x and z once, and with backward the gradients of both and x again: 2 N and 5 N elements.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from warploom.ops.coupling import channel_affine

from bench.harness import Case, close_to, training

SHAPE = (64, 96, 64, 64)


def eager(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """What actnorm layers do, on parameters [1, C, 1, 1]."""
    return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def cases(device: str) -> list[Case]:
    found = []
    scale, shift = torch.randn(2, SHAPE[1], device=device)
    for dtype in (torch.float32, torch.bfloat16):
        for name, memory in (("", torch.contiguous_format), (", NHWC", torch.channels_last)):
            x = torch.randn(SHAPE, device=device).to(dtype, memory_format=memory)
            inputs = [x, scale.to(dtype), shift.to(dtype)]
            few = [x[:2].contiguous(memory_format=memory), *inputs[1:]]
            peers = {"eager": eager, "compile": torch.compile(eager)}
            for op, bind, moved in (
                ("channel_affine", lambda f, i: functools.partial(f, *i), 2),
                ("channel_affine forward+backward", training, 5),
            ):
                found.append(
                    Case(
                        family="coupling",
                        op=op,
                        shape=" x ".join(map(str, SHAPE)) + name,
                        dtype=dtype,
                        run=bind(channel_affine, inputs),
                        peers={peer: bind(f, inputs) for peer, f in peers.items()},
                        verify=close_to(channel_affine, eager, few),
                        bytes=moved * x.numel() * x.element_size(),
                    )
                )
    return found
