"""Tile sizes and limits that attention's forward and backward share."""

from __future__ import annotations

import dataclasses

import torch
from warploom.triton_kernels.common.launch import next_power_of_2, why_not_tensors

MAX_HEAD_DIM = 256

LOG2_E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class AttentionTile:
    queries: int
    keys: int
    num_warps: int
    num_stages: int


def padded_head_dim(d: int) -> int:
    """The width of a tile that holds d features: a power of two, at least one product deep."""
    return max(16, next_power_of_2(d))


def forward_tile(dtype: torch.dtype, d: int, dv: int) -> AttentionTile:
    """The forward's tile; its accumulator is [queries, dv].

    This and the other tiles are large ones that ptxas compiles without spills for sm_80 and sm_90
    and that stay below 99 KiB of shared memory, what the smallest supported chips have.
    """
    widest = padded_head_dim(max(d, dv))
    if dtype == torch.float32:
        if widest <= 64:
            return AttentionTile(64, 32, 8, 1)
        return AttentionTile(32, 32, 8, 1) if widest <= 128 else AttentionTile(16, 32, 8, 1)
    if widest <= 64:
        return AttentionTile(128, 64, 4, 3)
    if widest <= 128:
        return AttentionTile(128, 64, 8, 2)
    return AttentionTile(64, 32, 8, 2)


def key_gradients_tile(dtype: torch.dtype, d: int, dv: int) -> AttentionTile:
    """The tile for dK and dV; its accumulators are [keys, d] and [keys, dv]."""
    widest = padded_head_dim(max(d, dv))
    if dtype == torch.float32:
        return AttentionTile(32, 32, 8, 1) if widest <= 128 else AttentionTile(16, 32, 8, 1)
    if widest <= 64:
        return AttentionTile(32, 64, 4, 2)
    if widest <= 128:
        return AttentionTile(32, 64, 8, 2)
    return AttentionTile(32, 32, 8, 1)


def query_gradients_tile(dtype: torch.dtype, d: int, dv: int) -> AttentionTile:
    """The tile for dQ; its accumulator is [queries, d]."""
    widest = padded_head_dim(max(d, dv))
    if dtype == torch.float32:
        return AttentionTile(32, 32, 8, 1) if widest <= 128 else AttentionTile(32, 16, 8, 1)
    if widest <= 64:
        return AttentionTile(64, 64, 4, 2)
    if widest <= 128:
        return AttentionTile(64, 64, 8, 1)
    return AttentionTile(32, 32, 4, 1)


def why_not_attention(*args: object) -> list[str]:
    """What the attention kernels cannot do with the arguments of an op of this family."""
    reasons = why_not_tensors(*args)
    heads = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 4]
    widest = max((head.shape[-1] for head in heads), default=0)
    if widest > MAX_HEAD_DIM:
        reasons.append(f"head dimension {widest} (takes up to {MAX_HEAD_DIM})")
    return reasons
