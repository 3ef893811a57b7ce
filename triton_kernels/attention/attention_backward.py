"""Attention backward (FlashAttention-2, Dao 2023, algorithm 2), deterministic.

Two kernels recompute P = exp(softmax_scale * q k^T - lse) tile by tile: one owns a tile of keys and
sums over the queries of every head in the group, the other owns a tile of queries and sums over the
keys. Each sum has a fixed order and nothing is added across programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.attention.key_gradients import key_gradients_kernel
from warploom.triton_kernels.attention.query_gradients import query_gradients_kernel
from warploom.triton_kernels.attention.tiles import (
    LOG2_E,
    AttentionTile,
    key_gradients_tile,
    padded_head_dim,
    query_gradients_tile,
    why_not_attention,
)
from warploom.triton_kernels.common.launch import (
    COMPILE_OPTIONS,
    AheadOfTimeCase,
    Constant,
    cdiv,
    next_power_of_2,
    on_own_device,
    with_unit_last_stride,
)
from warploom.triton_kernels.common.numerics import cast

_DELTA_ROWS = 16
_DELTA_WARPS = 4


@triton.jit(do_not_specialize=["M", "H", "Sq"])
def _delta_kernel(
    grad_out_ptr,  # [B, Sq, H, DV], strides grad_out_stride_{b,s,h}, 1
    out_ptr,  # [B, Sq, H, DV], strides out_stride_{b,s,h}, 1
    grad_lse_ptr,  # [B, H, Sq], contiguous, or None
    delta_ptr,  # [B, H, Sq] float32, contiguous
    M,  # B * H * Sq
    H,
    Sq,
    grad_out_stride_b,
    grad_out_stride_s,
    grad_out_stride_h,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """delta = sum(grad_out * out) - grad_lse, so that dS = P * (dP - delta).

    Grid: [cdiv(B * H * Sq, BLOCK_M)].
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_s = rows % Sq
    i_h = rows // Sq % H
    i_b = rows // Sq // H
    features = tl.arange(0, BLOCK_DV)[None, :]
    mask = (rows < M)[:, None] & (features < DV)
    p_grad_out = i_b * grad_out_stride_b + i_s * grad_out_stride_s + i_h * grad_out_stride_h
    p_out = i_b * out_stride_b + i_s * out_stride_s + i_h * out_stride_h
    # [BLOCK_M, BLOCK_DV]
    b_grad_out = tl.load(grad_out_ptr + p_grad_out[:, None] + features, mask=mask, other=0.0)
    b_out = tl.load(out_ptr + p_out[:, None] + features, mask=mask, other=0.0)
    b_delta = tl.sum(cast(b_grad_out, tl.float32) * cast(b_out, tl.float32), axis=1)
    if grad_lse_ptr is not None:
        # [BLOCK_M]
        b_grad_lse = tl.load(grad_lse_ptr + rows, mask=rows < M, other=0.0)
        b_delta -= cast(b_grad_lse, tl.float32)
    tl.store(delta_ptr + rows, b_delta, mask=rows < M)


def _delta(
    grad_out: torch.Tensor, out: torch.Tensor, grad_lse: torch.Tensor | None
) -> torch.Tensor:
    """sum(grad_out * out) - grad_lse as [B, H, Sq] float32."""
    b, sq, h, dv = out.shape
    delta = torch.empty((b, h, sq), dtype=torch.float32, device=out.device)
    _delta_kernel[(cdiv(delta.numel(), _DELTA_ROWS),)](
        grad_out,
        out,
        None if grad_lse is None else grad_lse.contiguous(),
        delta,
        delta.numel(),
        h,
        sq,
        *grad_out.stride()[:3],
        *out.stride()[:3],
        DV=dv,
        BLOCK_M=_DELTA_ROWS,
        BLOCK_DV=next_power_of_2(dv),
        num_warps=_DELTA_WARPS,
        **COMPILE_OPTIONS,
    )
    return delta


