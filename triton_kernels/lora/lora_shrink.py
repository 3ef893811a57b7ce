"""drop(x) A^T, and its gradients."""

from __future__ import annotations

import torch
from warploom.triton_kernels.common.launch import on_own_device, why_not_tensors
from warploom.triton_kernels.lora.outer_product import outer_product
from warploom.triton_kernels.lora.shrink_product import shrink_product
from warploom.triton_kernels.lora.two_phase_product import Update, two_phase_product


@on_own_device
def lora_shrink(
    x: torch.Tensor, lora_a: torch.Tensor, seed: torch.Tensor | None, dropout_p: float
) -> torch.Tensor:
    """x [M, K], lora_a [R, K] in x's dtype or float32 -> [M, R], contiguous."""
    return shrink_product(x, lora_a, 1.0, seed, dropout_p)


@on_own_device
def lora_shrink_backward(
    grad_shrunk: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    needs_x: bool,
    needs_a: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad_shrunk [M, R] -> (grad_x like x, grad_a like lora_a), contiguous; empty if not needed."""
    grad_x, grad_a = x.new_empty(0), lora_a.new_empty(0)
    if needs_x:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        two_phase_product(grad_x, Update(grad_shrunk, lora_a, 1.0, seed, dropout_p), None)
    if needs_a:
        grad_a = outer_product(grad_shrunk, x, lora_a.dtype, 1.0, seed, dropout_p)
    return grad_x, grad_a


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the arguments of any op of this module."""
    return why_not_tensors(*args)
