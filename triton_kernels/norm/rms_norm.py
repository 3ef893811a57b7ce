"""RMSNorm (Zhang and Sennrich 2019, equation 4), with or without a residual, and its gradient."""

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
    persistent_programs,
    why_not_tensors,
)
from warploom.triton_kernels.common.numerics import cast, mean
from warploom.triton_kernels.common.reduce import sum_partials
from warploom.triton_kernels.norm.row_tiles import (
    PROGRAMS_PER_MULTIPROCESSOR,
    RowTile,
    row_tile,
    why_not_row_length,
)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_kernel(
    x_ptr,  # [M, N], row stride x_stride
    residual_ptr,  # [M, N], row stride residual_stride, or None
    weight_ptr,  # [N]
    out_ptr,  # [M, N], contiguous
    sum_ptr,  # [M, N], contiguous, or None without a residual
    rstd_ptr,  # [M] float32
    M,
    N,
    x_stride,
    residual_stride,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = x + residual, rounded to x's dtype (y = x without a residual);
    rstd = 1 / sqrt(mean(y^2) + eps); out = y * rstd * weight.

    Grid: [cdiv(M, BLOCK_M)]; BLOCK_N >= N.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < M) & (columns < N)
    # [BLOCK_M, BLOCK_N]
    b_x = cast(tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0), tl.float32)
    if residual_ptr is not None:
        # [BLOCK_M, BLOCK_N]
        b_residual = tl.load(residual_ptr + rows * residual_stride + columns, mask=mask, other=0.0)
        b_sum = cast(b_x + cast(b_residual, tl.float32), sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + rows * N + columns, b_sum, mask=mask)
        b_x = cast(b_sum, tl.float32)
    # [1, BLOCK_N]
    b_weight = cast(tl.load(weight_ptr + columns, mask=columns < N, other=0.0), tl.float32)
    # [BLOCK_M, 1]
    b_rstd = tl.rsqrt(mean(tl.sum(b_x * b_x, axis=1, keep_dims=True), N) + eps)
    b_out = b_x * b_rstd * b_weight
    tl.store(out_ptr + rows * N + columns, cast(b_out, out_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + rows, b_rstd, mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_backward_kernel(
    grad_out_ptr,  # [M, N], row stride grad_out_stride
    x_ptr,  # [M, N], row stride x_stride
    weight_ptr,  # [N]
    rstd_ptr,  # [M] float32
    grad_sum_ptr,  # [M, N], row stride grad_sum_stride, or None
    grad_x_ptr,  # [M, N], contiguous
    partials_ptr,  # [P, N] float32, contiguous
    M,
    N,
    grad_out_stride,
    x_stride,
    grad_sum_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """n = x * rstd; g = grad_out * weight; grad_x = rstd * (g - n * mean(g * n)) + grad_sum;
    partials[p] = sum over the program's rows of grad_out * n.

    Grid: [P]; program p takes the row tiles p, p + P, ...; BLOCK_N >= N.
    """
    i_p = tl.program_id(0)
    columns = tl.arange(0, BLOCK_N)[None, :]
    # [1, BLOCK_N]
    b_weight = cast(tl.load(weight_ptr + columns, mask=columns < N, other=0.0), tl.float32)
    b_grad_weight = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for tile in range(i_p, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        mask = (rows < M) & (columns < N)
        # [BLOCK_M, BLOCK_N]
        b_x = cast(tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0), tl.float32)
        b_grad_out = tl.load(grad_out_ptr + rows * grad_out_stride + columns, mask=mask, other=0.0)
        b_grad_out = cast(b_grad_out, tl.float32)
        # [BLOCK_M, 1]
        b_rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        b_normal = b_x * b_rstd
        b_g = b_grad_out * b_weight
        b_mean = mean(tl.sum(b_g * b_normal, axis=1, keep_dims=True), N)
        b_grad_x = b_rstd * (b_g - b_normal * b_mean)
        if grad_sum_ptr is not None:
            # [BLOCK_M, BLOCK_N]
            p_grad_sum = grad_sum_ptr + rows * grad_sum_stride + columns
            b_grad_x += cast(tl.load(p_grad_sum, mask=mask, other=0.0), tl.float32)
        p_grad_x = grad_x_ptr + rows * N + columns
        tl.store(p_grad_x, cast(b_grad_x, grad_x_ptr.dtype.element_ty), mask=mask)
        b_grad_weight += b_grad_out * b_normal
    # [1, BLOCK_N]
    b_partial = tl.sum(b_grad_weight, axis=0, keep_dims=True)
    p_partial = partials_ptr + i_p.to(tl.int64) * N + columns
    tl.store(p_partial, b_partial, mask=columns < N)


def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    rows = as_rows(x)  # [M, N]
    residual_rows = None if residual is None else as_rows(residual)  # [M, N]
    m, n = rows.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(out)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if m > 0:
        tile = row_tile(n)
        _rms_norm_kernel[(cdiv(m, tile.rows),)](
            rows,
            residual_rows,
            weight.contiguous(),
            out,
            total,
            rstd,
            m,
            n,
            rows.stride(0),
            0 if residual_rows is None else residual_rows.stride(0),
            eps,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            num_warps=tile.num_warps,
            **COMPILE_OPTIONS,
        )
    return out, total, rstd


@on_own_device
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., N], weight [N] -> (out like x and contiguous, rstd x.shape[:-1] float32)."""
    out, _, rstd = _forward(x, None, weight, eps)
    return out, rstd


@on_own_device
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, residual [..., N], weight [N] -> (out, sum like x and contiguous, rstd float32)."""
    out, total, rstd = _forward(x, residual, weight, eps)
    assert total is not None
    return out, total, rstd


@on_own_device
def rms_norm_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    grad_sum: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad_out, x, grad_sum [..., N], weight [N], rstd [...] float32 -> (grad_x like x and
    contiguous, grad_weight like weight). x is what was normalised: the sum in the fused form.

    Deterministic: partial sums of grad_weight per program, added in a fixed order in float32.
    """
    rows = as_rows(x)  # [M, N]
    grad_out_rows = as_rows(grad_out)  # [M, N]
    grad_sum_rows = None if grad_sum is None else as_rows(grad_sum)  # [M, N]
    m, n = rows.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if m == 0:
        return grad_x, torch.zeros_like(weight, memory_format=torch.contiguous_format)
    tile = row_tile(n)
    programs = persistent_programs(x.device, cdiv(m, tile.rows), PROGRAMS_PER_MULTIPROCESSOR)
    partials = torch.empty((programs, n), dtype=torch.float32, device=x.device)
    _rms_norm_backward_kernel[(programs,)](
        grad_out_rows,
        rows,
        weight.contiguous(),
        rstd.contiguous(),
        grad_sum_rows,
        grad_x,
        partials,
        m,
        n,
        grad_out_rows.stride(0),
        rows.stride(0),
        0 if grad_sum_rows is None else grad_sum_rows.stride(0),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        num_warps=tile.num_warps,
        **COMPILE_OPTIONS,
    )
    return grad_x, sum_partials(partials, weight.dtype)


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the arguments of any op of this module."""
    return why_not_tensors(*args) + why_not_row_length(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    cases = []
    for n in (128, 4096, 16384):
        tile: RowTile = row_tile(n)
        shared: dict[str, Constant | str] = {
            "x_ptr": "*bf16:16",
            "weight_ptr": "*bf16:16",
            "rstd_ptr": "*fp32:16",
            "M": "i32",
            "N": "i32:16",
            "x_stride": "i32:16",
            "BLOCK_M": Constant(tile.rows),
            "BLOCK_N": Constant(tile.columns),
        }
        forward = shared | {"out_ptr": "*bf16:16", "eps": "fp32"}
        plain = forward | {
            "residual_ptr": Constant(None),
            "sum_ptr": Constant(None),
            "residual_stride": "i32:16",
        }
        added = forward | {
            "residual_ptr": "*bf16:16",
            "sum_ptr": "*bf16:16",
            "residual_stride": "i32:16",
        }
        backward = shared | {
            "grad_out_ptr": "*bf16:16",
            "grad_sum_ptr": "*bf16:16",
            "grad_x_ptr": "*bf16:16",
            "partials_ptr": "*fp32:16",
            "grad_out_stride": "i32:16",
            "grad_sum_stride": "i32:16",
        }
        cases += [
            AheadOfTimeCase(f"bf16 N={n}", _rms_norm_kernel, plain, tile.num_warps),
            AheadOfTimeCase(f"bf16 N={n} residual", _rms_norm_kernel, added, tile.num_warps),
            AheadOfTimeCase(f"bf16 N={n}", _rms_norm_backward_kernel, backward, tile.num_warps),
        ]
    return cases
