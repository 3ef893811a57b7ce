"""LayerNorm (Ba, Kiros and Hinton 2016, equation 4, over the last dimension) and its gradient."""

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
    row_tile,
    why_not_row_length,
)


@triton.jit(do_not_specialize=["M"])
def _layer_norm_kernel(
    x_ptr,  # [M, N], row stride x_stride
    weight_ptr,  # [N]
    bias_ptr,  # [N]
    out_ptr,  # [M, N], contiguous
    mean_ptr,  # [M] float32
    rstd_ptr,  # [M] float32
    M,
    N,
    x_stride,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """rstd = 1 / sqrt(mean((x - mean)^2) + eps); out = (x - mean) * rstd * weight + bias.

    Grid: [cdiv(M, BLOCK_M)]; BLOCK_N >= N.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < M) & (columns < N)
    # [BLOCK_M, BLOCK_N]
    b_x = cast(tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0), tl.float32)
    # [1, BLOCK_N]
    b_weight = cast(tl.load(weight_ptr + columns, mask=columns < N, other=0.0), tl.float32)
    b_bias = cast(tl.load(bias_ptr + columns, mask=columns < N, other=0.0), tl.float32)
    # [BLOCK_M, 1]
    b_mean = mean(tl.sum(b_x, axis=1, keep_dims=True), N)
    # The columns beyond N would count with (0 - mean)^2.
    b_centred = tl.where(mask, b_x - b_mean, 0.0)
    # A mean far from 0 is off by the rounding of its sum: what is left in the deviations.
    b_rest = mean(tl.sum(b_centred, axis=1, keep_dims=True), N)
    b_centred = tl.where(mask, b_centred - b_rest, 0.0)
    b_mean += b_rest
    b_rstd = tl.rsqrt(mean(tl.sum(b_centred * b_centred, axis=1, keep_dims=True), N) + eps)
    b_out = b_centred * b_rstd * b_weight + b_bias
    tl.store(out_ptr + rows * N + columns, cast(b_out, out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, b_mean, mask=rows < M)
    tl.store(rstd_ptr + rows, b_rstd, mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def _layer_norm_backward_kernel(
    grad_out_ptr,  # [M, N], row stride grad_out_stride
    x_ptr,  # [M, N], row stride x_stride
    weight_ptr,  # [N]
    mean_ptr,  # [M] float32
    rstd_ptr,  # [M] float32
    grad_x_ptr,  # [M, N], contiguous
    partials_ptr,  # [2, P, N] float32, contiguous: of grad_weight, of grad_bias
    M,
    N,
    grad_out_stride,
    x_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """n = (x - mean) * rstd; g = grad_out * weight;
    grad_x = rstd * (g - mean(g) - n * mean(g * n));
    partials[0, p], partials[1, p] = sum over the program's rows of grad_out * n, of grad_out.

    Grid: [P]; program p takes the row tiles p, p + P, ...; BLOCK_N >= N.
    """
    i_p = tl.program_id(0)
    columns = tl.arange(0, BLOCK_N)[None, :]
    # [1, BLOCK_N]
    b_weight = cast(tl.load(weight_ptr + columns, mask=columns < N, other=0.0), tl.float32)
    b_grad_weight = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    b_grad_bias = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for tile in range(i_p, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        mask = (rows < M) & (columns < N)
        # [BLOCK_M, BLOCK_N]
        b_x = cast(tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0), tl.float32)
        b_grad_out = tl.load(grad_out_ptr + rows * grad_out_stride + columns, mask=mask, other=0.0)
        b_grad_out = cast(b_grad_out, tl.float32)
        # [BLOCK_M, 1]
        b_mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
        b_rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        # Columns beyond N have a nonzero b_normal, but their b_grad_out and b_g are 0.
        b_normal = (b_x - b_mean) * b_rstd
        b_g = b_grad_out * b_weight
        b_mean_g = mean(tl.sum(b_g, axis=1, keep_dims=True), N)
        b_mean_g_normal = mean(tl.sum(b_g * b_normal, axis=1, keep_dims=True), N)
        b_grad_x = b_rstd * (b_g - b_mean_g - b_normal * b_mean_g_normal)
        p_grad_x = grad_x_ptr + rows * N + columns
        tl.store(p_grad_x, cast(b_grad_x, grad_x_ptr.dtype.element_ty), mask=mask)
        b_grad_weight += b_grad_out * b_normal
        b_grad_bias += b_grad_out
    # [1, BLOCK_N]
    p_partials = partials_ptr + i_p.to(tl.int64) * N + columns
    p_bias_partials = p_partials + tl.num_programs(0).to(tl.int64) * N
    tl.store(p_partials, tl.sum(b_grad_weight, axis=0, keep_dims=True), mask=columns < N)
    tl.store(p_bias_partials, tl.sum(b_grad_bias, axis=0, keep_dims=True), mask=columns < N)


@on_own_device
def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., N], weight, bias [N] -> (out like x and contiguous, mean, rstd [...] float32)."""
    rows = as_rows(x)  # [M, N]
    m, n = rows.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if m > 0:
        tile = row_tile(n)
        _layer_norm_kernel[(cdiv(m, tile.rows),)](
            rows,
            weight.contiguous(),
            bias.contiguous(),
            out,
            mean,
            rstd,
            m,
            n,
            rows.stride(0),
            eps,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            num_warps=tile.num_warps,
            **COMPILE_OPTIONS,
        )
    return out, mean, rstd


@on_own_device
def layer_norm_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_out, x [..., N], weight [N], mean, rstd [...] float32 -> (grad_x like x and contiguous,
    grad_weight, grad_bias like weight).

    Deterministic: partial sums per program, added in a fixed order in float32.
    """
    rows = as_rows(x)  # [M, N]
    grad_out_rows = as_rows(grad_out)  # [M, N]
    m, n = rows.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if m == 0:
        return grad_x, weight.new_zeros(n), weight.new_zeros(n)
    tile = row_tile(n)
    programs = persistent_programs(x.device, cdiv(m, tile.rows), PROGRAMS_PER_MULTIPROCESSOR)
    partials = torch.empty((2, programs, n), dtype=torch.float32, device=x.device)
    _layer_norm_backward_kernel[(programs,)](
        grad_out_rows,
        rows,
        weight.contiguous(),
        mean.contiguous(),
        rstd.contiguous(),
        grad_x,
        partials,
        m,
        n,
        grad_out_rows.stride(0),
        rows.stride(0),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        num_warps=tile.num_warps,
        # g - mean(g) of one column is 0: not what is left of g's product in a fused subtraction.
        **COMPILE_OPTIONS | {"enable_fp_fusion": False},
    )
    grad_weight, grad_bias = (sum_partials(partial, weight.dtype) for partial in partials)
    return grad_x, grad_weight, grad_bias


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the arguments of any op of this module."""
    return why_not_tensors(*args) + why_not_row_length(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    cases = []
    for n in (128, 4096, 16384):
        tile = row_tile(n)
        shared: dict[str, Constant | str] = {
            "x_ptr": "*bf16:16",
            "weight_ptr": "*bf16:16",
            "mean_ptr": "*fp32:16",
            "rstd_ptr": "*fp32:16",
            "M": "i32",
            "N": "i32:16",
            "x_stride": "i32:16",
            "BLOCK_M": Constant(tile.rows),
            "BLOCK_N": Constant(tile.columns),
        }
        forward = shared | {"bias_ptr": "*bf16:16", "out_ptr": "*bf16:16", "eps": "fp32"}
        backward = shared | {
            "grad_out_ptr": "*bf16:16",
            "grad_x_ptr": "*bf16:16",
            "partials_ptr": "*fp32:16",
            "grad_out_stride": "i32:16",
        }
        cases += [
            AheadOfTimeCase(f"bf16 N={n}", _layer_norm_kernel, forward, tile.num_warps),
            AheadOfTimeCase(f"bf16 N={n}", _layer_norm_backward_kernel, backward, tile.num_warps),
        ]
    return cases
