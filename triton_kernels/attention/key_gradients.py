"""The half of attention's backward that owns a tile of keys: dK and dV."""

from __future__ import annotations

import triton
import triton.language as tl
from warploom.triton_kernels.attention.tiles import LOG2_E
from warploom.triton_kernels.common.numerics import cast, dot

# exp(x) = exp2(x * log2(e))
_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)


@triton.jit
def _add_key_gradients(
    b_grad_k,  # [BLOCK_N, BLOCK_D]
    b_grad_v,  # [BLOCK_N, BLOCK_DV]
    b_k,  # [BLOCK_N, BLOCK_D]
    b_v,  # [BLOCK_N, BLOCK_DV]
    p_q,  # [BLOCK_M, BLOCK_D] pointers to the tile of query 0
    p_grad_out,  # [BLOCK_M, BLOCK_DV] pointers to the tile of query 0
    lse_ptr,  # [Sq]
    delta_ptr,  # [Sq]
    keys,  # [BLOCK_N]
    start,
    end,
    Sq,
    Sk,
    q_stride_s,
    grad_out_stride_s,
    scale_log2,
    D: tl.constexpr,
    DV: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Adds what the queries [start, end) give to dK / softmax_scale and dV.

    Without MASKED every query sees every key. Queries beyond Sq are read as zeros and give zeros.
    """
    features = tl.arange(0, BLOCK_D)[None, :]
    value_features = tl.arange(0, BLOCK_DV)[None, :]
    for first in range(start, end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        row_mask = (rows < Sq)[:, None]
        # [BLOCK_M, BLOCK_D]
        q_offset = tl.cast(first, tl.int64) * q_stride_s
        b_q = tl.load(p_q + q_offset, mask=row_mask & (features < D), other=0.0)
        # [BLOCK_M, BLOCK_DV]
        grad_out_offset = tl.cast(first, tl.int64) * grad_out_stride_s
        grad_out_mask = row_mask & (value_features < DV)
        b_grad_out = tl.load(p_grad_out + grad_out_offset, mask=grad_out_mask, other=0.0)
        # [BLOCK_M]
        b_lse = tl.load(lse_ptr + rows, mask=rows < Sq, other=0.0) * _LOG2_E
        b_delta = tl.load(delta_ptr + rows, mask=rows < Sq, other=0.0)
        # [BLOCK_N, BLOCK_M]
        b_p = tl.exp2(dot(b_k, tl.trans(b_q)) * scale_log2 - b_lse[None, :])
        b_grad_score = dot(b_v, tl.trans(b_grad_out)) - b_delta[None, :]
        if MASKED:
            # Also where a query sees no key at all: there lse is -inf and b_p is not a number.
            seen = keys[:, None] <= rows[None, :] + (Sk - Sq)
            b_p = tl.where(seen, b_p, 0.0)
        b_grad_score = b_p * b_grad_score
        b_grad_v = dot(cast(b_p, b_grad_out.dtype), b_grad_out, b_grad_v)
        b_grad_k = dot(cast(b_grad_score, b_q.dtype), b_q, b_grad_k)
    return b_grad_k, b_grad_v


@triton.jit(do_not_specialize=["H", "Sq", "Sk"])
def key_gradients_kernel(
    grad_out_ptr,  # [B, Sq, H, DV], strides grad_out_stride_{b,s,h}, 1
    q_ptr,  # [B, Sq, H, D], strides q_stride_{b,s,h}, 1
    k_ptr,  # [B, Sk, H / GROUP, D], strides k_stride_{b,s,h}, 1
    v_ptr,  # [B, Sk, H / GROUP, DV], strides v_stride_{b,s,h}, 1
    lse_ptr,  # [B, H, Sq] float32, contiguous
    delta_ptr,  # [B, H, Sq] float32, contiguous
    grad_k_ptr,  # [B, Sk, H / GROUP, D], contiguous
    grad_v_ptr,  # [B, Sk, H / GROUP, DV], contiguous
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
    """dV = P^T dO and dK = softmax_scale * dS^T Q, summed over the heads of the group.

    Grid: [B * (H / GROUP) * cdiv(Sk, BLOCK_N)]: key tiles fastest, the first one (causally the
    longest) first.
    """
    key_tiles = tl.cdiv(Sk, BLOCK_N)
    i_n = tl.program_id(0) % key_tiles
    kv_heads = H // GROUP
    i_b = (tl.program_id(0) // key_tiles // kv_heads).to(tl.int64)
    i_kv = (tl.program_id(0) // key_tiles % kv_heads).to(tl.int64)

    keys = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    wide_keys = keys.to(tl.int64)
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    features = tl.arange(0, BLOCK_D)[None, :]
    value_features = tl.arange(0, BLOCK_DV)[None, :]
    k_mask = (keys < Sk)[:, None] & (features < D)
    v_mask = (keys < Sk)[:, None] & (value_features < DV)
    # [BLOCK_N, BLOCK_D]
    p_k = k_ptr + i_b * k_stride_b + i_kv * k_stride_h + wide_keys[:, None] * k_stride_s + features
    b_k = tl.load(p_k, mask=k_mask, other=0.0)
    # [BLOCK_N, BLOCK_DV]
    p_v = v_ptr + i_b * v_stride_b + i_kv * v_stride_h + wide_keys[:, None] * v_stride_s
    b_v = tl.load(p_v + value_features, mask=v_mask, other=0.0)

    if CAUSAL:
        # Key j is seen by the queries i >= j - (Sk - Sq): at `start` the first key of the tile is
        # seen for the first time, from `whole` on all are.
        start = tl.maximum(i_n * BLOCK_N - (Sk - Sq), 0) // BLOCK_M * BLOCK_M
        seen_whole = tl.maximum((i_n + 1) * BLOCK_N - 1 - (Sk - Sq), 0)
        whole = tl.minimum((seen_whole + BLOCK_M - 1) // BLOCK_M * BLOCK_M, Sq)
    else:
        start = 0
        whole = 0
    b_grad_k = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_grad_v = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    for i_group in range(0, GROUP):
        i_h = i_kv * GROUP + i_group
        p_q = q_ptr + i_b * q_stride_b + i_h * q_stride_h + rows[:, None] * q_stride_s + features
        p_grad_out = grad_out_ptr + i_b * grad_out_stride_b + i_h * grad_out_stride_h
        p_grad_out = p_grad_out + rows[:, None] * grad_out_stride_s + value_features
        p_lse = lse_ptr + (i_b * H + i_h) * Sq
        p_delta = delta_ptr + (i_b * H + i_h) * Sq
        if CAUSAL:
            b_grad_k, b_grad_v = _add_key_gradients(
                b_grad_k, b_grad_v, b_k, b_v, p_q, p_grad_out, p_lse, p_delta, keys, start, whole,
                Sq, Sk, q_stride_s, grad_out_stride_s, scale_log2,
                D, DV, True, BLOCK_M, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
        b_grad_k, b_grad_v = _add_key_gradients(
            b_grad_k, b_grad_v, b_k, b_v, p_q, p_grad_out, p_lse, p_delta, keys, whole, Sq,
            Sq, Sk, q_stride_s, grad_out_stride_s, scale_log2,
            D, DV, False, BLOCK_M, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    i_row = (i_b * Sk + wide_keys[:, None]) * kv_heads + i_kv
    b_grad_k = cast(b_grad_k * scale, grad_k_ptr.dtype.element_ty)
    b_grad_v = cast(b_grad_v, grad_v_ptr.dtype.element_ty)
    tl.store(grad_k_ptr + i_row * D + features, b_grad_k, mask=k_mask)
    tl.store(grad_v_ptr + i_row * DV + value_features, b_grad_v, mask=v_mask)
