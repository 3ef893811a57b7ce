"""Tile sizes of this family.

They are large ones that stay below 99 KiB of shared memory, what the smallest supported chips have,
and that ptxas compiles without spills at 512 + 64 features; rotary keys of more than 128 spill some.
"""

from __future__ import annotations

import dataclasses

import torch
from warploom.triton_kernels.common.launch import next_power_of_2

# What the tiles of decoding may take of shared memory, less what the scores need.
_SHARED_BYTES = 96 << 10


@dataclasses.dataclass(frozen=True)
class MlaTile:
    rows: int  # pairs of a query and a head
    keys: int
    num_warps: int
    num_stages: int


def decode_tile(
    dtype: torch.dtype, d_latent: int, d_rope: int, rows: int, compressed: bool
) -> MlaTile:
    """The tile for `rows` pairs of a query and a head, of which 16 fill a product; its accumulator
    is [rows, d_latent].

    The numbers of a compressed row pass through registers, of which float32 needs many too.
    """
    if compressed or dtype == torch.float32:
        return MlaTile(16, 16, 8, 1)
    if rows <= 16:
        tile = MlaTile(16, 32, 4, 3)
    else:
        tile = MlaTile(32 if rows <= 32 or d_latent > 256 else 64, 32, 8, 3)
    row_bytes = (next_power_of_2(d_latent) + next_power_of_2(d_rope)) * dtype.itemsize
    # Queries, and as many buffers of keys as there are stages but one.
    fits = (tile.rows + 2 * tile.keys) * row_bytes <= _SHARED_BYTES
    return tile if fits else dataclasses.replace(tile, num_stages=2)


def backward_tile(dtype: torch.dtype) -> tuple[MlaTile, int]:
    """The tile of both gradients, whose accumulators are [keys, d] and [rows, d], and how many
    features of a latent are multiplied at one time."""
    if dtype == torch.float32:
        return MlaTile(16, 16, 8, 1), 64
    return MlaTile(32, 32, 8, 2), 128
