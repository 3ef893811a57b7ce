"""A product with a weight, and a low-rank update summed in its accumulators before it."""

from __future__ import annotations

import dataclasses
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
from warploom.triton_kernels.lora.tiles import ROW_BAND, rank_block, update_tile
from warploom.triton_kernels.lora.weight_tile import StoredWeight, weight_tile, weight_types


@triton.jit(do_not_specialize=["M", "threshold"])
def _two_phase_kernel(
    narrow_ptr,  # [M, R], row stride narrow_stride, or None: no update
    matrix_ptr,  # [R, N], strides matrix_stride_r, matrix_stride_n
    seed_ptr,  # int64 [1], or None: nothing is dropped
    rows_ptr,  # [M, K], row stride rows_stride, or None: no base
    values_ptr,  # the weight: [N, K] if TRANSPOSED, else [K, N]; see weight_tile
    scale_ptr,
    table_ptr,
    column_scale_ptr,  # [N] float32, or None
    bias_ptr,  # [N], or None
    unscaled_ptr,  # [M, N], contiguous, or None without column_scale
    out_ptr,  # [M, N], contiguous
    M,
    N,
    K,
    R,
    narrow_stride,
    matrix_stride_r,
    matrix_stride_n,
    rows_stride,
    scale_block,
    scale_blocks,
    update_scale,
    threshold,
    FORMAT: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """unscaled = update_scale keep (narrow matrix) + rows weight; out = column_scale unscaled + bias.

    The update's steps come first: only so can its sum be scaled and masked in the accumulators.

    Grid: [cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)], rows fastest within bands of BAND row tiles.
    """
    band_tiles = BAND * tl.cdiv(N, BLOCK_N)
    band_row = tl.program_id(0) // band_tiles * BAND
    band_rows = tl.minimum(tl.cdiv(M, BLOCK_M) - band_row, BAND)
    tile = tl.program_id(0) % band_tiles
    first_row = (band_row + tile % band_rows) * BLOCK_M
    first_column = tile // band_rows * BLOCK_N

    rows = first_row + tl.arange(0, BLOCK_M)[:, None]
    columns = first_column + tl.arange(0, BLOCK_N)[None, :]
    wide_rows = rows.to(tl.int64)
    row_mask = rows < M
    column_mask = columns < N
    b_out = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if narrow_ptr is not None:
        ranks = tl.arange(0, BLOCK_R)
        # [BLOCK_M, BLOCK_R]
        p_narrow = narrow_ptr + wide_rows * narrow_stride + ranks[None, :]
        # [BLOCK_R, BLOCK_N]
        p_matrix = matrix_ptr + columns.to(tl.int64) * matrix_stride_n
        p_matrix += ranks[:, None].to(tl.int64) * matrix_stride_r
        for first_rank in range(0, R, BLOCK_R):
            left = R - first_rank
            b_narrow = tl.load(p_narrow, mask=row_mask & (ranks[None, :] < left), other=0.0)
            b_matrix = tl.load(p_matrix, mask=column_mask & (ranks[:, None] < left), other=0.0)
            b_out = dot(b_narrow, b_matrix, b_out)
            p_narrow += BLOCK_R
            p_matrix += BLOCK_R * matrix_stride_r
        b_out *= update_scale
        if seed_ptr is not None:
            dropout = (seed_ptr, 0, threshold)
            kept = keep_mask(first_row, first_column, dropout, BLOCK_M, BLOCK_N)
            b_out = tl.where(kept, b_out, 0.0)
    if rows_ptr is not None:
        weight = (values_ptr, scale_ptr, table_ptr, scale_block, scale_blocks)
        dtype: tl.constexpr = rows_ptr.dtype.element_ty
        terms = tl.arange(0, BLOCK_K)[None, :]
        # [BLOCK_M, BLOCK_K]
        p_rows = rows_ptr + wide_rows * rows_stride + terms
        for first_term in range(0, K, BLOCK_K):
            b_rows = tl.load(p_rows, mask=row_mask & (terms < K - first_term), other=0.0)
            # [BLOCK_K, BLOCK_N]
            if TRANSPOSED:
                b_stored = weight_tile(
                    weight,
                    first_column,
                    first_term,
                    N,
                    K,
                    dtype,
                    FORMAT,
                    ONE_SCALE,
                    BLOCK_N,
                    BLOCK_K,
                )
                b_weight = tl.trans(b_stored)
            else:
                b_weight = weight_tile(
                    weight,
                    first_term,
                    first_column,
                    K,
                    N,
                    dtype,
                    FORMAT,
                    ONE_SCALE,
                    BLOCK_K,
                    BLOCK_N,
                )
            b_out = dot(b_rows, b_weight, b_out)
            p_rows += BLOCK_K

    mask = row_mask & column_mask
    if column_scale_ptr is not None:
        b_unscaled = cast(b_out, unscaled_ptr.dtype.element_ty)
        tl.store(unscaled_ptr + wide_rows * N + columns, b_unscaled, mask=mask)
        b_out *= tl.load(column_scale_ptr + columns, mask=column_mask, other=0.0)
    if bias_ptr is not None:
        b_bias = tl.load(bias_ptr + columns, mask=column_mask, other=0.0)
        b_out += cast(b_bias, tl.float32)
    b_out = cast(b_out, out_ptr.dtype.element_ty)
    tl.store(out_ptr + wide_rows * N + columns, b_out, mask=mask)


@dataclasses.dataclass(frozen=True)
class Update:
    """scale drop(narrow matrix): narrow [M, R], matrix [R, N] of any strides."""

    narrow: torch.Tensor
    matrix: torch.Tensor
    scale: float
    seed: torch.Tensor | None = None
    dropout_p: float = 0.0

    def arguments(self, dtype: torch.dtype) -> dict[str, object]:
        narrow, matrix = with_unit_last_stride(self.narrow), self.matrix.to(dtype)
        kept = 1.0 if self.seed is None else 1.0 - self.dropout_p
        return {
            "narrow_ptr": narrow,
            "matrix_ptr": matrix,
            "seed_ptr": self.seed,
            "R": narrow.shape[1],
            "narrow_stride": narrow.stride(0),
            "matrix_stride_r": matrix.stride(0),
            "matrix_stride_n": matrix.stride(1),
            "update_scale": self.scale / kept,
            "threshold": dropout_threshold(self.dropout_p),
        }


@dataclasses.dataclass(frozen=True)
class Base:
    """rows [M, K] times a weight [N, K] (transposed) or [K, N]."""

    rows: torch.Tensor
    weight: StoredWeight
    transposed: bool

    def arguments(self, tile_columns: int) -> dict[str, object]:
        rows = with_unit_last_stride(self.rows)
        return {
            "rows_ptr": rows,
            "K": rows.shape[1],
            "rows_stride": rows.stride(0),
            "TRANSPOSED": self.transposed,
            **self.weight.arguments(tile_columns),
        }


_NO_UPDATE: dict[str, object] = {
    **dict.fromkeys(("narrow_ptr", "matrix_ptr", "seed_ptr")),
    **dict.fromkeys(("R", "narrow_stride", "matrix_stride_r", "matrix_stride_n", "threshold"), 0),
    "update_scale": 0.0,
}
_NO_BASE: dict[str, object] = {
    **dict.fromkeys(("rows_ptr", "values_ptr", "scale_ptr", "table_ptr")),
    **dict.fromkeys(("K", "rows_stride", "scale_block", "scale_blocks"), 0),
    "TRANSPOSED": True,
    "FORMAT": "dense",
    "ONE_SCALE": True,
}


def two_phase_product(
    out: torch.Tensor,
    update: Update | None,
    base: Base | None,
    column_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    unscaled: torch.Tensor | None = None,
) -> None:
    """out [M, N] = column_scale (update + base) + bias; `unscaled` [M, N] becomes update + base."""
    m, n = out.shape
    if out.numel() == 0:
        return
    transposed = base is None or base.transposed
    quantised = base is not None and base.weight.scale is not None
    tile = update_tile(out.dtype, m, quantised, transposed)
    rank = 1 if update is None else update.narrow.shape[1]
    tile_columns = tile.terms if transposed else tile.columns
    _two_phase_kernel[(cdiv(m, tile.rows) * cdiv(n, tile.columns),)](
        column_scale_ptr=None if column_scale is None else column_scale.contiguous(),
        bias_ptr=None if bias is None else bias.contiguous(),
        unscaled_ptr=unscaled,
        out_ptr=out,
        M=m,
        N=n,
        BAND=ROW_BAND,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.terms,
        BLOCK_R=rank_block(rank, tile),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **(_NO_UPDATE if update is None else update.arguments(out.dtype)),
        **(_NO_BASE if base is None else base.arguments(tile_columns)),
        **COMPILE_OPTIONS,
    )


def _case(
    dtype: torch.dtype,
    rows: int,
    weight_format: str = "dense",
    transposed: bool = True,
    extras: bool = False,
    one_scale: bool = True,
) -> AheadOfTimeCase:
    """`extras`: column scales and a bias in the forward product, dropout in the gradient's."""
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    tile = update_tile(dtype, rows, weight_format != "dense", transposed)
    strides: tuple[Any, Any] = ("i32:16", Constant(1))
    epilogue = transposed and extras
    arguments: dict[str, Constant | str] = {
        "narrow_ptr": f"*{name}:16",
        "matrix_ptr": f"*{name}:16",
        "seed_ptr": "*i64" if extras and not transposed else Constant(None),
        "rows_ptr": f"*{name}:16",
        **weight_types(name, weight_format, one_scale),
        "column_scale_ptr": "*fp32:16" if epilogue else Constant(None),
        "bias_ptr": f"*{name}:16" if epilogue else Constant(None),
        "unscaled_ptr": f"*{name}:16" if epilogue else Constant(None),
        "out_ptr": f"*{name}:16",
        "M": "i32",
        "N": "i32:16",
        "K": "i32:16",
        "R": "i32:16",
        "narrow_stride": "i32:16",
        "matrix_stride_r": strides[transposed],
        "matrix_stride_n": strides[not transposed],
        "rows_stride": "i32:16",
        "update_scale": "fp32",
        "threshold": "i32",
        "TRANSPOSED": Constant(transposed),
        "BAND": Constant(ROW_BAND),
        "BLOCK_M": Constant(tile.rows),
        "BLOCK_N": Constant(tile.columns),
        "BLOCK_K": Constant(tile.terms),
        "BLOCK_R": Constant(rank_block(16, tile)),
    }
    title = f"{name} {weight_format}{' scales' * (not one_scale)}{' few' * (rows <= 32)}"
    title += f"{' grad_x' * (not transposed)}{' extras' * extras}"
    return AheadOfTimeCase(title, _two_phase_kernel, arguments, tile.num_warps, tile.num_stages)


def aot_cases() -> list[AheadOfTimeCase]:
    bf16, formats, directions = torch.bfloat16, ("dense", "nf4", "int8", "fp8_e4m3"), (True, False)
    return [
        *(_case(bf16, 1, of) for of in formats),
        *(_case(bf16, 4096, of, transposed) for of in formats for transposed in directions),
        *(_case(bf16, 4096, "nf4", transposed, one_scale=False) for transposed in directions),
        *(_case(bf16, 4096, transposed=transposed, extras=True) for transposed in directions),
        *(_case(torch.float32, 4096, transposed=transposed) for transposed in directions),
    ]
