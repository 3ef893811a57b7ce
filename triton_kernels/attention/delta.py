"""delta, what the softmax's gradient subtracts: of attention's backward and of those like it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.attention.arguments import Launch, head_strides
from warploom.triton_kernels.common.launch import AheadOfTimeCase, cdiv, next_power_of_2
from warploom.triton_kernels.common.numerics import cast

_ROWS = 16
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["M", "H", "Sq"])
def _delta_kernel(
    grad_out_ptr,  # [B, Sq, H, DV], strides grad_out_stride_{b,s,h}, 1; packed: B is 1, Sq is Tq
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


def delta_launch(
    delta: torch.Tensor,
    grad_out: torch.Tensor,
    out: torch.Tensor,
    grad_lse: torch.Tensor | None,
) -> Launch:
    """The launch that writes delta; grad_out and out [B, Sq, H, DV], or packed [Tq, H, DV]."""
    *batch, rows, heads, dv = out.shape
    arguments = {
        **{"grad_out_ptr": grad_out, "out_ptr": out, "delta_ptr": delta},
        "grad_lse_ptr": None if grad_lse is None else grad_lse.contiguous(),
        **{"M": delta.numel(), "H": heads, "Sq": rows},
        **head_strides("grad_out", grad_out, packed=not batch),
        **head_strides("out", out, packed=not batch),
    }
    constants = {"DV": dv, "BLOCK_M": _ROWS, "BLOCK_DV": next_power_of_2(dv)}
    grid = (cdiv(delta.numel(), _ROWS),)
    return Launch(_delta_kernel, grid, arguments, constants, _NUM_WARPS)


def aot_cases() -> list[AheadOfTimeCase]:
    out = torch.empty((2, 1024, 8, 256), dtype=torch.bfloat16, device="meta")
    lse = torch.empty((2, 8, 1024), dtype=torch.float32, device="meta")
    return [delta_launch(lse, out, out, lse).ahead_of_time("bf16 Dv=256")]
