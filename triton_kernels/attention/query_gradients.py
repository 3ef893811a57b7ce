"""The half of attention's backward that owns a tile of queries: dQ, and the scores' own gradients."""

from __future__ import annotations

import triton
import triton.language as tl
from warploom.triton_kernels.attention.arguments import UNSPECIALIZED
from warploom.triton_kernels.attention.scoring import (
    LOG2_E,
    biased_scores,
    distances,
    key_range,
    seen_keys,
    sequence,
)
from warploom.triton_kernels.common.dropout import keep_mask
from warploom.triton_kernels.common.numerics import cast, dot, dot_of_rows


@triton.jit
def _add_query_gradients(
    grads,  # dQ / softmax_scale [BLOCK_M, BLOCK_D], grad_distance [BLOCK_M]
    b_q,  # [BLOCK_M, BLOCK_D]
    b_grad_out,  # [BLOCK_M, BLOCK_DV]
    b_lse,  # [BLOCK_M], times log2(e)
    b_delta,  # [BLOCK_M]
    k_ptr,  # [Sk, D] of one head
    v_ptr,  # [Sk, DV] of one head
    grad_bias,  # [B, H, Sq, Sk] contiguous or None, offset of the head
    rows,  # [BLOCK_M]
    first_row,
    start,
    end,
    key_strides,
    sizes,
    window,
    bias,
    alibi,
    padding,
    dropout,
    keep_scale,
    score_scale,
    softcap_log2,
    D: tl.constexpr,
    DV: tl.constexpr,
    LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DISTANCE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Adds what the keys [start, end) give.

    Without MASKED every key of every tile is there and is seen by every query.
    """
    b_grad_q, b_grad_distance = grads
    grad_bias_ptr, grad_bias_offset = grad_bias
    k_stride, v_stride = key_strides
    Sq, Sk = sizes
    features = tl.arange(0, BLOCK_D)[None, :]
    value_features = tl.arange(0, BLOCK_DV)[None, :]
    tile_keys = tl.arange(0, BLOCK_N)
    # [BLOCK_N, BLOCK_D] and [BLOCK_N, BLOCK_DV]: the tile of key 0
    p_k = k_ptr + tile_keys.to(tl.int64)[:, None] * k_stride + features
    p_v = v_ptr + tile_keys.to(tl.int64)[:, None] * v_stride + value_features
    for first in range(start, end, BLOCK_N):
        keys = first + tile_keys
        key_mask = (keys < Sk)[:, None]
        # [BLOCK_N, BLOCK_D]
        k_offset = tl.cast(first, tl.int64) * k_stride
        b_k = tl.load(p_k + k_offset, mask=key_mask & (features < D), other=0.0)
        # [BLOCK_N, BLOCK_DV]
        v_offset = tl.cast(first, tl.int64) * v_stride
        b_v = tl.load(p_v + v_offset, mask=key_mask & (value_features < DV), other=0.0)
        # [BLOCK_M, BLOCK_N]
        b_score, b_tanh = biased_scores(
            dot_of_rows(b_q, b_k), rows[:, None], keys[None, :], sizes, bias, alibi, score_scale,
            softcap_log2, SOFTCAP,
        )  # fmt: skip
        b_p = tl.exp2(b_score - b_lse[:, None])
        if MASKED:
            # Before the product: the exponential of a key that is not seen may be infinite.
            seen = seen_keys(rows[:, None], keys[None, :], sizes, window, padding, LEFT)
            b_p = tl.where(seen, b_p, 0.0)
        b_grad_p = dot(b_grad_out, tl.trans(b_v))
        if dropout[0] is not None:
            kept = keep_mask(first_row, first, dropout, BLOCK_M, BLOCK_N)
            b_grad_p = tl.where(kept, b_grad_p * keep_scale, 0.0)
        b_grad_score = b_p * (b_grad_p - b_delta[:, None])
        if grad_bias_ptr is not None:
            p_grad_bias = grad_bias_ptr + grad_bias_offset + rows.to(tl.int64)[:, None] * Sk
            stored = (rows < Sq)[:, None] & (keys < Sk)[None, :]
            b_grad_bias = cast(b_grad_score, grad_bias_ptr.dtype.element_ty)
            tl.store(p_grad_bias + keys[None, :], b_grad_bias, mask=stored)
        if DISTANCE:
            b_weighted = distances(rows[:, None], keys[None, :], sizes) * b_grad_score
            b_grad_distance -= tl.sum(b_weighted, axis=1)
        if SOFTCAP:
            b_grad_score *= 1.0 - b_tanh * b_tanh
        b_grad_q = dot(cast(b_grad_score, b_k.dtype), b_k, b_grad_q)
    return b_grad_q, b_grad_distance


@triton.jit(do_not_specialize=UNSPECIALIZED)
def query_gradients_kernel(
    grad_out_ptr,  # [B, Sq, H, DV], strides grad_out_stride_{b,s,h}, 1; or packed [Tq, H, DV]
    q_ptr,  # [B, Sq, H, D], strides q_stride_{b,s,h}, 1; or packed [Tq, H, D]
    k_ptr,  # [B, Sk, H / GROUP, D], strides k_stride_{b,s,h}, 1; or packed
    v_ptr,  # [B, Sk, H / GROUP, DV], strides v_stride_{b,s,h}, 1; or packed
    lse_ptr,  # [B, H, Sq] or [H, Tq] float32, strides lse_stride_{b,h}, 1
    delta_ptr,  # as lse
    bias_ptr,  # [B, H, Sq, Sk], strides bias_stride_{b,h,q,k}; or None
    alibi_ptr,  # [B, H] float32, contiguous; or None
    padding_ptr,  # [B, Sk] bytes, contiguous, not 0 where the key is hidden; or None
    cu_seqlens_q_ptr,  # [B + 1] int32; or None: dense
    cu_seqlens_k_ptr,  # [B + 1] int32; or None: dense
    seed_ptr,  # [1] int64; or None: no dropout
    grad_q_ptr,  # as q, strides grad_q_stride_{b,s,h}, 1
    grad_bias_ptr,  # [B, H, Sq, Sk], contiguous, zeros; or None
    grad_distance_ptr,  # as lse; or None
    H,
    Sq,  # packed: no sequence is longer
    Sk,
    grad_out_stride_b,
    grad_out_stride_s,
    grad_out_stride_h,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    grad_q_stride_b,
    grad_q_stride_s,
    grad_q_stride_h,
    lse_stride_b,
    lse_stride_h,
    bias_stride_b,
    bias_stride_h,
    bias_stride_q,
    bias_stride_k,
    window_left,
    window_right,
    dropout_threshold,
    keep_scale,  # 1 / (1 - dropout_p)
    softmax_scale,
    score_scale,  # softmax_scale log2(e); with SOFTCAP softmax_scale / softcap
    softcap_log2,  # softcap log2(e)
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """dQ = softmax_scale dS K; grad_bias = dB and grad_distance = -sum(distance * dB), where
    dB = P * (dP - delta) and dS = (1 - tanh^2) dB.

    Grid: [B * H * cdiv(Sq, BLOCK_M)]: query tiles fastest, the last one (causally the longest)
    first.
    """
    query_tiles = tl.cdiv(Sq, BLOCK_M)
    first_row = (query_tiles - 1 - tl.program_id(0) % query_tiles) * BLOCK_M
    i_bh = tl.program_id(0) // query_tiles
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    i_kv = i_h // GROUP
    q_start, k_start, Sq, Sk = sequence(cu_seqlens_q_ptr, cu_seqlens_k_ptr, i_b, Sq, Sk)
    if first_row >= Sq:
        return

    rows = first_row + tl.arange(0, BLOCK_M)
    wide_rows = (q_start + rows)[:, None]
    features = tl.arange(0, BLOCK_D)[None, :]
    value_features = tl.arange(0, BLOCK_DV)[None, :]
    row_mask = (rows < Sq)[:, None]
    # [BLOCK_M, BLOCK_D]
    p_q = q_ptr + i_b * q_stride_b + i_h * q_stride_h + wide_rows * q_stride_s + features
    b_q = tl.load(p_q, mask=row_mask & (features < D), other=0.0)
    # [BLOCK_M, BLOCK_DV]
    p_grad_out = grad_out_ptr + i_b * grad_out_stride_b + i_h * grad_out_stride_h
    p_grad_out = p_grad_out + wide_rows * grad_out_stride_s + value_features
    b_grad_out = tl.load(p_grad_out, mask=row_mask & (value_features < DV), other=0.0)
    # [BLOCK_M]
    i_row = i_b * lse_stride_b + i_h * lse_stride_h + q_start + rows
    b_lse = tl.load(lse_ptr + i_row, mask=rows < Sq, other=0.0) * LOG2_E
    # A query that sees no key: its probabilities shall be exp2(-inf - 0).
    b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)
    b_delta = tl.load(delta_ptr + i_row, mask=rows < Sq, other=0.0)

    k_head = k_ptr + i_b * k_stride_b + i_kv * k_stride_h + k_start * k_stride_s
    v_head = v_ptr + i_b * v_stride_b + i_kv * v_stride_h + k_start * v_stride_s
    key_strides = (k_stride_s, v_stride_s)
    sizes = (Sq, Sk)
    window = (window_left, window_right)
    bias_offset = i_b * bias_stride_b + i_h * bias_stride_h
    bias = (bias_ptr, bias_offset, bias_stride_q, bias_stride_k)
    grad_bias = (grad_bias_ptr, i_bh.to(tl.int64) * Sq * Sk)
    alibi = (alibi_ptr, i_bh)
    padding = (padding_ptr, i_b * Sk)
    dropout = (seed_ptr, i_bh, dropout_threshold)

    DISTANCE: tl.constexpr = grad_distance_ptr is not None
    b_grad_q = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    grads = (b_grad_q, tl.zeros([BLOCK_M], dtype=tl.float32))
    start, whole_start, whole_end, end = key_range(first_row, sizes, window, LEFT, BLOCK_M, BLOCK_N)
    if padding_ptr is not None:
        whole_end = whole_start
    if LEFT:
        grads = _add_query_gradients(
            grads, b_q, b_grad_out, b_lse, b_delta, k_head, v_head, grad_bias, rows, first_row,
            start, tl.minimum(whole_start, end), key_strides, sizes, window, bias, alibi, padding,
            dropout, keep_scale, score_scale, softcap_log2, D, DV, LEFT, SOFTCAP, DISTANCE, True,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    if padding_ptr is None:
        grads = _add_query_gradients(
            grads, b_q, b_grad_out, b_lse, b_delta, k_head, v_head, grad_bias, rows, first_row,
            whole_start, whole_end, key_strides, sizes, window, bias, alibi, padding,
            dropout, keep_scale, score_scale, softcap_log2, D, DV, LEFT, SOFTCAP, DISTANCE, False,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    grads = _add_query_gradients(
        grads, b_q, b_grad_out, b_lse, b_delta, k_head, v_head, grad_bias, rows, first_row,
        whole_end, end, key_strides, sizes, window, bias, alibi, padding,
        dropout, keep_scale, score_scale, softcap_log2, D, DV, LEFT, SOFTCAP, DISTANCE, True,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip

    b_grad_q, b_grad_distance = grads
    p_grad_q = grad_q_ptr + i_b * grad_q_stride_b + i_h * grad_q_stride_h
    p_grad_q = p_grad_q + wide_rows * grad_q_stride_s + features
    b_grad_q = cast(b_grad_q * softmax_scale, grad_q_ptr.dtype.element_ty)
    tl.store(p_grad_q, b_grad_q, mask=row_mask & (features < D))
    if DISTANCE:
        tl.store(grad_distance_ptr + i_row, b_grad_distance, mask=rows < Sq)
