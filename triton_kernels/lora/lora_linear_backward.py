"""Gradients of a linear map with a low-rank update."""

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
from warploom.triton_kernels.common.numerics import cast
from warploom.triton_kernels.common.reduce import sum_partials
from warploom.triton_kernels.lora.outer_product import outer_product
from warploom.triton_kernels.lora.shrink_product import shrink_product
from warploom.triton_kernels.lora.two_phase_product import Base, Update, two_phase_product
from warploom.triton_kernels.lora.weight_tile import StoredWeight

_BLOCK_M = 32
_BLOCK_N = 64
_NUM_WARPS = 4
_MAX_PARTIALS = 64


@triton.jit(do_not_specialize=["M", "P"])
def _scale_backward_kernel(
    grad_out_ptr,  # [M, N], row stride grad_out_stride
    column_scale_ptr,  # [N] float32, or None
    unscaled_ptr,  # [M, N], row stride unscaled_stride, or None
    grad_ptr,  # [M, N], contiguous, or None without column_scale
    scale_partials_ptr,  # [P, N] float32, contiguous, or None without unscaled
    bias_partials_ptr,  # [P, N] float32, contiguous, or None
    M,
    N,
    P,
    grad_out_stride,
    unscaled_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad = column_scale grad_out; of the program's rows, scale_partials[p] = sum of grad_out
    unscaled and bias_partials[p] = sum of grad_out.

    Grid: [cdiv(N, BLOCK_N), P]; program (n, p) takes the row tiles p, p + P, ...
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    part = tl.program_id(1)
    column_mask = columns < N
    b_scale_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    b_bias_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for tile in range(part, tl.cdiv(M, BLOCK_M), P):
        rows = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        mask = (rows < M) & column_mask
        p_grad_out = grad_out_ptr + rows * grad_out_stride + columns
        b_grad_out = cast(tl.load(p_grad_out, mask=mask, other=0.0), tl.float32)
        if column_scale_ptr is not None:
            b_scale = tl.load(column_scale_ptr + columns, mask=column_mask, other=0.0)
            b_grad = cast(b_grad_out * b_scale, grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + rows * N + columns, b_grad, mask=mask)
        if unscaled_ptr is not None:
            p_unscaled = unscaled_ptr + rows * unscaled_stride + columns
            b_unscaled = tl.load(p_unscaled, mask=mask, other=0.0)
            b_scale_sum += b_grad_out * cast(b_unscaled, tl.float32)
        b_bias_sum += b_grad_out
    partials = part.to(tl.int64) * N + columns
    if unscaled_ptr is not None:
        b_sum = tl.sum(b_scale_sum, axis=0, keep_dims=True)
        tl.store(scale_partials_ptr + partials, b_sum, mask=column_mask)
    if bias_partials_ptr is not None:
        b_sum = tl.sum(b_bias_sum, axis=0, keep_dims=True)
        tl.store(bias_partials_ptr + partials, b_sum, mask=column_mask)


def _scale_backward(
    grad_out: torch.Tensor,
    column_scale: torch.Tensor | None,
    unscaled: torch.Tensor | None,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_out [M, N] -> (column_scale grad_out, grad_column_scale float32, grad_bias).

    Empty sums where `unscaled` is None, where the bias needs no gradient. Deterministic: partial sums
    of a number that the shape alone decides, added in a fixed order in float32.
    """
    m, n = grad_out.shape
    device = grad_out.device
    programs = max(1, min(cdiv(m, _BLOCK_M), _MAX_PARTIALS))

    def partials(needed: bool) -> torch.Tensor | None:
        shape = (programs, n)
        return torch.empty(shape, dtype=torch.float32, device=device) if needed else None

    grad = (
        grad_out
        if column_scale is None
        else torch.empty((m, n), dtype=grad_out.dtype, device=device)
    )
    scale_partials, bias_partials = partials(unscaled is not None), partials(needs_bias)
    if n > 0:
        unscaled = None if unscaled is None else with_unit_last_stride(unscaled)
        _scale_backward_kernel[(cdiv(n, _BLOCK_N), programs)](
            grad_out,
            None if column_scale is None else column_scale.contiguous(),
            unscaled,
            None if column_scale is None else grad,
            scale_partials,
            bias_partials,
            m,
            n,
            programs,
            grad_out.stride(0),
            0 if unscaled is None else unscaled.stride(0),
            BLOCK_M=_BLOCK_M,
            BLOCK_N=_BLOCK_N,
            num_warps=_NUM_WARPS,
            **COMPILE_OPTIONS,
        )
    empty = grad_out.new_empty(0)
    return (
        grad,
        empty.float() if scale_partials is None else sum_partials(scale_partials, torch.float32),
        empty if bias_partials is None else sum_partials(bias_partials, grad_out.dtype),
    )


@on_own_device
def lora_linear_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    shrunk: torch.Tensor | None,
    seed: torch.Tensor | None,
    unscaled: torch.Tensor | None,
    weight_format: str,
    scaling: float,
    dropout_p: float,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    needs_a: bool,
    needs_b: bool,
    needs_column_scale: bool,
    needs_shrunk: bool,
) -> tuple[torch.Tensor, ...]:
    """grad_out [M, N] -> gradients of x, weight, bias, lora_a, lora_b, column_scale and shrunk, like
    them and contiguous; empty where not needed.
    """
    grad = with_unit_last_stride(grad_out)
    grad_bias, grad_column_scale = x.new_empty(0), x.new_empty(0, dtype=torch.float32)
    if needs_bias or column_scale is not None:
        grad, grad_column_scale, grad_bias = _scale_backward(
            grad, column_scale, unscaled if needs_column_scale else None, needs_bias
        )
    grad_x, grad_weight, grad_shrunk = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    grad_a = (x if lora_a is None else lora_a).new_empty(0)
    grad_b = (x if lora_b is None else lora_b).new_empty(0)
    update = None
    if lora_b is not None and shrunk is not None:
        if needs_b:
            grad_b = outer_product(grad, shrunk, lora_b.dtype, scaling)
        if needs_shrunk or (lora_a is not None and (needs_a or needs_x)):
            inner = shrink_product(grad, lora_b.mT, scaling)
            if needs_shrunk:
                grad_shrunk = inner
            if lora_a is not None:
                update = Update(inner, lora_a, 1.0, seed, dropout_p)
                if needs_a:
                    grad_a = outer_product(inner, x, lora_a.dtype, 1.0, seed, dropout_p)
    if needs_x:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        base = Base(grad, StoredWeight(weight, weight_scale, weight_format), transposed=False)
        two_phase_product(grad_x, update, base)
    if needs_weight:
        grad_weight = outer_product(grad, x, weight.dtype)
    return grad_x, grad_weight, grad_bias, grad_a, grad_b, grad_column_scale, grad_shrunk


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the op's arguments; a quantised weight comes as bytes."""
    return why_not_tensors(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    cases = []
    for name in ("bf16", "fp32"):
        arguments: dict[str, Constant | str] = {
            "grad_out_ptr": f"*{name}:16",
            "column_scale_ptr": "*fp32:16",
            "unscaled_ptr": f"*{name}:16",
            "grad_ptr": f"*{name}:16",
            "scale_partials_ptr": "*fp32:16",
            "bias_partials_ptr": "*fp32:16",
            "M": "i32",
            "N": "i32:16",
            "P": "i32",
            "grad_out_stride": "i32:16",
            "unscaled_stride": "i32:16",
            "BLOCK_M": Constant(_BLOCK_M),
            "BLOCK_N": Constant(_BLOCK_N),
        }
        cases.append(AheadOfTimeCase(name, _scale_backward_kernel, arguments, _NUM_WARPS))
    return cases
