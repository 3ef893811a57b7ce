"""Rotary embedding against the eager formula that models carry."""

from __future__ import annotations

import torch
from torch import Tensor
from warploom.ops.rope import apply_rotary

from bench.harness import Case, close_to, training

BATCH, SEQUENCE, HEADS, HEAD_DIM = 4, 2048, 16, 128


def eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin, the half-split form."""
    cos, sin = (
        torch.cat((table, table), dim=-1)[None, :, None].to(x.dtype) for table in (cos, sin)
    )
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def cases(device: str) -> list[Case]:
    found = []
    angles = torch.outer(
        torch.arange(SEQUENCE, device=device).float(),
        10000.0 ** -torch.linspace(0, 1, HEAD_DIM // 2, device=device),
    )
    cos, sin = angles.cos(), angles.sin()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(BATCH, SEQUENCE, HEADS, HEAD_DIM, device=device).to(dtype)
        size = x.numel() * x.element_size()
        shape = f"B{BATCH} S{SEQUENCE} H{HEADS} D{HEAD_DIM}"

        def ours(x: Tensor) -> Tensor:
            wide = x.dtype == torch.float64
            tables = (cos.double(), sin.double()) if wide else (cos, sin)
            return apply_rotary(x, *tables)

        def theirs(x: Tensor) -> Tensor:
            return eager(x, cos, sin)

        verify = close_to(ours, theirs, [x])
        for op, run, peer, moved in (
            ("apply_rotary", lambda x=x: ours(x), lambda x=x: theirs(x), 2 * size),
            ("apply_rotary forward+backward", training(ours, [x]), training(theirs, [x]), 4 * size),
        ):
            found.append(Case("rope", op, shape, dtype, run, {"torch": peer}, verify, moved))
    return found
