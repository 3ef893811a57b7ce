"""Attention to two disjoint sets of keys, joined by their log-sum-exps, and the gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.attention.arguments import Launch, head_strides
from warploom.triton_kernels.attention.scoring import LN_2, LOG2_E
from warploom.triton_kernels.common.launch import (
    AheadOfTimeCase,
    cdiv,
    next_power_of_2,
    on_own_device,
    warp_count,
    why_not_tensors,
    with_unit_last_stride,
)
from warploom.triton_kernels.common.numerics import cast

_TILE_ELEMENTS = 2048


@triton.jit
def _weights(lse1_ptr, lse2_ptr, i_lse, mask):
    """w_n = exp(lse_n - lse) and lse, of rows i_lse; a part without keys has lse -inf or +inf."""
    # [BLOCK_M]
    b_lse1 = tl.load(lse1_ptr + i_lse, mask=mask, other=0.0)
    b_lse2 = tl.load(lse2_ptr + i_lse, mask=mask, other=0.0)
    b_lse1 = tl.where(b_lse1 == float("inf"), float("-inf"), b_lse1)
    b_lse2 = tl.where(b_lse2 == float("inf"), float("-inf"), b_lse2)
    b_max = tl.maximum(b_lse1, b_lse2)
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
    # The difference first: it is exact where the parts weigh alike.
    b_weight1 = tl.exp2((b_lse1 - b_shift) * LOG2_E)
    b_weight2 = tl.exp2((b_lse2 - b_shift) * LOG2_E)
    b_sum = b_weight1 + b_weight2
    b_divisor = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_lse = tl.where(b_sum == 0.0, float("-inf"), b_max + tl.log2(b_divisor) * LN_2)
    return b_weight1 / b_divisor, b_weight2 / b_divisor, b_lse


@triton.jit
def _load_part(p_part, b_weight, mask):
    """The part's rows in float32, 0 where it weighs nothing: there it may hold anything."""
    mask = mask & (b_weight > 0.0)[:, None]
    return cast(tl.load(p_part, mask=mask, other=0.0), tl.float32)


