"""The half of attention's backward that owns a tile of queries: dQ."""

from __future__ import annotations

import triton
import triton.language as tl
from warploom.triton_kernels.attention.tiles import LOG2_E
from warploom.triton_kernels.common.numerics import cast, dot

# exp(x) = exp2(x * log2(e))
_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)


@triton.jit
def _add_query_gradients(
    b_grad_q,  # [BLOCK_M, BLOCK_D]
    b_q,  # [BLOCK_M, BLOCK_D]
    b_grad_out,  # [BLOCK_M, BLOCK_DV]
    b_lse,  # [BLOCK_M], times log2(e)
    b_delta,  # [BLOCK_M]
    p_k,  # [BLOCK_N, BLOCK_D] pointers to the tile of key 0
    p_v,  # [BLOCK_N, BLOCK_DV] pointers to the tile of key 0
    last_seen,  # [BLOCK_M] the last key that each query sees
    start,
    end,
    Sk,
    k_stride_s,
    v_stride_s,
    scale_log2,
    D: tl.constexpr,
    DV: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Adds what the keys [start, end) give to dQ / softmax_scale.

    Without MASKED every key of every tile is there and is seen by every query.
    """
    features = tl.arange(0, BLOCK_D)[None, :]
    value_features = tl.arange(0, BLOCK_DV)[None, :]
    for first in range(start, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        key_mask = (keys < Sk)[:, None]
        # [BLOCK_N, BLOCK_D]
        k_offset = tl.cast(first, tl.int64) * k_stride_s
        b_k = tl.load(p_k + k_offset, mask=key_mask & (features < D), other=0.0)
        # [BLOCK_N, BLOCK_DV]
        v_offset = tl.cast(first, tl.int64) * v_stride_s
        b_v = tl.load(p_v + v_offset, mask=key_mask & (value_features < DV), other=0.0)
        # [BLOCK_M, BLOCK_N]
        b_p = tl.exp2(dot(b_q, tl.trans(b_k)) * scale_log2 - b_lse[:, None])
        b_grad_score = b_p * (dot(b_grad_out, tl.trans(b_v)) - b_delta[:, None])
        if MASKED:
            # Also where a query sees no key at all: there lse is -inf and b_p is not a number.
            # Keys beyond Sk are within reach only of queries beyond Sq, which nobody stores.
            seen = keys[None, :] <= last_seen[:, None]
            b_grad_score = tl.where(seen, b_grad_score, 0.0)
        b_grad_q = dot(cast(b_grad_score, b_k.dtype), b_k, b_grad_q)
    return b_grad_q


@triton.jit(do_not_specialize=["H", "Sq", "Sk"])
def query_gradients_kernel(
    grad_out_ptr,  # [B, Sq, H, DV], strides grad_out_stride_{b,s,h}, 1
    q_ptr,  # [B, Sq, H, D], strides q_stride_{b,s,h}, 1
    k_ptr,  # [B, Sk, H / GROUP, D], strides k_stride_{b,s,h}, 1
    v_ptr,  # [B, Sk, H / GROUP, DV], strides v_stride_{b,s,h}, 1
    lse_ptr,  # [B, H, Sq] float32, contiguous
    delta_ptr,  # [B, H, Sq] float32, contiguous
    grad_q_ptr,  # [B, Sq, H, D], contiguous
    H,
    Sq,
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
    scale,
    scale_log2,  # softmax_scale * log2(e)
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """dQ = softmax_scale * dS K.

    Grid: [B * H * cdiv(Sq, BLOCK_M)]: query tiles fastest, the last one (causally the longest)
    first.
    """
    query_tiles = tl.cdiv(Sq, BLOCK_M)
    i_m = query_tiles - 1 - tl.program_id(0) % query_tiles
    i_bh = tl.program_id(0) // query_tiles
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    i_kv = i_h // GROUP

    rows = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    wide_rows = rows.to(tl.int64)
    keys = tl.arange(0, BLOCK_N).to(tl.int64)
    features = tl.arange(0, BLOCK_D)[None, :]
    value_features = tl.arange(0, BLOCK_DV)[None, :]
    row_mask = (rows < Sq)[:, None]
    # [BLOCK_M, BLOCK_D]
    p_q = q_ptr + i_b * q_stride_b + i_h * q_stride_h + wide_rows[:, None] * q_stride_s + features
    b_q = tl.load(p_q, mask=row_mask & (features < D), other=0.0)
    # [BLOCK_M, BLOCK_DV]
    p_grad_out = grad_out_ptr + i_b * grad_out_stride_b + i_h * grad_out_stride_h
    p_grad_out = p_grad_out + wide_rows[:, None] * grad_out_stride_s + value_features
    b_grad_out = tl.load(p_grad_out, mask=row_mask & (value_features < DV), other=0.0)
    # [BLOCK_M]
    i_row = i_bh.to(tl.int64) * Sq + wide_rows
    b_lse = tl.load(lse_ptr + i_row, mask=rows < Sq, other=0.0) * _LOG2_E
    b_delta = tl.load(delta_ptr + i_row, mask=rows < Sq, other=0.0)
    p_k = k_ptr + i_b * k_stride_b + i_kv * k_stride_h + keys[:, None] * k_stride_s + features
    p_v = v_ptr + i_b * v_stride_b + i_kv * v_stride_h + keys[:, None] * v_stride_s + value_features

    if CAUSAL:
        # Query i sees the keys j <= i + Sk - Sq. The tile's first query sees the fewest.
        last_seen = rows + (Sk - Sq)
        seen_by_all = tl.minimum(tl.maximum(i_m * BLOCK_M + Sk - Sq + 1, 0), Sk)
        end = tl.minimum(tl.maximum((i_m + 1) * BLOCK_M + Sk - Sq, 0), Sk)
    else:
        last_seen = rows * 0 + (Sk - 1)
        seen_by_all = Sk
        end = Sk
    whole = seen_by_all // BLOCK_N * BLOCK_N
    b_grad_q = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_grad_q = _add_query_gradients(
        b_grad_q, b_q, b_grad_out, b_lse, b_delta, p_k, p_v, last_seen, 0, whole, Sk,
        k_stride_s, v_stride_s, scale_log2, D, DV, False, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    b_grad_q = _add_query_gradients(
        b_grad_q, b_q, b_grad_out, b_lse, b_delta, p_k, p_v, last_seen, whole, end, Sk,
        k_stride_s, v_stride_s, scale_log2, D, DV, True, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    p_grad_q = grad_q_ptr + ((i_b * Sq + wide_rows[:, None]) * H + i_h) * D + features
    b_grad_q = cast(b_grad_q * scale, grad_q_ptr.dtype.element_ty)
    tl.store(p_grad_q, b_grad_q, mask=row_mask & (features < D))
