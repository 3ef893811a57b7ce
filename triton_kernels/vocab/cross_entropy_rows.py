"""Cross-entropy of rows of logits, which are replaced by their gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.attention.scoring import tanh
from warploom.triton_kernels.common.launch import (
    COMPILE_OPTIONS,
    AheadOfTimeCase,
    Constant,
    next_power_of_2,
    on_own_device,
    warp_count,
    why_not_tensors,
)
from warploom.triton_kernels.common.numerics import cast

# Columns that a program holds at a time.
_MAX_BLOCK = 8192


@triton.jit
def _capped(b_logits, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        return tanh(b_logits / softcap) * softcap
    else:
        return b_logits


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_rows_kernel(
    logits_ptr,  # [M, N], contiguous; replaced where GRADIENTS
    targets_ptr,  # [M] int64
    row_scale_ptr,  # [M] float32, or None: 1
    loss_ptr,  # [M] float32
    N,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    SOFTCAP: tl.constexpr,
    GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """z = logits or softcap tanh(logits / softcap), lse = log sum_j exp(z_j);

    loss = lse - (1 - label_smoothing) z_target - label_smoothing mean_j z_j + z_loss lse^2. A target outside
    the row makes it NaN. Grid: [M].
    """
    row = tl.program_id(0).to(tl.int64)
    p_logits = logits_ptr + row * N
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENTS:
            b_zero = cast(tl.zeros([BLOCK], dtype=tl.float32), logits_ptr.dtype.element_ty)
            for start in range(0, N, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                tl.store(p_logits + columns, b_zero, mask=columns < N)
    else:
        inside = (target >= 0) & (target < N)
        at_target = cast(tl.load(p_logits + target, mask=inside, other=float("nan")), tl.float32)
        at_target = _capped(at_target, softcap, SOFTCAP)
        # Online: the sum is scaled down whenever a block raises the maximum.
        maximum = -float("inf")
        exponentials = 0.0
        total = 0.0
        for start in range(0, N, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            # [BLOCK]
            b_logits = tl.load(p_logits + columns, mask=columns < N, other=0.0)
            b_z = _capped(cast(b_logits, tl.float32), softcap, SOFTCAP)
            total += tl.sum(tl.where(columns < N, b_z, 0.0), axis=0)
            b_z = tl.where(columns < N, b_z, -float("inf"))
            raised = tl.maximum(maximum, tl.max(b_z, axis=0))
            # All logits so far may be -infinity.
            shift = tl.where(raised == -float("inf"), 0.0, raised)
            exponentials = exponentials * tl.exp(maximum - shift)
            exponentials += tl.sum(tl.exp(b_z - shift), axis=0)
            maximum = raised
        # Differences to the maximum keep the digits that those to the log-sum-exp would lose.
        log_sum = tl.log(exponentials)
        lse = maximum + log_sum
        loss = log_sum + (1.0 - label_smoothing) * (maximum - at_target) + z_loss * lse * lse
        if label_smoothing > 0.0:
            loss += label_smoothing * (maximum - total / N)
        tl.store(loss_ptr + row, loss)
        if GRADIENTS:
            # The logit of the target was read above by every thread, before any writes.
            tl.debug_barrier()
            scale = 1.0
            if row_scale_ptr is not None:
                scale = tl.load(row_scale_ptr + row)
            for start in range(0, N, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                b_logits = tl.load(p_logits + columns, mask=columns < N, other=0.0)
                b_z = _capped(cast(b_logits, tl.float32), softcap, SOFTCAP)
                b_probability = tl.exp(b_z - maximum - log_sum)
                b_grad = b_probability * (1.0 + 2.0 * z_loss * lse) - label_smoothing / N
                b_grad -= tl.where(columns == target, 1.0 - label_smoothing, 0.0)
                if SOFTCAP:
                    b_grad *= 1.0 - (b_z / softcap) * (b_z / softcap)
                b_grad = cast(b_grad * scale, logits_ptr.dtype.element_ty)
                tl.store(p_logits + columns, b_grad, mask=columns < N)


def _block(n: int) -> int:
    return min(_MAX_BLOCK, next_power_of_2(n))


@on_own_device
def cross_entropy_rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    row_scale: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    gradients: bool,
) -> torch.Tensor:
    """logits [M, N] contiguous, targets int64 [M], row_scale float32 [M] or None -> loss float32 [M]."""
    m, n = logits.shape
    loss = torch.empty(m, dtype=torch.float32, device=logits.device)
    if m > 0:
        block = _block(n)
        _cross_entropy_rows_kernel[(m,)](
            logits,
            targets.contiguous(),
            None if row_scale is None else row_scale.contiguous(),
            loss,
            n,
            ignore_index,
            label_smoothing,
            z_loss,
            softcap,
            SOFTCAP=softcap != 0,
            GRADIENTS=gradients,
            BLOCK=block,
            num_warps=warp_count(block),
            **COMPILE_OPTIONS,
        )
    return loss


def why_not(*args: object) -> list[str]:
    """What this kernel cannot do with the arguments of `cross_entropy_rows` or of the ops made of it."""
    return why_not_tensors(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    block = _block(32000)
    arguments: dict[str, Constant | str] = {
        "logits_ptr": "*bf16:16",
        "targets_ptr": "*i64:16",
        "row_scale_ptr": "*fp32:16",
        "loss_ptr": "*fp32:16",
        "N": "i32:16",
        "ignore_index": "i32",
        "label_smoothing": "fp32",
        "z_loss": "fp32",
        "softcap": "fp32",
        "SOFTCAP": Constant(False),
        "GRADIENTS": Constant(True),
        "BLOCK": Constant(block),
    }
    warps = warp_count(block)
    capped = arguments | {"SOFTCAP": Constant(True), "row_scale_ptr": Constant(None)}
    return [
        AheadOfTimeCase("bf16", _cross_entropy_rows_kernel, arguments, warps),
        AheadOfTimeCase("bf16 soft-cap", _cross_entropy_rows_kernel, capped, warps),
    ]
