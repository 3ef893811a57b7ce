"""Rows of unit length and their gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.common.launch import (
    COMPILE_OPTIONS,
    AheadOfTimeCase,
    Constant,
    as_rows,
    cdiv,
    on_own_device,
    why_not_tensors,
)
from warploom.triton_kernels.common.numerics import cast
from warploom.triton_kernels.norm.row_tiles import row_tile, why_not_row_length


@triton.jit(do_not_specialize=["M"])
def _l2_norm_kernel(
    x_ptr,  # [M, N], row stride x_stride
    out_ptr,  # [M, N], contiguous
    rnorm_ptr,  # [M] float32
    M,
    N,
    x_stride,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """rnorm = 1 / sqrt(sum(x^2) + eps); out = x * rnorm.

    Grid: [cdiv(M, BLOCK_M)]; BLOCK_N >= N.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < M) & (columns < N)
    # [BLOCK_M, BLOCK_N]
    b_x = cast(tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0), tl.float32)
    # [BLOCK_M, 1]
    b_rnorm = 1.0 / tl.sqrt(tl.sum(b_x * b_x, axis=1, keep_dims=True) + eps)
    b_out = cast(b_x * b_rnorm, out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows * N + columns, b_out, mask=mask)
    tl.store(rnorm_ptr + rows, b_rnorm, mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def _l2_norm_backward_kernel(
    grad_out_ptr,  # [M, N], row stride grad_out_stride
    x_ptr,  # [M, N], row stride x_stride
    rnorm_ptr,  # [M] float32
    grad_x_ptr,  # [M, N], contiguous
    M,
    N,
    grad_out_stride,
    x_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """n = x * rnorm; grad_x = rnorm * (grad_out - n * sum(grad_out * n)).

    Grid: [cdiv(M, BLOCK_M)]; BLOCK_N >= N.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < M) & (columns < N)
    # [BLOCK_M, BLOCK_N]
    b_x = cast(tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0), tl.float32)
    b_grad_out = tl.load(grad_out_ptr + rows * grad_out_stride + columns, mask=mask, other=0.0)
    b_grad_out = cast(b_grad_out, tl.float32)
    # [BLOCK_M, 1]
    b_rnorm = tl.load(rnorm_ptr + rows, mask=rows < M, other=0.0)
    b_normal = b_x * b_rnorm
    b_dot = tl.sum(b_grad_out * b_normal, axis=1, keep_dims=True)
    b_grad_x = cast(b_rnorm * (b_grad_out - b_normal * b_dot), grad_x_ptr.dtype.element_ty)
    tl.store(grad_x_ptr + rows * N + columns, b_grad_x, mask=mask)


@on_own_device
def l2_norm(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., N] -> (out like x and contiguous, rnorm x.shape[:-1] float32)."""
    rows = as_rows(x)  # [M, N]
    m, n = rows.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rnorm = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if m > 0:
        tile = row_tile(n)
        _l2_norm_kernel[(cdiv(m, tile.rows),)](
            rows,
            out,
            rnorm,
            m,
            n,
            rows.stride(0),
            eps,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            num_warps=tile.num_warps,
            **COMPILE_OPTIONS,
        )
    return out, rnorm


@on_own_device
def l2_norm_backward(grad_out: torch.Tensor, x: torch.Tensor, rnorm: torch.Tensor) -> torch.Tensor:
    """grad_out, x [..., N], rnorm [...] float32 -> grad_x like x and contiguous."""
    rows = as_rows(x)  # [M, N]
    grad_out_rows = as_rows(grad_out)  # [M, N]
    m, n = rows.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if m > 0:
        tile = row_tile(n)
        _l2_norm_backward_kernel[(cdiv(m, tile.rows),)](
            grad_out_rows,
            rows,
            rnorm.contiguous(),
            grad_x,
            m,
            n,
            grad_out_rows.stride(0),
            rows.stride(0),
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            num_warps=tile.num_warps,
            **COMPILE_OPTIONS,
        )
    return grad_x


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the arguments of any op of this module."""
    return why_not_tensors(*args) + why_not_row_length(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    cases = []
    for n in (128, 4096):
        tile = row_tile(n)
        shared: dict[str, Constant | str] = {
            "x_ptr": "*bf16:16",
            "rnorm_ptr": "*fp32:16",
            "M": "i32",
            "N": "i32:16",
            "x_stride": "i32:16",
            "BLOCK_M": Constant(tile.rows),
            "BLOCK_N": Constant(tile.columns),
        }
        forward = shared | {"out_ptr": "*bf16:16", "eps": "fp32"}
        backward = shared | {
            "grad_out_ptr": "*bf16:16",
            "grad_x_ptr": "*bf16:16",
            "grad_out_stride": "i32:16",
        }
        cases += [
            AheadOfTimeCase(f"bf16 N={n}", _l2_norm_kernel, forward, tile.num_warps),
            AheadOfTimeCase(f"bf16 N={n}", _l2_norm_backward_kernel, backward, tile.num_warps),
        ]
    return cases
