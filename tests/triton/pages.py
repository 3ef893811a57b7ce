"""Caches in pages, with everything that no sequence owns spoiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: In the places of a block table behind a sequence's last page: no block has this number.
GARBAGE = 2147480000


def paged(
    lengths: Sequence[int],
    page_size: int,
    k_row: tuple[int, int],
    v_row: tuple[int, int],
    random: Callable[..., Tensor],
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """k and v [num_blocks, page_size, Hkv, D], NaN outside the sequences, and their block table."""
    places = max(1, -(-max(lengths) // page_size))
    count = places * len(lengths)
    blocks = torch.randperm(count, device="cpu").view(len(lengths), places).to(torch.int32)
    table = torch.full((len(lengths), places), GARBAGE, dtype=torch.int32)
    caches = [
        torch.full((count, page_size, *row), torch.nan, dtype=dtype) for row in (k_row, v_row)
    ]
    for place, length in enumerate(lengths):
        used = -(-length // page_size)
        table[place, :used] = blocks[place, :used]
        for start in range(0, length, page_size):
            block = int(blocks[place, start // page_size])
            rows = min(page_size, length - start)
            for cache in caches:
                cache[block, :rows] = random(rows, *cache.shape[2:], dtype=dtype)
    return caches[0], caches[1], table
