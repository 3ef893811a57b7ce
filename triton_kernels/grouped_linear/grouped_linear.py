"""A linear map per group of rows."""

from __future__ import annotations

from typing import Any

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
from warploom.triton_kernels.grouped_linear.tiles import GROUP_BLOCK, product_tile


@triton.jit(do_not_specialize=["M", "G"])
def _row_product_kernel(
    rows_ptr,  # [M, K], row stride rows_stride
    matrices_ptr,  # [G, N, K], strides N * K, matrix_stride_n, matrix_stride_k
    offsets_ptr,  # [G + 1] int32, rising from 0
    out_ptr,  # [M, N], contiguous
    M,
    G,
    N,
    K,
    rows_stride,
    matrix_stride_n,
    matrix_stride_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """out[m, n] = sum_k rows[m, k] matrices[g, n, k], m in group g; 0 behind the last group.

    Grid: [(M // BLOCK_M + G + 1) * cdiv(N, BLOCK_N)], columns fastest. Group g has the row tiles from
    offsets[g] // BLOCK_M + g up to the next group's first: enough, and one too many has no rows. The
    rows behind the last offset are a group of their own, whose sums have no terms.
    """
    column_tiles = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // column_tiles
    columns = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)

    # The groups whose first tile is not behind this one.
    begun = 0
    for first in range(0, G + 1, BLOCK_G):
        groups = first + tl.arange(0, BLOCK_G)
        begins = tl.load(offsets_ptr + groups, mask=groups <= G, other=0) // BLOCK_M + groups
        begun += tl.sum(((begins <= tile) & (groups <= G)).to(tl.int32))
    group = begun - 1
    begin = tl.load(offsets_ptr + group)
    end = tl.load(offsets_ptr + group + 1, mask=group < G, other=M)
    first_row = begin + (tile - begin // BLOCK_M - group) * BLOCK_M
    if first_row >= end:
        return

    rows = first_row + tl.arange(0, BLOCK_M)
    wide_rows = rows[:, None].to(tl.int64)
    wide_columns = columns[None, :].to(tl.int64)
    row_mask = rows[:, None] < end
    column_mask = columns[None, :] < N
    terms = tl.arange(0, BLOCK_K)
    # [BLOCK_M, BLOCK_K]
    p_rows = rows_ptr + wide_rows * rows_stride + terms[None, :]
    # [BLOCK_K, BLOCK_N]
    p_matrix = matrices_ptr + group.to(tl.int64) * N * K
    p_matrix += wide_columns * matrix_stride_n + terms[:, None] * matrix_stride_k
    b_out = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first_term in range(0, tl.where(group < G, K, 0), BLOCK_K):
        left = K - first_term
        b_rows = tl.load(p_rows, mask=row_mask & (terms[None, :] < left), other=0.0)
        b_matrix = tl.load(p_matrix, mask=column_mask & (terms[:, None] < left), other=0.0)
        b_out = dot(b_rows, b_matrix, b_out)
        p_rows += BLOCK_K
        p_matrix += BLOCK_K * matrix_stride_k
    p_out = out_ptr + wide_rows * N + wide_columns
    tl.store(p_out, cast(b_out, out_ptr.dtype.element_ty), mask=row_mask & column_mask)


def row_product(
    rows: torch.Tensor, matrices: torch.Tensor, group_offsets: torch.Tensor
) -> torch.Tensor:
    """rows [M, K], matrices [G, N, K] dense in any order of N and K -> [M, N]."""
    rows = with_unit_last_stride(rows)
    m, k = rows.shape
    groups, n, _ = matrices.shape
    out = torch.empty((m, n), dtype=rows.dtype, device=rows.device)
    if m > 0 and n > 0:
        tile = product_tile(rows.dtype)
        _row_product_kernel[((m // tile.rows + groups + 1) * cdiv(n, tile.columns),)](
            rows,
            matrices,
            group_offsets.contiguous(),
            out,
            m,
            groups,
            n,
            k,
            rows.stride(0),
            matrices.stride(1),
            matrices.stride(2),
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.terms,
            BLOCK_G=GROUP_BLOCK,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **COMPILE_OPTIONS,
        )
    return out


@on_own_device
def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, group_offsets: torch.Tensor, batch_invariant: bool
) -> torch.Tensor:
    """x [M, K], weight [G, N, K], group_offsets [G + 1] int32 -> [M, N], contiguous, batch-invariant."""
    return row_product(x, weight.contiguous(), group_offsets)


def why_not(*args: object) -> list[str]:
    """What the kernels of this family cannot do with the arguments of an op."""
    return why_not_tensors(*args)


def _row_product_case(dtype: torch.dtype, name: str, transposed: bool) -> AheadOfTimeCase:
    tile = product_tile(dtype)
    strides: tuple[Any, Any] = ("i32:16", Constant(1))
    arguments: dict[str, Constant | str] = {
        "rows_ptr": f"*{name}:16",
        "matrices_ptr": f"*{name}:16",
        "offsets_ptr": "*i32:16",
        "out_ptr": f"*{name}:16",
        "M": "i32",
        "G": "i32",
        "N": "i32:16",
        "K": "i32:16",
        "rows_stride": "i32:16",
        "matrix_stride_n": strides[transposed],
        "matrix_stride_k": strides[not transposed],
        "BLOCK_M": Constant(tile.rows),
        "BLOCK_N": Constant(tile.columns),
        "BLOCK_K": Constant(tile.terms),
        "BLOCK_G": Constant(GROUP_BLOCK),
    }
    title = f"{name} {'grad_x' if transposed else 'output'}"
    return AheadOfTimeCase(title, _row_product_kernel, arguments, tile.num_warps, tile.num_stages)


def aot_cases() -> list[AheadOfTimeCase]:
    return [
        _row_product_case(dtype, name, transposed)
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"))
        for transposed in (False, True)
    ]
