"""Attention forward in one pass over the keys (FlashAttention-2, Dao 2023, algorithm 1)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.attention.tiles import (
    LOG2_E,
    forward_tile,
    padded_head_dim,
    why_not_attention,
)
from warploom.triton_kernels.common.launch import (
    COMPILE_OPTIONS,
    AheadOfTimeCase,
    Constant,
    cdiv,
    on_own_device,
    with_unit_last_stride,
)
from warploom.triton_kernels.common.numerics import cast, dot

_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    b_q,  # [BLOCK_M, BLOCK_D]
    p_k,  # [BLOCK_D, BLOCK_N] pointers to the tile of key 0
    p_v,  # [BLOCK_N, BLOCK_DV] pointers to the tile of key 0
    b_max,  # [BLOCK_M], of the scores times log2(e), so far
    b_sum,  # [BLOCK_M]
    b_out,  # [BLOCK_M, BLOCK_DV]
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
    """Takes the keys [start, end) into the running maximum, sum and weighted values.

    Without MASKED every key of every tile is there and is seen by every query.
    """
    features = tl.arange(0, BLOCK_D)[:, None]
    value_features = tl.arange(0, BLOCK_DV)[None, :]
    for first in range(start, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        # [BLOCK_D, BLOCK_N]
        k_offset = tl.cast(first, tl.int64) * k_stride_s
        b_k = tl.load(p_k + k_offset, mask=(features < D) & (keys < Sk)[None, :], other=0.0)
        # [BLOCK_M, BLOCK_N]
        b_score = dot(b_q, b_k) * scale_log2
        if MASKED:
            # Keys beyond Sk are within reach only of queries beyond Sq, which nobody stores.
            seen = keys[None, :] <= last_seen[:, None]
            b_score = tl.where(seen, b_score, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_score, axis=1))
        b_shift = b_new_max
        if MASKED:
            # A query that has seen no key yet: exp2(-inf - 0) is 0, exp2(-inf - -inf) would be NaN.
            b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_score - b_shift[:, None])
        b_rescale = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_rescale + tl.sum(b_p, axis=1)
        # [BLOCK_N, BLOCK_DV]
        v_offset = tl.cast(first, tl.int64) * v_stride_s
        b_v = tl.load(p_v + v_offset, mask=(keys < Sk)[:, None] & (value_features < DV), other=0.0)
        b_out = dot(cast(b_p, b_v.dtype), b_v, b_out * b_rescale[:, None])
        b_max = b_new_max
    return b_max, b_sum, b_out


@triton.jit(do_not_specialize=["H", "Sq", "Sk"])
def _attention_kernel(
    q_ptr,  # [B, Sq, H, D], strides q_stride_{b,s,h}, 1
    k_ptr,  # [B, Sk, H / GROUP, D], strides k_stride_{b,s,h}, 1
    v_ptr,  # [B, Sk, H / GROUP, DV], strides v_stride_{b,s,h}, 1
    out_ptr,  # [B, Sq, H, DV], contiguous
    lse_ptr,  # [B, H, Sq] float32, contiguous
    H,
    Sq,
    Sk,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
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
    """out = softmax(softmax_scale * q k^T) v and lse = log(sum(exp(softmax_scale * q k^T))).

    Grid: [B * H * cdiv(Sq, BLOCK_M)]: query tiles fastest, the last one (causally the longest)
    first, so that programs that run together read the same keys.
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
    features = tl.arange(0, BLOCK_D)
    value_features = tl.arange(0, BLOCK_DV)
    row_mask = rows < Sq
    # [BLOCK_M, BLOCK_D]
    p_q = q_ptr + i_b * q_stride_b + i_h * q_stride_h
    p_q = p_q + wide_rows[:, None] * q_stride_s + features[None, :]
    b_q = tl.load(p_q, mask=row_mask[:, None] & (features < D)[None, :], other=0.0)
    # [BLOCK_D, BLOCK_N]
    p_k = k_ptr + i_b * k_stride_b + i_kv * k_stride_h
    p_k = p_k + keys[None, :] * k_stride_s + features[:, None]
    # [BLOCK_N, BLOCK_DV]
    p_v = v_ptr + i_b * v_stride_b + i_kv * v_stride_h
    p_v = p_v + keys[:, None] * v_stride_s + value_features[None, :]

    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
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
    b_max, b_sum, b_out = _attend(
        b_q, p_k, p_v, b_max, b_sum, b_out, last_seen, 0, whole, Sk, k_stride_s, v_stride_s,
        scale_log2, D, DV, False, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    b_max, b_sum, b_out = _attend(
        b_q, p_k, p_v, b_max, b_sum, b_out, last_seen, whole, end, Sk, k_stride_s, v_stride_s,
        scale_log2, D, DV, True, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip

    # A query without keys has the sum 0: its out is 0 and its lse is -inf.
    b_divisor = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_lse = tl.where(b_sum == 0.0, float("-inf"), (b_max + tl.log2(b_divisor)) * _LN_2)
    b_out = cast(b_out / b_divisor[:, None], out_ptr.dtype.element_ty)
    p_out = out_ptr + ((i_b * Sq + wide_rows[:, None]) * H + i_h) * DV + value_features[None, :]
    tl.store(p_out, b_out, mask=row_mask[:, None] & (value_features < DV)[None, :])
    tl.store(lse_ptr + i_bh.to(tl.int64) * Sq + wide_rows, b_lse, mask=row_mask)


@on_own_device
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, Sq, H, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv] -> (out [B, Sq, H, Dv] like q and
    contiguous, lse [B, H, Sq] float32)."""
    q, k, v = (with_unit_last_stride(tensor) for tensor in (q, k, v))
    b, sq, h, d = q.shape
    _, sk, kv_heads, dv = v.shape
    out = torch.empty((b, sq, h, dv), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h, sq), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    tile = forward_tile(q.dtype, d, dv)
    _attention_kernel[(b * h * cdiv(sq, tile.queries),)](
        q,
        k,
        v,
        out,
        lse,
        h,
        sq,
        sk,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        softmax_scale * LOG2_E,
        GROUP=h // kv_heads,
        D=d,
        DV=dv,
        CAUSAL=causal,
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        BLOCK_D=padded_head_dim(d),
        BLOCK_DV=padded_head_dim(dv),
        num_warps=tile.num_warps,
        **COMPILE_OPTIONS,
        num_stages=tile.num_stages,
    )
    return out, lse


def why_not(*args: object) -> list[str]:
    """What this kernel cannot do with the arguments of `attention`."""
    return why_not_attention(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    cases = []
    for dtype, d, dv, causal in (
        (torch.bfloat16, 64, 64, True),
        (torch.bfloat16, 128, 128, True),
        (torch.bfloat16, 128, 128, False),
        (torch.float16, 192, 128, True),
        (torch.bfloat16, 256, 256, True),
        (torch.float32, 64, 64, True),
        (torch.float32, 128, 128, True),
        (torch.float32, 256, 256, False),
    ):
        tile = forward_tile(dtype, d, dv)
        short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        arguments: dict[str, Constant | str] = {
            f"{name}_ptr": f"*{short}:16" for name in ("q", "k", "v", "out")
        }
        arguments |= {"lse_ptr": "*fp32:16", "H": "i32", "Sq": "i32", "Sk": "i32"}
        arguments |= {f"{name}_stride_{of}": "i32:16" for name in ("q", "k", "v") for of in "bsh"}
        arguments |= {
            "scale_log2": "fp32",
            "GROUP": Constant(4),
            "D": Constant(d),
            "DV": Constant(dv),
            "CAUSAL": Constant(causal),
            "BLOCK_M": Constant(tile.queries),
            "BLOCK_N": Constant(tile.keys),
            "BLOCK_D": Constant(padded_head_dim(d)),
            "BLOCK_DV": Constant(padded_head_dim(dv)),
        }
        name = f"{short} D={d} Dv={dv} {'causal' if causal else 'full'}"
        cases.append(
            AheadOfTimeCase(name, _attention_kernel, arguments, tile.num_warps, tile.num_stages)
        )
    return cases
