"""Gradients of a linear map per group of rows."""

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
from warploom.triton_kernels.grouped_linear.grouped_linear import row_product
from warploom.triton_kernels.grouped_linear.tiles import product_tile


@triton.jit
def _grad_weight_kernel(
    grad_out_ptr,  # [M, N], row stride grad_out_stride
    x_ptr,  # [M, K], row stride x_stride
    offsets_ptr,  # [G + 1] int32, rising from 0
    grad_weight_ptr,  # [G, N, K], contiguous
    N,
    K,
    grad_out_stride,
    x_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """grad_weight[g, n, k] = sum over the rows m of group g of grad_out[m, n] x[m, k].

    Grid: [G * cdiv(N, BLOCK_N) * cdiv(K, BLOCK_K)], k fastest.
    """
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (tiles_n * tiles_k)
    tile = tl.program_id(0) % (tiles_n * tiles_k)
    ns = (tile // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = (tile % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin = tl.load(offsets_ptr + group).to(tl.int64)
    rows = tl.load(offsets_ptr + group + 1) - begin
    ms = tl.arange(0, BLOCK_M)
    # [BLOCK_N, BLOCK_M]
    p_grad_out = grad_out_ptr + (begin + ms[None, :]) * grad_out_stride + ns[:, None]
    # [BLOCK_M, BLOCK_K]
    p_x = x_ptr + (begin + ms[:, None]) * x_stride + ks[None, :]
    b_sum = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for first in range(0, rows, BLOCK_M):
        left = rows - first
        b_grad_out = tl.load(p_grad_out, mask=(ns[:, None] < N) & (ms[None, :] < left), other=0.0)
        b_x = tl.load(p_x, mask=(ms[:, None] < left) & (ks[None, :] < K), other=0.0)
        b_sum = dot(b_grad_out, b_x, b_sum)
        p_grad_out += BLOCK_M * grad_out_stride
        p_x += BLOCK_M * x_stride
    wide_ns = group.to(tl.int64) * N + ns[:, None]
    p_grad_weight = grad_weight_ptr + wide_ns * K + ks[None, :]
    b_grad_weight = cast(b_sum, grad_weight_ptr.dtype.element_ty)
    tl.store(p_grad_weight, b_grad_weight, mask=(ns[:, None] < N) & (ks[None, :] < K))


def _grad_weight(
    grad_out: torch.Tensor, x: torch.Tensor, group_offsets: torch.Tensor, groups: int
) -> torch.Tensor:
    grad_out, x = with_unit_last_stride(grad_out), with_unit_last_stride(x)
    n, k = grad_out.shape[1], x.shape[1]
    grad_weight = torch.empty((groups, n, k), dtype=x.dtype, device=x.device)
    if grad_weight.numel() > 0:
        tile = product_tile(x.dtype)
        _grad_weight_kernel[(groups * cdiv(n, tile.rows) * cdiv(k, tile.columns),)](
            grad_out,
            x,
            group_offsets.contiguous(),
            grad_weight,
            n,
            k,
            grad_out.stride(0),
            x.stride(0),
            BLOCK_N=tile.rows,
            BLOCK_K=tile.columns,
            BLOCK_M=tile.terms,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **COMPILE_OPTIONS,
        )
    return grad_weight


@on_own_device
def grouped_linear_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    group_offsets: torch.Tensor,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad_out [M, N] -> (grad_x like x, grad_weight like weight), contiguous; empty if not needed."""
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    if needs_x:
        grad_x = row_product(grad_out, weight.contiguous().mT, group_offsets)
    if needs_weight:
        grad_weight = _grad_weight(grad_out, x, group_offsets, weight.shape[0])
    return grad_x, grad_weight


def why_not(*args: object) -> list[str]:
    """What the kernels of this family cannot do with the arguments of an op."""
    return why_not_tensors(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    cases = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        tile = product_tile(dtype)
        arguments: dict[str, Constant | str] = {
            "grad_out_ptr": f"*{name}:16",
            "x_ptr": f"*{name}:16",
            "offsets_ptr": "*i32:16",
            "grad_weight_ptr": f"*{name}:16",
            "N": "i32:16",
            "K": "i32:16",
            "grad_out_stride": "i32:16",
            "x_stride": "i32:16",
            "BLOCK_N": Constant(tile.rows),
            "BLOCK_K": Constant(tile.columns),
            "BLOCK_M": Constant(tile.terms),
        }
        cases.append(
            AheadOfTimeCase(name, _grad_weight_kernel, arguments, tile.num_warps, tile.num_stages)
        )
    return cases
