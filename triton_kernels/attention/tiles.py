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


def forward_tile(dtype: torch.dtype, d: int, dv: int, plain: bool = True) -> AttentionTile:
    """The forward's tile; its accumulator is [queries, dv].

    A call that is not plain has more in its inner loop than products and a causal mask.

    This and the other tiles are large ones that ptxas compiles without spills for sm_80 and sm_90
    and that stay below 99 KiB of shared memory, what the smallest supported chips have.
    """
    widest = padded_head_dim(max(d, dv))
    if dtype == torch.float32:
        if widest <= 64:
            return AttentionTile(64, 32, 8, 1)
        return AttentionTile(32, 32, 8, 1) if widest <= 128 else AttentionTile(16, 16, 8, 1)
    if widest <= 64:
        return AttentionTile(128 if plain else 64, 64, 4, 3)
    if widest <= 128:
        return AttentionTile(128, 64, 8, 2) if plain else AttentionTile(64, 32, 8, 2)
    return AttentionTile(64 if plain else 32, 32, 8, 2)


def decode_tile(dtype: torch.dtype, d: int, dv: int, rows: int) -> AttentionTile:
    """The tile for `rows` pairs of a query and a head of one group: 16 rows fill a product.

    Reading the keys bounds it, so that its size depends on the head dims more than on the rows.
    """
    widest = padded_head_dim(max(d, dv))
    queries = 16 if rows <= 16 else 32
    if dtype == torch.float32:
        return AttentionTile(16, 32, 4, 1) if widest <= 128 else AttentionTile(16, 16, 8, 1)
    return AttentionTile(queries, 64, 4, 2) if widest <= 128 else AttentionTile(16, 32, 8, 2)


def key_gradients_tile(dtype: torch.dtype, d: int, dv: int, plain: bool = True) -> AttentionTile:
    """The tile for dK and dV; its accumulators are [keys, d] and [keys, dv]."""
    widest = padded_head_dim(max(d, dv))
    if dtype == torch.float32:
        return AttentionTile(32, 32, 8, 1) if widest <= 128 else AttentionTile(16, 16, 8, 1)
    if widest <= 64:
        return AttentionTile(32, 64, 4, 2) if plain else AttentionTile(32, 32, 8, 2)
    if widest <= 128:
        return AttentionTile(32, 64, 8, 2) if plain else AttentionTile(32, 32, 8, 1)
    return AttentionTile(32, 32 if plain else 16, 8, 1)


def query_gradients_tile(dtype: torch.dtype, d: int, dv: int, plain: bool = True) -> AttentionTile:
    """The tile for dQ; its accumulator is [queries, d]."""
    widest = padded_head_dim(max(d, dv))
    if dtype == torch.float32:
        return AttentionTile(32, 32, 8, 1) if widest <= 128 else AttentionTile(16, 16, 8, 1)
    if widest <= 64:
        return AttentionTile(64, 64, 4, 2) if plain else AttentionTile(64, 32, 8, 2)
    if widest <= 128:
        return AttentionTile(64, 64, 8, 1) if plain else AttentionTile(32, 32, 8, 1)
    return AttentionTile(32, 32, 4 if plain else 8, 1)


def why_not_attention(*args: object) -> list[str]:
    """What the attention kernels cannot do with the arguments of an op of this family.

    The first three are q, k and v, or of a backward grad_out, q and k: they show both head dims.
    """
    reasons = why_not_tensors(*args)
    widest = max(arg.shape[-1] for arg in args[:3] if isinstance(arg, torch.Tensor))
    if widest > MAX_HEAD_DIM:
        reasons.append(f"head dimension {widest} (takes up to {MAX_HEAD_DIM})")
    return reasons
