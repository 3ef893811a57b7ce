"""Tile sizes of the products of family grouped_linear."""

from __future__ import annotations

import dataclasses

import torch

# Offsets that a program reads at a time when it looks for its group.
GROUP_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class ProductTile:
    """A program makes [rows, columns] of a result, `terms` terms of the sums at a time."""

    rows: int
    columns: int
    terms: int
    num_warps: int
    num_stages: int


def product_tile(dtype: torch.dtype) -> ProductTile:
    """As of the CUDA kernels: few rows, because groups are often small; below 99 KiB."""
    if dtype == torch.float32:
        return ProductTile(64, 64, 32, 8, 2)
    return ProductTile(64, 128, 64, 4, 3)
