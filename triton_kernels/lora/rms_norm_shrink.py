"""RMSNorm, with or without a residual, and the low-rank product of its output."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.common.launch import (
    COMPILE_OPTIONS,
    AheadOfTimeCase,
    Constant,
    cdiv,
    on_own_device,
    why_not_tensors,
    with_unit_last_stride,
)
from warploom.triton_kernels.common.numerics import cast, dot
from warploom.triton_kernels.lora.tiles import shrink_tile
from warploom.triton_kernels.norm.row_tiles import why_not_row_length


@triton.jit
def _sum_tile(x_ptr, residual_ptr, x_offsets, residual_offsets, mask):
    """x + residual, rounded to x's dtype; x without a residual."""
    b_sum = tl.load(x_ptr + x_offsets, mask=mask, other=0.0)
    if residual_ptr is not None:
        b_residual = tl.load(residual_ptr + residual_offsets, mask=mask, other=0.0)
        b_sum = cast(cast(b_sum, tl.float32) + cast(b_residual, tl.float32), b_sum.dtype)
    return b_sum


@triton.jit(do_not_specialize=["M"])
def _rms_norm_shrink_kernel(
    x_ptr,  # [M, K], row stride x_stride
    residual_ptr,  # [M, K], row stride residual_stride, or None
    weight_ptr,  # [K]
    lora_a_ptr,  # [R, K], contiguous
    out_ptr,  # [M, K], contiguous
    shrunk_ptr,  # [M, R], contiguous
    rstd_ptr,  # [M] float32
    sum_ptr,  # [M, K], contiguous, or None without a residual
    M,
    K,
    R,
    x_stride,
    residual_stride,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = x + residual, rounded to x's dtype (y = x without a residual);
    rstd = 1 / sqrt(mean(y^2) + eps); out = y * rstd * weight; shrunk = out A^T, of out as rounded.

    The rows are read twice, the second time from a cache, so that any K fits. y is added up again
    then: nothing orders its store by one thread before its load by another.

    Grid: [cdiv(M, BLOCK_M), cdiv(R, BLOCK_R)]; the programs of the first ranks store what is not shrunk.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    first_rank = tl.program_id(1) * BLOCK_R
    ranks = first_rank + tl.arange(0, BLOCK_R)[None, :]
    storing = rows < tl.where(first_rank == 0, M, 0)
    x_rows = rows * x_stride
    residual_rows = rows * residual_stride
    b_square = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)[None, :]
        mask = (rows < M) & (columns < K)
        # [BLOCK_M, BLOCK_K]
        b_sum = _sum_tile(x_ptr, residual_ptr, x_rows + columns, residual_rows + columns, mask)
        b_y = cast(b_sum, tl.float32)
        b_square += b_y * b_y
    # [BLOCK_M, 1]
    b_rstd = tl.rsqrt(tl.sum(b_square, axis=1, keep_dims=True) / K + eps)
    tl.store(rstd_ptr + rows, b_rstd, mask=storing)

    b_shrunk = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)[None, :]
        mask = (rows < M) & (columns < K)
        # [BLOCK_M, BLOCK_K]
        b_sum = _sum_tile(x_ptr, residual_ptr, x_rows + columns, residual_rows + columns, mask)
        if residual_ptr is not None:
            tl.store(sum_ptr + rows * K + columns, b_sum, mask=storing & (columns < K))
        # [1, BLOCK_K]
        b_weight = tl.load(weight_ptr + columns, mask=columns < K, other=0.0)
        b_out = cast(b_sum, tl.float32) * b_rstd * cast(b_weight, tl.float32)
        b_out = cast(b_out, out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows * K + columns, b_out, mask=storing & (columns < K))
        # [BLOCK_K, BLOCK_R]
        terms = first + tl.arange(0, BLOCK_K)[:, None]
        p_lora_a = lora_a_ptr + ranks.to(tl.int64) * K + terms
        b_lora_a = tl.load(p_lora_a, mask=(ranks < R) & (terms < K), other=0.0)
        b_shrunk = dot(b_out, b_lora_a, b_shrunk)
    b_shrunk = cast(b_shrunk, shrunk_ptr.dtype.element_ty)
    tl.store(shrunk_ptr + rows * R + ranks, b_shrunk, mask=(rows < M) & (ranks < R))


@on_own_device
def rms_norm_shrink(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, residual [M, K], weight [K], lora_a [R, K] in x's dtype or float32 -> (out like x, shrunk
    [M, R], rstd [M] float32, sum like x), contiguous; the sum empty without a residual.
    """
    x = with_unit_last_stride(x)
    residual = None if residual is None else with_unit_last_stride(residual)
    (m, k), rank = x.shape, lora_a.shape[0]
    out = torch.empty((m, k), dtype=x.dtype, device=x.device)
    shrunk = torch.empty((m, rank), dtype=x.dtype, device=x.device)
    rstd = torch.empty(m, dtype=torch.float32, device=x.device)
    total = None if residual is None else torch.empty_like(out)
    if m > 0:
        tile = shrink_tile(x.dtype, rank)
        _rms_norm_shrink_kernel[(cdiv(m, tile.rows), cdiv(rank, tile.columns))](
            x,
            residual,
            weight.contiguous(),
            lora_a.to(x.dtype).contiguous(),
            out,
            shrunk,
            rstd,
            total,
            m,
            k,
            rank,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            BLOCK_M=tile.rows,
            BLOCK_R=tile.columns,
            BLOCK_K=tile.terms,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **COMPILE_OPTIONS,
        )
    return out, shrunk, rstd, x.new_empty(0) if total is None else total


def why_not(*args: object) -> list[str]:
    """What the kernel cannot do with the op's arguments, nor the norm's own gradient behind it."""
    return why_not_tensors(*args) + why_not_row_length(*args)


def _case(dtype: torch.dtype, rank: int, residual: bool) -> AheadOfTimeCase:
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    tile = shrink_tile(dtype, rank)
    arguments: dict[str, Constant | str] = {
        "x_ptr": f"*{name}:16",
        "residual_ptr": f"*{name}:16" if residual else Constant(None),
        "weight_ptr": f"*{name}:16",
        "lora_a_ptr": f"*{name}:16",
        "out_ptr": f"*{name}:16",
        "shrunk_ptr": f"*{name}:16",
        "rstd_ptr": "*fp32:16",
        "sum_ptr": f"*{name}:16" if residual else Constant(None),
        "M": "i32",
        "K": "i32:16",
        "R": "i32:16",
        "x_stride": "i32:16",
        "residual_stride": "i32:16",
        "eps": "fp32",
        "BLOCK_M": Constant(tile.rows),
        "BLOCK_R": Constant(tile.columns),
        "BLOCK_K": Constant(tile.terms),
    }
    title = f"{name} R={rank}{' residual' * residual}"
    return AheadOfTimeCase(
        title, _rms_norm_shrink_kernel, arguments, tile.num_warps, tile.num_stages
    )


def aot_cases() -> list[AheadOfTimeCase]:
    return [
        *(
            _case(torch.bfloat16, rank, residual)
            for rank in (16, 256)
            for residual in (False, True)
        ),
        _case(torch.float32, 256, True),
    ]
