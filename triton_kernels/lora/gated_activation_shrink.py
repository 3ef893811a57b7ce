"""Gated activations, and the low-rank product of their output."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.activation.gated_activation import activate
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


@triton.jit(do_not_specialize=["M"])
def _gated_activation_shrink_kernel(
    gate_ptr,  # [M, K], row stride gate_stride
    up_ptr,  # [M, K], row stride up_stride
    lora_a_ptr,  # [R, K], contiguous
    out_ptr,  # [M, K], contiguous
    shrunk_ptr,  # [M, R], contiguous
    M,
    K,
    R,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = act(gate) * up; shrunk = out A^T, of out as rounded.

    Grid: [cdiv(M, BLOCK_M), cdiv(R, BLOCK_R)]; the programs of the first ranks store out.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    first_rank = tl.program_id(1) * BLOCK_R
    ranks = first_rank + tl.arange(0, BLOCK_R)[None, :]
    storing = rows < tl.where(first_rank == 0, M, 0)
    b_shrunk = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)[None, :]
        mask = (rows < M) & (columns < K)
        # [BLOCK_M, BLOCK_K]
        b_gate = tl.load(gate_ptr + rows * gate_stride + columns, mask=mask, other=0.0)
        b_up = tl.load(up_ptr + rows * up_stride + columns, mask=mask, other=0.0)
        b_act, _ = activate(cast(b_gate, tl.float32), ACTIVATION)
        b_out = cast(b_act * cast(b_up, tl.float32), out_ptr.dtype.element_ty)
        # Without the mask, which depends on more than what is loaded, the compiler computes the
        # activation anew in the product's layout, where every warp holds the rows of others.
        b_out = tl.where(mask, b_out, 0.0)
        tl.store(out_ptr + rows * K + columns, b_out, mask=storing & (columns < K))
        # [BLOCK_K, BLOCK_R]
        terms = first + tl.arange(0, BLOCK_K)[:, None]
        p_lora_a = lora_a_ptr + ranks.to(tl.int64) * K + terms
        b_lora_a = tl.load(p_lora_a, mask=(ranks < R) & (terms < K), other=0.0)
        b_shrunk = dot(b_out, b_lora_a, b_shrunk)
    b_shrunk = cast(b_shrunk, shrunk_ptr.dtype.element_ty)
    tl.store(shrunk_ptr + rows * R + ranks, b_shrunk, mask=(rows < M) & (ranks < R))


@on_own_device
def gated_activation_shrink(
    gate: torch.Tensor, up: torch.Tensor, lora_a: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """gate, up [M, K], lora_a [R, K] in their dtype or float32 -> (out like gate, shrunk [M, R]),
    contiguous; activation: silu, gelu or gelu_tanh.
    """
    gate, up = with_unit_last_stride(gate), with_unit_last_stride(up)
    (m, k), rank = gate.shape, lora_a.shape[0]
    out = torch.empty((m, k), dtype=gate.dtype, device=gate.device)
    shrunk = torch.empty((m, rank), dtype=gate.dtype, device=gate.device)
    if m > 0:
        tile = shrink_tile(gate.dtype, rank)
        _gated_activation_shrink_kernel[(cdiv(m, tile.rows), cdiv(rank, tile.columns))](
            gate,
            up,
            lora_a.to(gate.dtype).contiguous(),
            out,
            shrunk,
            m,
            k,
            rank,
            gate.stride(0),
            up.stride(0),
            ACTIVATION=activation,
            BLOCK_M=tile.rows,
            BLOCK_R=tile.columns,
            BLOCK_K=tile.terms,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **COMPILE_OPTIONS,
        )
    return out, shrunk


def why_not(*args: object) -> list[str]:
    """What the kernel cannot do with the op's arguments."""
    return why_not_tensors(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    cases = []
    for dtype, name, activation, rank in (
        (torch.bfloat16, "bf16", "silu", 16),
        (torch.bfloat16, "bf16", "gelu", 256),
        (torch.bfloat16, "bf16", "gelu_tanh", 64),
        (torch.float32, "fp32", "silu", 16),
        (torch.float32, "fp32", "silu", 256),
    ):
        tile = shrink_tile(dtype, rank)
        arguments: dict[str, Constant | str] = {
            "gate_ptr": f"*{name}:16",
            "up_ptr": f"*{name}:16",
            "lora_a_ptr": f"*{name}:16",
            "out_ptr": f"*{name}:16",
            "shrunk_ptr": f"*{name}:16",
            "M": "i32",
            "K": "i32:16",
            "R": "i32:16",
            "gate_stride": "i32:16",
            "up_stride": "i32:16",
            "ACTIVATION": Constant(activation),
            "BLOCK_M": Constant(tile.rows),
            "BLOCK_R": Constant(tile.columns),
            "BLOCK_K": Constant(tile.terms),
        }
        title = f"{name} {activation} R={rank}"
        launch = (tile.num_warps, tile.num_stages)
        cases.append(AheadOfTimeCase(title, _gated_activation_shrink_kernel, arguments, *launch))
    return cases
