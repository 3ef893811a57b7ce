"""The half of attention's backward that owns a tile of keys: dK and dV."""

from __future__ import annotations

import triton
import triton.language as tl
from warploom.triton_kernels.attention.arguments import UNSPECIALIZED
from warploom.triton_kernels.attention.scoring import (
    LOG2_E,
    biased_scores,
    query_range,
    seen_keys,
    sequence,
)
from warploom.triton_kernels.common.dropout import keep_mask
from warploom.triton_kernels.common.numerics import cast, dot, dot_of_rows


@triton.jit
def _add_key_gradients(
    grads,  # dK / softmax_scale [BLOCK_N, BLOCK_D], (1 - dropout_p) dV [BLOCK_N, BLOCK_DV]
    b_k,  # [BLOCK_N, BLOCK_D]
    b_v,  # [BLOCK_N, BLOCK_DV]
    q_ptr,  # [Sq, D] of one head
    grad_out_ptr,  # [Sq, DV] of one head
    lse_ptr,  # [Sq]
    delta_ptr,  # [Sq]
    keys,  # [BLOCK_N]
    first_key,
    start,
    end,
    query_strides,  # of queries in q and grad_out
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
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Adds what the queries [start, end) give.

    Without MASKED every query sees every key. Queries beyond Sq are read as zeros and give zeros.
    """
    b_grad_k, b_grad_v = grads
    q_stride, grad_out_stride = query_strides
    Sq = sizes[0]
    features = tl.arange(0, BLOCK_D)[None, :]
    value_features = tl.arange(0, BLOCK_DV)[None, :]
    tile_rows = tl.arange(0, BLOCK_M)
    # [BLOCK_M, BLOCK_D] and [BLOCK_M, BLOCK_DV]: the tile of query 0
    p_q = q_ptr + tile_rows.to(tl.int64)[:, None] * q_stride + features
    p_grad_out = grad_out_ptr + tile_rows.to(tl.int64)[:, None] * grad_out_stride + value_features
    for first in range(start, end, BLOCK_M):
        rows = first + tile_rows
        row_mask = (rows < Sq)[:, None]
        # [BLOCK_M, BLOCK_D]
        q_offset = tl.cast(first, tl.int64) * q_stride
        b_q = tl.load(p_q + q_offset, mask=row_mask & (features < D), other=0.0)
        # [BLOCK_M, BLOCK_DV]
        grad_out_offset = tl.cast(first, tl.int64) * grad_out_stride
        grad_out_mask = row_mask & (value_features < DV)
        b_grad_out = tl.load(p_grad_out + grad_out_offset, mask=grad_out_mask, other=0.0)
        # [BLOCK_M]
        b_lse = tl.load(lse_ptr + rows, mask=rows < Sq, other=0.0) * LOG2_E
        # A query that sees no key: its probabilities shall be exp2(-inf - 0).
        b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)
        b_delta = tl.load(delta_ptr + rows, mask=rows < Sq, other=0.0)
        # [BLOCK_N, BLOCK_M]
        b_score, b_tanh = biased_scores(
            dot_of_rows(b_k, b_q), rows[None, :], keys[:, None], sizes, bias, alibi, score_scale,
            softcap_log2, SOFTCAP,
        )  # fmt: skip
        b_p = tl.exp2(b_score - b_lse[None, :])
        if MASKED:
            # Before the product: the exponential of a key that is not seen may be infinite.
            seen = seen_keys(rows[None, :], keys[:, None], sizes, window, padding, LEFT)
            b_p = tl.where(seen, b_p, 0.0)
        b_grad_score = dot(b_v, tl.trans(b_grad_out))
        b_dropped = b_p
        if dropout[0] is not None:
            kept = tl.trans(keep_mask(first, first_key, dropout, BLOCK_M, BLOCK_N))
            b_grad_score = tl.where(kept, b_grad_score * keep_scale, 0.0)
            b_dropped = tl.where(kept, b_p, 0.0)
        b_grad_score = b_p * (b_grad_score - b_delta[None, :])
        if SOFTCAP:
            b_grad_score *= 1.0 - b_tanh * b_tanh
        b_grad_v = dot(cast(b_dropped, b_grad_out.dtype), b_grad_out, b_grad_v)
        b_grad_k = dot(cast(b_grad_score, b_q.dtype), b_q, b_grad_k)
    return b_grad_k, b_grad_v


@triton.jit(do_not_specialize=UNSPECIALIZED)
def key_gradients_kernel(
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
    grad_k_ptr,  # as k, strides grad_k_stride_{b,s,h}, 1
    grad_v_ptr,  # as v, strides grad_v_stride_{b,s,h}, 1
    H,
    Sq,
    Sk,  # packed: no sequence is longer
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
    grad_k_stride_b,
    grad_k_stride_s,
    grad_k_stride_h,
    grad_v_stride_b,
    grad_v_stride_s,
    grad_v_stride_h,
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
    """dV = P^T dO and dK = softmax_scale dS^T Q, summed over the heads of the group.

    Grid: [B * (H / GROUP) * cdiv(Sk, BLOCK_N)]: key tiles fastest, the first one (causally the
    longest) first.
    """
    key_tiles = tl.cdiv(Sk, BLOCK_N)
    first_key = tl.program_id(0) % key_tiles * BLOCK_N
    kv_heads = H // GROUP
    i_b = (tl.program_id(0) // key_tiles // kv_heads).to(tl.int64)
    i_kv = (tl.program_id(0) // key_tiles % kv_heads).to(tl.int64)
    q_start, k_start, Sq, Sk = sequence(cu_seqlens_q_ptr, cu_seqlens_k_ptr, i_b, Sq, Sk)
    if first_key >= Sk:
        return

    keys = first_key + tl.arange(0, BLOCK_N)
    wide_keys = (k_start + keys)[:, None]
    features = tl.arange(0, BLOCK_D)[None, :]
    value_features = tl.arange(0, BLOCK_DV)[None, :]
    k_mask = (keys < Sk)[:, None] & (features < D)
    v_mask = (keys < Sk)[:, None] & (value_features < DV)
    # [BLOCK_N, BLOCK_D]
    p_k = k_ptr + i_b * k_stride_b + i_kv * k_stride_h + wide_keys * k_stride_s + features
    b_k = tl.load(p_k, mask=k_mask, other=0.0)
    # [BLOCK_N, BLOCK_DV]
    p_v = v_ptr + i_b * v_stride_b + i_kv * v_stride_h + wide_keys * v_stride_s + value_features
    b_v = tl.load(p_v, mask=v_mask, other=0.0)

    query_strides = (q_stride_s, grad_out_stride_s)
    sizes = (Sq, Sk)
    window = (window_left, window_right)
    padding = (padding_ptr, i_b * Sk)
    start, whole_start, whole_end, end = query_range(
        first_key, sizes, window, LEFT, BLOCK_M, BLOCK_N
    )
    if padding_ptr is not None:
        whole_end = whole_start
    b_grad_k = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    grads = (b_grad_k, tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32))
    for i_group in range(0, GROUP):
        i_h = i_kv * GROUP + i_group
        q_head = q_ptr + i_b * q_stride_b + i_h * q_stride_h + q_start * q_stride_s
        grad_out_head = grad_out_ptr + i_b * grad_out_stride_b + i_h * grad_out_stride_h
        grad_out_head += q_start * grad_out_stride_s
        lse_offset = i_b * lse_stride_b + i_h * lse_stride_h + q_start
        p_lse = lse_ptr + lse_offset
        p_delta = delta_ptr + lse_offset
        i_bh = (i_b * H + i_h).to(tl.int32)
        bias_offset = i_b * bias_stride_b + i_h * bias_stride_h
        bias = (bias_ptr, bias_offset, bias_stride_q, bias_stride_k)
        alibi = (alibi_ptr, i_bh)
        dropout = (seed_ptr, i_bh, dropout_threshold)
        grads = _add_key_gradients(
            grads, b_k, b_v, q_head, grad_out_head, p_lse, p_delta, keys, first_key,
            start, tl.minimum(whole_start, end), query_strides, sizes, window, bias, alibi, padding,
            dropout, keep_scale, score_scale, softcap_log2, D, DV, LEFT, SOFTCAP, True,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        if padding_ptr is None:
            grads = _add_key_gradients(
                grads, b_k, b_v, q_head, grad_out_head, p_lse, p_delta, keys, first_key,
                whole_start, whole_end, query_strides, sizes, window, bias, alibi, padding,
                dropout, keep_scale, score_scale, softcap_log2, D, DV, LEFT, SOFTCAP, False,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
        if LEFT or padding_ptr is not None:
            grads = _add_key_gradients(
                grads, b_k, b_v, q_head, grad_out_head, p_lse, p_delta, keys, first_key,
                whole_end, end, query_strides, sizes, window, bias, alibi, padding,
                dropout, keep_scale, score_scale, softcap_log2, D, DV, LEFT, SOFTCAP, True,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    b_grad_k, b_grad_v = grads
    p_grad_k = grad_k_ptr + i_b * grad_k_stride_b + i_kv * grad_k_stride_h
    p_grad_v = grad_v_ptr + i_b * grad_v_stride_b + i_kv * grad_v_stride_h
    b_grad_k = cast(b_grad_k * softmax_scale, grad_k_ptr.dtype.element_ty)
    b_grad_v = cast(b_grad_v * keep_scale, grad_v_ptr.dtype.element_ty)
    tl.store(p_grad_k + wide_keys * grad_k_stride_s + features, b_grad_k, mask=k_mask)
    tl.store(p_grad_v + wide_keys * grad_v_stride_s + value_features, b_grad_v, mask=v_mask)
