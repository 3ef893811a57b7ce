"""Rows times a narrow matrix: the shrink of the forward pass, and of the gradient's."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.common.dropout import dropout_threshold, keep_mask
from warploom.triton_kernels.common.launch import (
    COMPILE_OPTIONS,
    AheadOfTimeCase,
    Constant,
    cdiv,
    with_unit_last_stride,
)
from warploom.triton_kernels.common.numerics import cast, dot
from warploom.triton_kernels.lora.tiles import shrink_tile


@triton.jit(do_not_specialize=["M", "threshold"])
def _shrink_product_kernel(
    rows_ptr,  # [M, K], row stride rows_stride
    matrix_ptr,  # [R, K], strides matrix_stride_r, matrix_stride_k
    seed_ptr,  # int64 [1], or None: nothing is dropped
    out_ptr,  # [M, R], contiguous
    M,
    K,
    R,
    rows_stride,
    matrix_stride_r,
    matrix_stride_k,
    scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[m, r] = scale sum_k keep[m, k] rows[m, k] matrix[r, k].

    Grid: [cdiv(M, BLOCK_M) * cdiv(R, BLOCK_R)], ranks fastest.
    """
    rank_tiles = tl.cdiv(R, BLOCK_R)
    first_row = (tl.program_id(0) // rank_tiles) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)[:, None]
    ranks = (tl.program_id(0) % rank_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    terms = tl.arange(0, BLOCK_K)
    # [BLOCK_M, BLOCK_K]
    p_rows = rows_ptr + rows.to(tl.int64) * rows_stride + terms[None, :]
    # [BLOCK_K, BLOCK_R]
    p_matrix = matrix_ptr + ranks.to(tl.int64) * matrix_stride_r
    p_matrix += terms[:, None].to(tl.int64) * matrix_stride_k
    b_out = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for first_term in range(0, K, BLOCK_K):
        left = K - first_term
        b_rows = tl.load(p_rows, mask=(rows < M) & (terms[None, :] < left), other=0.0)
        if seed_ptr is not None:
            dropout = (seed_ptr, 0, threshold)
            kept = keep_mask(first_row, first_term, dropout, BLOCK_M, BLOCK_K)
            b_rows = tl.where(kept, b_rows, 0.0)
        b_matrix = tl.load(p_matrix, mask=(ranks < R) & (terms[:, None] < left), other=0.0)
        b_out = dot(b_rows, b_matrix, b_out)
        p_rows += BLOCK_K
        p_matrix += BLOCK_K * matrix_stride_k
    p_out = out_ptr + rows.to(tl.int64) * R + ranks
    b_out = cast(b_out * scale, out_ptr.dtype.element_ty)
    tl.store(p_out, b_out, mask=(rows < M) & (ranks < R))


def shrink_product(
    rows: torch.Tensor,
    matrix: torch.Tensor,
    scale: float = 1.0,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """scale drop(rows) matrix^T: rows [M, K], matrix [R, K] of any strides -> [M, R] like rows."""
    rows, matrix = with_unit_last_stride(rows), matrix.to(rows.dtype)
    m, k = rows.shape
    rank = matrix.shape[0]
    out = torch.empty((m, rank), dtype=rows.dtype, device=rows.device)
    if out.numel() > 0:
        tile = shrink_tile(rows.dtype, rank)
        _shrink_product_kernel[(cdiv(m, tile.rows) * cdiv(rank, tile.columns),)](
            rows,
            matrix,
            seed,
            out,
            m,
            k,
            rank,
            rows.stride(0),
            matrix.stride(0),
            matrix.stride(1),
            scale if seed is None else scale / (1.0 - dropout_p),
            dropout_threshold(dropout_p),
            BLOCK_M=tile.rows,
            BLOCK_R=tile.columns,
            BLOCK_K=tile.terms,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **COMPILE_OPTIONS,
        )
    return out


def _case(
    dtype: torch.dtype, rank: int, transposed: bool = False, dropout: bool = False
) -> AheadOfTimeCase:
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    tile = shrink_tile(dtype, rank)
    strides: tuple[Any, Any] = ("i32:16", Constant(1))
    arguments: dict[str, Constant | str] = {
        "rows_ptr": f"*{name}:16",
        "matrix_ptr": f"*{name}:16",
        "seed_ptr": "*i64" if dropout else Constant(None),
        "out_ptr": f"*{name}:16",
        "M": "i32",
        "K": "i32:16",
        "R": "i32:16",
        "rows_stride": "i32:16",
        "matrix_stride_r": strides[transposed],
        "matrix_stride_k": strides[not transposed],
        "scale": "fp32",
        "threshold": "i32",
        "BLOCK_M": Constant(tile.rows),
        "BLOCK_R": Constant(tile.columns),
        "BLOCK_K": Constant(tile.terms),
    }
    title = f"{name} R={rank}{' grad' * transposed}{' dropout' * dropout}"
    return AheadOfTimeCase(
        title, _shrink_product_kernel, arguments, tile.num_warps, tile.num_stages
    )


def aot_cases() -> list[AheadOfTimeCase]:
    bf16, ranks = torch.bfloat16, (16, 256)
    return [
        *(_case(bf16, rank, dropout=dropout) for rank in ranks for dropout in (False, True)),
        *(_case(bf16, rank, transposed=True) for rank in ranks),
        *(_case(torch.float32, rank) for rank in ranks),
    ]