@triton.jit(do_not_specialize=["M", "H", "S"])
def _merge_kernel(
    out1_ptr,  # [B, S, H, D], strides out1_stride_{b,s,h}, 1
    lse1_ptr,  # [B, H, S] float32, contiguous
    out2_ptr,  # [B, S, H, D], strides out2_stride_{b,s,h}, 1
    lse2_ptr,  # [B, H, S] float32, contiguous
    out_ptr,  # [B, S, H, D], contiguous
    lse_ptr,  # [B, H, S] float32, contiguous
    M,  # B * S * H
    H,
    S,
    out1_stride_b,
    out1_stride_s,
    out1_stride_h,
    out2_stride_b,
    out2_stride_s,
    out2_stride_h,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """lse = log(exp(lse1) + exp(lse2)), out = exp(lse1 - lse) out1 + exp(lse2 - lse) out2.

    Grid: [cdiv(B * S * H, BLOCK_M)].
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_h = rows % H
    i_s = rows // H % S
    i_b = rows // H // S
    i_lse = (i_b * H + i_h) * S + i_s
    features = tl.arange(0, BLOCK_D)[None, :]
    mask = (rows < M)[:, None] & (features < D)
    p_out1 = out1_ptr + i_b * out1_stride_b + i_s * out1_stride_s + i_h * out1_stride_h
    p_out2 = out2_ptr + i_b * out2_stride_b + i_s * out2_stride_s + i_h * out2_stride_h
    b_weight1, b_weight2, b_lse = _weights(lse1_ptr, lse2_ptr, i_lse, rows < M)
    # [BLOCK_M, BLOCK_D]
    b_out1 = _load_part(p_out1[:, None] + features, b_weight1, mask)
    b_out2 = _load_part(p_out2[:, None] + features, b_weight2, mask)
    b_out = b_weight1[:, None] * b_out1 + b_weight2[:, None] * b_out2
    p_out = out_ptr + rows[:, None] * D + features
    tl.store(p_out, cast(b_out, out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + i_lse, b_lse, mask=rows < M)


@triton.jit(do_not_specialize=["M", "H", "S"])
def _merge_backward_kernel(
    grad_out_ptr,  # [B, S, H, D], strides grad_out_stride_{b,s,h}, 1
    grad_lse_ptr,  # [B, H, S] float32, contiguous; or None
    out1_ptr,  # [B, S, H, D], strides out1_stride_{b,s,h}, 1
    lse1_ptr,  # [B, H, S] float32, contiguous
    out2_ptr,  # [B, S, H, D], strides out2_stride_{b,s,h}, 1
    lse2_ptr,  # [B, H, S] float32, contiguous
    grad_out1_ptr,  # [B, S, H, D], contiguous
    grad_lse1_ptr,  # [B, H, S] float32, contiguous
    grad_out2_ptr,  # [B, S, H, D], contiguous
    grad_lse2_ptr,  # [B, H, S] float32, contiguous
    M,  # B * S * H
    H,
    S,
    grad_out_stride_b,
    grad_out_stride_s,
    grad_out_stride_h,
    out1_stride_b,
    out1_stride_s,
    out1_stride_h,
    out2_stride_b,
    out2_stride_s,
    out2_stride_h,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_out_n = w_n grad_out, grad_lse_n = w_n (grad_out . (out_n - out) + grad_lse),
    w_n = exp(lse_n - lse). out1 - out is w_2 (out1 - out2): the rounding of out does not come in.

    Grid: [cdiv(B * S * H, BLOCK_M)].
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_h = rows % H
    i_s = rows // H % S
    i_b = rows // H // S
    i_lse = (i_b * H + i_h) * S + i_s
    features = tl.arange(0, BLOCK_D)[None, :]
    mask = (rows < M)[:, None] & (features < D)
    p_grad_out = grad_out_ptr + i_b * grad_out_stride_b + i_s * grad_out_stride_s
    p_grad_out = (p_grad_out + i_h * grad_out_stride_h)[:, None] + features
    p_out1 = out1_ptr + i_b * out1_stride_b + i_s * out1_stride_s + i_h * out1_stride_h
    p_out2 = out2_ptr + i_b * out2_stride_b + i_s * out2_stride_s + i_h * out2_stride_h
    b_weight1, b_weight2, _ = _weights(lse1_ptr, lse2_ptr, i_lse, rows < M)
    # [BLOCK_M, BLOCK_D]
    b_grad_out = cast(tl.load(p_grad_out, mask=mask, other=0.0), tl.float32)
    b_out1 = _load_part(p_out1[:, None] + features, b_weight1, mask)
    b_out2 = _load_part(p_out2[:, None] + features, b_weight2, mask)
    # [BLOCK_M]
    b_difference = tl.sum(b_grad_out * (b_out1 - b_out2), axis=1)
    b_change1 = b_weight2 * b_difference
    b_change2 = -b_weight1 * b_difference
    if grad_lse_ptr is not None:
        b_grad_lse = tl.load(grad_lse_ptr + i_lse, mask=rows < M, other=0.0)
        b_change1 += b_grad_lse
        b_change2 += b_grad_lse
    p_row = rows[:, None] * D + features
    b_grad_out1 = cast(b_weight1[:, None] * b_grad_out, grad_out1_ptr.dtype.element_ty)
    b_grad_out2 = cast(b_weight2[:, None] * b_grad_out, grad_out2_ptr.dtype.element_ty)
    tl.store(grad_out1_ptr + p_row, b_grad_out1, mask=mask)
    tl.store(grad_out2_ptr + p_row, b_grad_out2, mask=mask)
    tl.store(grad_lse1_ptr + i_lse, b_weight1 * b_change1, mask=rows < M)
    tl.store(grad_lse2_ptr + i_lse, b_weight2 * b_change2, mask=rows < M)


def _launch(kernel: object, pointers: dict[str, torch.Tensor | None], strided: list[str]) -> Launch:
    """`pointers` by argument; those named in `strided` are handed over with their strides."""
    out1 = pointers["out1_ptr"]
    assert out1 is not None
    b, s, h, d = out1.shape
    arguments = {**pointers, "M": b * s * h, "H": h, "S": s}
    for name in strided:
        arguments |= head_strides(name, arguments[f"{name}_ptr"], packed=False)
    width = next_power_of_2(d)
    block_rows = max(1, min(32, _TILE_ELEMENTS // width))
    constants = {"D": d, "BLOCK_M": block_rows, "BLOCK_D": width}
    grid = (cdiv(b * s * h, block_rows),)
    return Launch(kernel, grid, arguments, constants, warp_count(block_rows * width))


def _empty(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


@on_own_device
def merge_attention(
    out1: torch.Tensor, lse1: torch.Tensor, out2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of the op `merge_attention`, whose reference says what the arguments are."""
    out, lse = _empty(out1), _empty(lse1)
    pointers = {
        "out1_ptr": with_unit_last_stride(out1),
        "lse1_ptr": lse1.contiguous(),
        "out2_ptr": with_unit_last_stride(out2),
        "lse2_ptr": lse2.contiguous(),
        "out_ptr": out,
        "lse_ptr": lse,
    }
    if out.numel() > 0:
        _launch(_merge_kernel, pointers, ["out1", "out2"]).run()
    return out, lse


@on_own_device
def merge_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    out1: torch.Tensor,
    lse1: torch.Tensor,
    out2: torch.Tensor,
    lse2: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of out1, lse1, out2 and lse2, as the op `merge_attention_backward` has them."""
    grads = (_empty(out1), _empty(lse1), _empty(out2), _empty(lse2))
    pointers = {
        "grad_out_ptr": with_unit_last_stride(grad_out),
        "grad_lse_ptr": None if grad_lse is None else grad_lse.contiguous(),
        "out1_ptr": with_unit_last_stride(out1),
        "lse1_ptr": lse1.contiguous(),
        "out2_ptr": with_unit_last_stride(out2),
        "lse2_ptr": lse2.contiguous(),
        "grad_out1_ptr": grads[0],
        "grad_lse1_ptr": grads[1],
        "grad_out2_ptr": grads[2],
        "grad_lse2_ptr": grads[3],
    }
    if out1.numel() > 0:
        _launch(_merge_backward_kernel, pointers, ["grad_out", "out1", "out2"]).run()
    return grads


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the arguments of `merge_attention` or its backward."""
    return why_not_tensors(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    out = torch.empty((2, 1024, 8, 128), dtype=torch.bfloat16, device="meta")
    lse = torch.empty((2, 8, 1024), dtype=torch.float32, device="meta")
    parts = {"out1_ptr": out, "lse1_ptr": lse, "out2_ptr": out, "lse2_ptr": lse}
    merge = {**parts, "out_ptr": out, "lse_ptr": lse}
    backward = {**parts, "grad_out_ptr": out, "grad_lse_ptr": lse}
    backward |= {"grad_out1_ptr": out, "grad_out2_ptr": out}
    backward |= {"grad_lse1_ptr": lse, "grad_lse2_ptr": lse}
    strided = ["grad_out", "out1", "out2"]
    return [
        _launch(_merge_kernel, merge, ["out1", "out2"]).ahead_of_time("bf16"),
        _launch(_merge_backward_kernel, backward, strided).ahead_of_time("bf16"),
    ]
