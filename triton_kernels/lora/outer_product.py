"""Sums over rows of two matrices: the gradients of adapters and weights."""

from __future__ import annotations

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
from warploom.triton_kernels.common.reduce import sum_partials
from warploom.triton_kernels.lora.tiles import outer_splits, outer_tile


@triton.jit(do_not_specialize=["M", "split_rows", "threshold"])
def _outer_product_kernel(
    left_ptr,  # [M, A], row stride left_stride
    right_ptr,  # [M, B], row stride right_stride
    seed_ptr,  # int64 [1], or None: nothing is dropped
    out_ptr,  # [splits, A, B], contiguous
    M,
    A,
    B,
    split_rows,  # a multiple of BLOCK_M
    left_stride,
    right_stride,
    scale,
    threshold,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out[s, a, b] = scale sum_m left[m, a] keep[m, b] right[m, b], m among the rows of part s.

    Grid: [cdiv(A, BLOCK_A) * cdiv(B, BLOCK_B), splits], b fastest.
    """
    tiles_b = tl.cdiv(B, BLOCK_B)
    first_b = (tl.program_id(0) % tiles_b) * BLOCK_B
    a = (tl.program_id(0) // tiles_b) * BLOCK_A + tl.arange(0, BLOCK_A)[:, None]
    b = first_b + tl.arange(0, BLOCK_B)[None, :]
    split = tl.program_id(1)
    begin = split * split_rows
    end = tl.minimum(begin + split_rows, M)
    b_sum = tl.zeros([BLOCK_A, BLOCK_B], dtype=tl.float32)
    for first_row in range(begin, end, BLOCK_M):
        rows = tl.cast(first_row, tl.int64) + tl.arange(0, BLOCK_M)
        # [BLOCK_A, BLOCK_M]
        p_left = left_ptr + rows[None, :] * left_stride + a
        b_left = tl.load(p_left, mask=(a < A) & (rows[None, :] < end), other=0.0)
        # [BLOCK_M, BLOCK_B]
        p_right = right_ptr + rows[:, None] * right_stride + b
        b_right = tl.load(p_right, mask=(rows[:, None] < end) & (b < B), other=0.0)
        if seed_ptr is not None:
            dropout = (seed_ptr, 0, threshold)
            kept = keep_mask(first_row, first_b, dropout, BLOCK_M, BLOCK_B)
            b_right = tl.where(kept, b_right, 0.0)
        b_sum = dot(b_left, b_right, b_sum)
    p_out = out_ptr + (split.to(tl.int64) * A + a) * B + b
    tl.store(p_out, cast(b_sum * scale, out_ptr.dtype.element_ty), mask=(a < A) & (b < B))


def outer_product(
    left: torch.Tensor,
    right: torch.Tensor,
    dtype: torch.dtype,
    scale: float = 1.0,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """scale left^T drop(right): left [M, A], right [M, B] -> [A, B] in `dtype`.

    Deterministic: long sums are cut into parts, which are added in a fixed order in float32.
    """
    left, right = with_unit_last_stride(left), with_unit_last_stride(right)
    (m, a), b = left.shape, right.shape[1]
    tile = outer_tile(left.dtype, a, b)
    tiles = cdiv(a, tile.rows) * cdiv(b, tile.columns)
    splits = outer_splits(m, tiles)
    split_rows = cdiv(cdiv(m, splits), tile.terms) * tile.terms
    out_dtype = dtype if splits == 1 else torch.float32
    out = torch.empty((splits, a, b), dtype=out_dtype, device=left.device)
    if out.numel() > 0:
        _outer_product_kernel[(tiles, splits)](
            left,
            right,
            seed,
            out,
            m,
            a,
            b,
            split_rows,
            left.stride(0),
            right.stride(0),
            scale if seed is None else scale / (1.0 - dropout_p),
            dropout_threshold(dropout_p),
            BLOCK_A=tile.rows,
            BLOCK_B=tile.columns,
            BLOCK_M=tile.terms,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **COMPILE_OPTIONS,
        )
    return out[0] if splits == 1 else sum_partials(out.view(splits, a * b), dtype).view(a, b)


def _case(
    dtype: torch.dtype, name: str, out_name: str, a: int, b: int, dropout: bool
) -> AheadOfTimeCase:
    tile = outer_tile(dtype, a, b)
    arguments: dict[str, Constant | str] = {
        "left_ptr": f"*{name}:16",
        "right_ptr": f"*{name}:16",
        "seed_ptr": "*i64" if dropout else Constant(None),
        "out_ptr": f"*{out_name}:16",
        "M": "i32",
        "A": "i32:16",
        "B": "i32:16",
        "split_rows": "i32",
        "left_stride": "i32:16",
        "right_stride": "i32:16",
        "scale": "fp32",
        "threshold": "i32",
        "BLOCK_A": Constant(tile.rows),
        "BLOCK_B": Constant(tile.columns),
        "BLOCK_M": Constant(tile.terms),
    }
    title = f"{name} {a}x{b}{' dropout' * dropout}"
    return AheadOfTimeCase(title, _outer_product_kernel, arguments, tile.num_warps, tile.num_stages)


def aot_cases() -> list[AheadOfTimeCase]:
    return [
        _case(dtype, name, out_name, *sizes)
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"))
        for out_name, *sizes in (
            ("fp32", 16, 4096, True),
            ("fp32", 4096, 256, False),
            (name, 4096, 4096, False),
        )
    ]
