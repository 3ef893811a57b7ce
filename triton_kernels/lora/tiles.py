"""Tile sizes of family lora's products, within the shared memory of every GPU from sm_80 on."""

from __future__ import annotations

import torch
from warploom.triton_kernels.common.launch import next_power_of_2
from warploom.triton_kernels.grouped_linear.tiles import ProductTile, product_tile

# The ranks that one program of a shrink holds.
MAX_RANK = 256

# Row tiles whose column tiles are made together, so that both operands are found in the L2 cache.
ROW_BAND = 8

# Terms of a sum over rows that are worth a program of their own, and the programs that fill a GPU.
_SPLIT_ROWS = 512
_SPLIT_PROGRAMS = 128


def _padded(size: int, limit: int) -> int:
    """A power of two that holds `size`, as products take it: from 16 to `limit`."""
    return max(16, min(limit, next_power_of_2(size)))


def shrink_tile(dtype: torch.dtype, rank: int) -> ProductTile:
    """[M, K] to [M, R]: few rows, because x is read once and its row tiles are all the programs."""
    columns = _padded(rank, MAX_RANK)
    wide = columns > 64
    terms = (64 if wide else 128) // (2 if dtype == torch.float32 else 1)
    return ProductTile(32, columns, terms, 8 if wide else 4, 2 if wide else 3)


def update_tile(
    dtype: torch.dtype, rows: int, quantised: bool = False, transposed: bool = True
) -> ProductTile:
    """[M, R] and [M, K] to [M, N]. A tile of a quantised weight has at most 64 columns (terms if the
    weight is transposed): in blocks of 64, as nf4 has them, that is one scale a row.
    """
    if dtype == torch.float32:
        return product_tile(dtype)
    if rows <= 32:
        return ProductTile(32, 64, 64 if quantised else 128, 4, 3)
    return ProductTile(128, 64 if quantised and not transposed else 128, 64, 8, 3)


def rank_block(rank: int, tile: ProductTile) -> int:
    """Terms of a step of the low-rank product."""
    return _padded(rank, tile.terms)


def outer_tile(dtype: torch.dtype, rows: int, columns: int) -> ProductTile:
    """[M, rows] and [M, columns] to [rows, columns]."""
    limit, terms = (64, 32) if dtype == torch.float32 else (128, 64)
    a, b = _padded(rows, limit), _padded(columns, limit)
    return ProductTile(a, b, terms, 8 if a * b > 64 * 64 else 4, 3)


def outer_splits(terms: int, tiles: int) -> int:
    """Parts of a sum over rows: of the shape alone, so that it is added in one order everywhere."""
    return max(1, min(terms // _SPLIT_ROWS, _SPLIT_PROGRAMS // max(1, tiles)))
