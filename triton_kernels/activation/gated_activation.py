"""Gated activations (Shazeer 2020, SwiGLU and GEGLU): act(gate) * up, and its gradient."""

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
    next_power_of_2,
    on_own_device,
    why_not_tensors,
)
from warploom.triton_kernels.common.numerics import cast

_TILE_ELEMENTS = 1024
_NUM_WARPS = 4

# In an expression these stand to the right of a tensor: the interpreter wraps a product that has
# the constant on the left into a constant.
_INVERSE_SQRT_2: tl.constexpr = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_2_PI: tl.constexpr = tl.constexpr(0.3989422804014327)
# 2 sqrt(2 / pi) and the cubic coefficient of the tanh form of GELU (Hendrycks and Gimpel 2016).
_TANH_SCALE: tl.constexpr = tl.constexpr(1.5957691216057308)
_TANH_CUBIC: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def _sigmoid(x):
    """sigmoid(x) and sigmoid(-x), the one as exact as the other: 1 - sigmoid(x) would be a unit of 1 off."""
    power = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + power)
    smaller = power * larger
    return tl.where(x < 0.0, smaller, larger), tl.where(x < 0.0, larger, smaller)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x) and act'(x), float32.

    Every activation here is x * weight(x): silu has weight = sigmoid(x), gelu the normal
    distribution function, gelu_tanh (1 + tanh(u)) / 2 = sigmoid(2u), which does not cancel for
    negative u. So act' = weight + x * weight'.
    """
    if ACTIVATION == "silu":
        weight, rest = _sigmoid(x)
        slope = weight * rest
    elif ACTIVATION == "gelu":
        weight = 0.5 + 0.5 * tl.erf(x * _INVERSE_SQRT_2)
        slope = tl.exp(-0.5 * x * x) * _INVERSE_SQRT_2_PI
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh", "activation: silu, gelu or gelu_tanh")
        weight, rest = _sigmoid((x + x * x * x * _TANH_CUBIC) * _TANH_SCALE)
        slope = weight * rest * (1.0 + x * x * (3.0 * _TANH_CUBIC)) * _TANH_SCALE
    return x * weight, weight + x * slope


@triton.jit(do_not_specialize=["M"])
def _gated_activation_kernel(
    gate_ptr,  # [M, N], row stride gate_stride
    up_ptr,  # [M, N], row stride up_stride
    out_ptr,  # [M, N], contiguous
    M,
    N,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = act(gate) * up. Grid: [cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)], column tiles fastest."""
    column_tiles = tl.cdiv(N, BLOCK_N)
    i_m = tl.program_id(0) // column_tiles
    i_n = tl.program_id(0) % column_tiles
    rows = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = i_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < M) & (columns < N)
    # [BLOCK_M, BLOCK_N]
    b_gate = tl.load(gate_ptr + rows * gate_stride + columns, mask=mask, other=0.0)
    b_up = tl.load(up_ptr + rows * up_stride + columns, mask=mask, other=0.0)
    b_act, _ = activate(cast(b_gate, tl.float32), ACTIVATION)
    b_out = b_act * cast(b_up, tl.float32)
    tl.store(out_ptr + rows * N + columns, cast(b_out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _gated_activation_backward_kernel(
    grad_out_ptr,  # [M, N], row stride grad_out_stride
    gate_ptr,  # [M, N], row stride gate_stride
    up_ptr,  # [M, N], row stride up_stride
    grad_gate_ptr,  # [M, N], contiguous
    grad_up_ptr,  # [M, N], contiguous
    M,
    N,
    grad_out_stride,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_gate = grad_out * up * act'(gate); grad_up = grad_out * act(gate).

    Grid: [cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)], column tiles fastest.
    """
    column_tiles = tl.cdiv(N, BLOCK_N)
    i_m = tl.program_id(0) // column_tiles
    i_n = tl.program_id(0) % column_tiles
    rows = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = i_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < M) & (columns < N)
    # [BLOCK_M, BLOCK_N]
    b_grad_out = tl.load(grad_out_ptr + rows * grad_out_stride + columns, mask=mask, other=0.0)
    b_gate = tl.load(gate_ptr + rows * gate_stride + columns, mask=mask, other=0.0)
    b_up = tl.load(up_ptr + rows * up_stride + columns, mask=mask, other=0.0)
    b_grad_out = cast(b_grad_out, tl.float32)
    b_act, b_slope = activate(cast(b_gate, tl.float32), ACTIVATION)
    b_grad_gate = cast(
        b_grad_out * cast(b_up, tl.float32) * b_slope, grad_gate_ptr.dtype.element_ty
    )
    b_grad_up = cast(b_grad_out * b_act, grad_up_ptr.dtype.element_ty)
    tl.store(grad_gate_ptr + rows * N + columns, b_grad_gate, mask=mask)
    tl.store(grad_up_ptr + rows * N + columns, b_grad_up, mask=mask)


def _blocks(n: int) -> dict[str, int]:
    """BLOCK_M and BLOCK_N for rows of length n."""
    columns = min(_TILE_ELEMENTS, next_power_of_2(n))
    return {"BLOCK_M": _TILE_ELEMENTS // columns, "BLOCK_N": columns}


@on_own_device
def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """gate, up [..., N] -> out like gate and contiguous; activation: silu, gelu or gelu_tanh."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel() == 0:
        return out
    gate, up = as_rows(gate), as_rows(up)  # [M, N]
    m, n = gate.shape
    blocks = _blocks(n)
    _gated_activation_kernel[(cdiv(m, blocks["BLOCK_M"]) * cdiv(n, blocks["BLOCK_N"]),)](
        gate,
        up,
        out,
        m,
        n,
        gate.stride(0),
        up.stride(0),
        ACTIVATION=activation,
        num_warps=_NUM_WARPS,
        **COMPILE_OPTIONS,
        **blocks,
    )
    return out


@on_own_device
def gated_activation_backward(
    grad_out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad_out, gate, up [..., N] -> (grad_gate, grad_up) like gate and contiguous."""
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grad_up = torch.empty_like(grad_gate)
    if grad_gate.numel() == 0:
        return grad_gate, grad_up
    grad_out, gate, up = as_rows(grad_out), as_rows(gate), as_rows(up)  # [M, N]
    m, n = gate.shape
    blocks = _blocks(n)
    _gated_activation_backward_kernel[(cdiv(m, blocks["BLOCK_M"]) * cdiv(n, blocks["BLOCK_N"]),)](
        grad_out,
        gate,
        up,
        grad_gate,
        grad_up,
        m,
        n,
        grad_out.stride(0),
        gate.stride(0),
        up.stride(0),
        ACTIVATION=activation,
        num_warps=_NUM_WARPS,
        **COMPILE_OPTIONS,
        **blocks,
    )
    return grad_gate, grad_up


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the arguments of any op of this module."""
    return why_not_tensors(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    cases = []
    blocks = {name: Constant(value) for name, value in _blocks(11008).items()}
    for activation in ("silu", "gelu", "gelu_tanh"):
        shared: dict[str, Constant | str] = {
            "gate_ptr": "*bf16:16",
            "up_ptr": "*bf16:16",
            "M": "i32",
            "N": "i32:16",
            "gate_stride": "i32:16",
            "up_stride": "i32:16",
            "ACTIVATION": Constant(activation),
            **blocks,
        }
        forward = shared | {"out_ptr": "*bf16:16"}
        backward = shared | {
            "grad_out_ptr": "*bf16:16",
            "grad_gate_ptr": "*bf16:16",
            "grad_up_ptr": "*bf16:16",
            "grad_out_stride": "i32:16",
        }
        name = f"bf16 {activation}"
        cases += [
            AheadOfTimeCase(name, _gated_activation_kernel, forward, _NUM_WARPS),
            AheadOfTimeCase(name, _gated_activation_backward_kernel, backward, _NUM_WARPS),
        ]
    return cases