def _constants(
    tile: AttentionTile, group: int, d: int, dv: int, causal: bool
) -> dict[str, int | bool]:
    return {
        "GROUP": group,
        "D": d,
        "DV": dv,
        "CAUSAL": causal,
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "BLOCK_D": padded_head_dim(d),
        "BLOCK_DV": padded_head_dim(dv),
    }


@on_own_device
def attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor | None,
    causal: bool,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_out, out [B, Sq, H, Dv], q [B, Sq, H, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv],
    lse, grad_lse [B, H, Sq] -> (grad_q, grad_k, grad_v) like q, k, v and contiguous."""
    grad_out, q, k, v, out = (with_unit_last_stride(tensor) for tensor in (grad_out, q, k, v, out))
    b, sq, h, d = q.shape
    _, sk, kv_heads, dv = v.shape
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if min(b, sq, sk, h) == 0:
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
    lse = lse.contiguous()
    delta = _delta(grad_out, out, grad_lse)
    inputs = (grad_out, q, k, v, lse, delta)
    sizes = (
        h,
        sq,
        sk,
        *grad_out.stride()[:3],
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        softmax_scale,
        softmax_scale * LOG2_E,
    )

    def options(tile: AttentionTile) -> dict[str, int | bool]:
        return {
            **_constants(tile, h // kv_heads, d, dv, causal),
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            **COMPILE_OPTIONS,
        }

    tile = key_gradients_tile(q.dtype, d, dv)
    grid = (b * kv_heads * cdiv(sk, tile.keys),)
    key_gradients_kernel[grid](*inputs, grad_k, grad_v, *sizes, **options(tile))
    tile = query_gradients_tile(q.dtype, d, dv)
    grid = (b * h * cdiv(sq, tile.queries),)
    query_gradients_kernel[grid](*inputs, grad_q, *sizes, **options(tile))
    return grad_q, grad_k, grad_v


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the arguments of `attention_backward`."""
    return why_not_attention(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    cases = []
    for dtype, d, dv, causal in (
        (torch.bfloat16, 64, 64, True),
        (torch.bfloat16, 128, 128, True),
        (torch.float16, 192, 128, False),
        (torch.bfloat16, 256, 256, True),
        (torch.float32, 128, 128, True),
        (torch.float32, 256, 256, False),
    ):
        short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        pointer = f"*{short}:16"
        shared: dict[str, Constant | str] = {
            **{f"{name}_ptr": pointer for name in ("grad_out", "q", "k", "v")},
            **{
                "lse_ptr": "*fp32:16",
                "delta_ptr": "*fp32:16",
                "scale": "fp32",
                "scale_log2": "fp32",
            },
            **{"H": "i32", "Sq": "i32", "Sk": "i32"},
            **{f"{x}_stride_{of}": "i32:16" for x in ("grad_out", "q", "k", "v") for of in "bsh"},
        }
        keys = shared | {"grad_k_ptr": pointer, "grad_v_ptr": pointer}
        queries = shared | {"grad_q_ptr": pointer}
        name = f"{short} D={d} Dv={dv} {'causal' if causal else 'full'}"
        for kernel, arguments, tile in (
            (key_gradients_kernel, keys, key_gradients_tile(dtype, d, dv)),
            (query_gradients_kernel, queries, query_gradients_tile(dtype, d, dv)),
        ):
            constants = _constants(tile, 4, d, dv, causal)
            arguments = arguments | {key: Constant(value) for key, value in constants.items()}
            cases.append(AheadOfTimeCase(name, kernel, arguments, tile.num_warps, tile.num_stages))
    delta: dict[str, Constant | str] = {
        "grad_out_ptr": "*bf16:16",
        "out_ptr": "*bf16:16",
        "grad_lse_ptr": "*fp32:16",
        "delta_ptr": "*fp32:16",
        **{"M": "i32", "H": "i32", "Sq": "i32"},
        **{f"{name}_stride_{of}": "i32:16" for name in ("grad_out", "out") for of in "bsh"},
        "DV": Constant(128),
        "BLOCK_M": Constant(_DELTA_ROWS),
        "BLOCK_DV": Constant(128),
    }
    cases.append(AheadOfTimeCase("bf16 Dv=128", _delta_kernel, delta, _DELTA_WARPS))
    return cases
