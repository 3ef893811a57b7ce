"""How the norms cut [M, N] into tiles: whole rows, so that one program sees a row at once."""

from __future__ import annotations

import dataclasses

import torch
from warploom.triton_kernels.common.launch import next_power_of_2, warp_count

# A row lies in the registers of one program. Beyond this length it would not fit.
MAX_COLUMNS = 65536

# Short rows share a program until its tile has this many elements.
_TILE_ELEMENTS = 2048

# The backward kernels hold about 100 registers per lane: this many programs are resident.
PROGRAMS_PER_MULTIPROCESSOR = 4


@dataclasses.dataclass(frozen=True)
class RowTile:
    rows: int  # a power of two
    columns: int  # a power of two >= N
    num_warps: int


def row_tile(n: int) -> RowTile:
    """The tile for rows of length n."""
    columns = next_power_of_2(n)
    rows = max(1, min(32, _TILE_ELEMENTS // columns))
    return RowTile(rows, columns, warp_count(rows * columns))


def why_not_row_length(*args: object) -> list[str]:
    """The reason against rows that no program can hold."""
    longest = max(arg.shape[-1] for arg in args if isinstance(arg, torch.Tensor) and arg.dim())
    if longest > MAX_COLUMNS:
        return [f"rows of {longest} elements (takes up to {MAX_COLUMNS})"]
    return []
