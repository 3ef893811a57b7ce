"""Which elements dropout keeps: the mask of warploom.reference.dropout, drawn tile by tile."""

from __future__ import annotations

import triton
import triton.language as tl


def dropout_threshold(dropout_p: float) -> int:
    """What 32 random bits are compared with, as the signed number of the same bits."""
    threshold = int(dropout_p * 2**32)
    return threshold - 2**32 if threshold >= 2**31 else threshold


@triton.jit
def keep_mask(first_row, first_column, dropout, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """bool [BLOCK_M, BLOCK_N]: what dropout leaves of a tile; first_column is a multiple of 4.

    dropout is a tuple: the seed's pointer, the head, the threshold. Number j % 4 of
    philox(seed; j // 4, i, head, 0) decides on element (i, j).
    """
    seed_ptr, head, threshold = dropout
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], dtype=tl.int32)
    quads = zero + (first_column // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    rows = zero + (first_row + tl.arange(0, BLOCK_M))[:, None]
    # [BLOCK_M, BLOCK_N / 4] each
    n0, n1, n2, n3 = tl.philox(tl.load(seed_ptr), quads, rows, zero + head, zero)
    # A join adds a last dimension of 2: element (.., x, y) is number 2 x + y.
    numbers = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    numbers = tl.reshape(numbers, [BLOCK_M, BLOCK_N])
    return numbers >= threshold.to(tl.uint32, bitcast=True)
