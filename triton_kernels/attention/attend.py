"""The inner loop of attention over keys, which prefill and decoding share (FlashAttention-2)."""

from __future__ import annotations

import triton
import triton.language as tl
from warploom.triton_kernels.attention.scoring import (
    biased_scores,
    seen_keys,
)
from warploom.triton_kernels.common.dropout import keep_mask
from warploom.triton_kernels.common.numerics import cast, dot, dot_of_rows


@triton.jit
def attend(
    state,  # running maximum [BLOCK_M] of the scores times log2(e), sum [BLOCK_M], out [BLOCK_M, BLOCK_DV]
    b_q,  # [BLOCK_M, BLOCK_D]
    k_ptr,  # [Sk, D] of one head; with pages [num_blocks, PAGE_SIZE, D]
    v_ptr,  # [Sk, DV], or pages
    key_strides,  # of keys in k and v, and of blocks in k and v
    pages,
    rows,  # [BLOCK_M] the queries
    first_row,
    start,
    end,
    sizes,
    window,
    bias,
    alibi,
    padding,
    dropout,
    score_scale,
    softcap_log2,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Takes the keys [start, end) into the state. scoring.py says what the tuples are.

    Without MASKED every key of every tile is there and seen by every query. Of a block table only
    the entries of keys before Sk are read. Dropped probabilities are in the sum, not in the out.
    """
    b_max, b_sum, b_out = state
    k_stride, v_stride, k_stride_block, v_stride_block = key_strides
    block_table_ptr, block_table_offset = pages
    Sk = sizes[1]
    features = tl.arange(0, BLOCK_D)[:, None]
    value_features = tl.arange(0, BLOCK_DV)[None, :]
    tile_keys = tl.arange(0, BLOCK_N)
    # [BLOCK_D, BLOCK_N] and [BLOCK_N, BLOCK_DV]: the tile of key 0
    p_k = k_ptr + tile_keys.to(tl.int64)[None, :] * k_stride + features
    p_v = v_ptr + tile_keys.to(tl.int64)[:, None] * v_stride + value_features
    for first in range(start, end, BLOCK_N):
        keys = first + tile_keys
        if block_table_ptr is None:
            p_k_tile = p_k + tl.cast(first, tl.int64) * k_stride
            p_v_tile = p_v + tl.cast(first, tl.int64) * v_stride
        else:
            # [BLOCK_N]
            p_block = block_table_ptr + block_table_offset + keys // PAGE_SIZE
            b_block = tl.load(p_block, mask=keys < Sk, other=0).to(tl.int64)
            slots = (keys % PAGE_SIZE).to(tl.int64)
            k_rows = b_block * k_stride_block + slots * k_stride
            v_rows = b_block * v_stride_block + slots * v_stride
            p_k_tile = k_ptr + k_rows[None, :] + features
            p_v_tile = v_ptr + v_rows[:, None] + value_features
        # [BLOCK_D, BLOCK_N]
        b_k = tl.load(p_k_tile, mask=(features < D) & (keys < Sk)[None, :], other=0.0)
        # [BLOCK_M, BLOCK_N]
        b_score, _ = biased_scores(
            dot_of_rows(b_q, tl.trans(b_k)), rows[:, None], keys[None, :], sizes, bias, alibi,
            score_scale, softcap_log2, SOFTCAP,
        )  # fmt: skip
        if MASKED:
            seen = seen_keys(rows[:, None], keys[None, :], sizes, window, padding, LEFT)
            b_score = tl.where(seen, b_score, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_score, axis=1))
        b_shift = b_new_max
        if MASKED:
            # A query that has seen no key yet: exp2(-inf - 0) is 0, exp2(-inf - -inf) would be NaN.
            b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_score - b_shift[:, None])
        b_rescale = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_rescale + tl.sum(b_p, axis=1)
        if dropout[0] is not None:
            kept = keep_mask(first_row, first, dropout, BLOCK_M, BLOCK_N)
            b_p = tl.where(kept, b_p, 0.0)
        # [BLOCK_N, BLOCK_DV]
        v_mask = (keys < Sk)[:, None] & (value_features < DV)
        b_v = tl.load(p_v_tile, mask=v_mask, other=0.0)
        b_out = dot(cast(b_p, b_v.dtype), b_v, b_out * b_rescale[:, None])
        b_max = b_new_max
    return b_max, b_sum, b_out


@triton.jit
def initial_state(b_sink, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """No key seen but the sink: a logit [BLOCK_M] times log2(e), -inf for none, whose value is 0."""
    b_sum = tl.where(b_sink == float("-inf"), 0.0, 1.0)
    return b_sink, b_sum, tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)


@triton.jit
def finish(state):
    """(softmax-weighted mean of the values, log2 of the sum); 0 and -inf where no key was seen."""
    b_max, b_sum, b_out = state
    b_divisor = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_lse = tl.where(b_sum == 0.0, float("-inf"), b_max + tl.log2(b_divisor))
    return b_out / b_divisor[:, None], b_lse
