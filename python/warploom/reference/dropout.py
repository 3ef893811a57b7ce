"""Counter-based dropout: Philox 4x32 with 10 rounds (Salmon et al. 2011), the same mask on every backend."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _multiply(constant: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of constant * value, for values of 32 bits held in int64."""
    low, high = (value & 0xFFFF) * constant, (value >> 16) * constant
    upper = (low >> 16) + high
    return upper >> 16, ((upper & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(key: Tensor, counters: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four tensors of 32 random bits (in int64) for an int64 key and four 32-bit counters."""
    c0, c1, c2, c3 = counters
    key0, key1 = key & _WORD, (key >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def keep_mask(
    seed: Tensor, dropout_p: float, first_head: int, heads: int, rows: int, columns: int
) -> Tensor:
    """bool [heads, rows, columns]: the elements that stay.

    Element (h, i, j) is number j % 4 of the counter (j // 4, i, first_head + h, 0) under key `seed`, an
    int64 tensor of one element; it is dropped if that is below floor(dropout_p 2^32).
    """

    def count(size: int) -> Tensor:
        return torch.arange(size, dtype=torch.int64, device=seed.device)

    quads = count(-(-columns // 4)).view(1, 1, -1)
    row, head = count(rows).view(1, -1, 1), (first_head + count(heads)).view(-1, 1, 1)
    shape = (heads, rows, quads.shape[-1])
    zero = torch.zeros(1, dtype=torch.int64, device=seed.device)
    numbers = philox(
        seed.reshape(()), (quads.expand(shape), row.expand(shape), head.expand(shape), zero)
    )
    drawn = torch.stack(numbers, dim=-1).flatten(-2)[..., :columns]
    return drawn >= int(dropout_p * 4294967296.0)
