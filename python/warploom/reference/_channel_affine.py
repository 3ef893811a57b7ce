"""A scale and a shift per channel, forward and backward, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def in_layout_of(values: Tensor, x: Tensor) -> Tensor:
    """In the memory layout of x: channels last where x is so, else contiguous."""
    if x.dim() > 2 and x.stride(1) == 1 and x.stride(-1) != 1:
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    return values.contiguous()


def _wide(value: Tensor, x: Tensor) -> Tensor:
    """In the dtype of arithmetic on x; parameters [C] as [C, 1, ...], which broadcasts against x."""
    wide = value.to(torch.promote_types(x.dtype, torch.float32))
    return wide if value.dim() > 1 else wide.reshape(-1, *(1,) * (x.dim() - 2))


def channel_affine(x: Tensor, scale: Tensor, shift: Tensor, order: str, inverse: bool) -> Tensor:
    """x * scale + shift ("mul_add") or (x + shift) * scale ("add_mul"), or the inverse of either.

    x [B, C, *spatial], scale and shift [C] -> z of x's shape, dtype and layout.
    """
    wide, s, t = (_wide(value, x) for value in (x, scale, shift))
    if order == "mul_add":
        z = (wide - t) / s if inverse else wide * s + t
    else:
        z = wide / s - t if inverse else (wide + t) * s
    return in_layout_of(z.to(x.dtype), x)


def channel_affine_backward(
    grad_z: Tensor, x: Tensor, scale: Tensor, shift: Tensor, order: str, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `channel_affine` with respect to x, scale and shift."""
    upstream, wide, s, t = (_wide(value, x) for value in (grad_z, x, scale, shift))
    if order == "mul_add":
        grad_x = upstream / s if inverse else upstream * s
        grad_scale = -grad_x * ((wide - t) / s) if inverse else upstream * wide
        grad_shift = -grad_x if inverse else upstream
    else:
        grad_x = upstream / s if inverse else upstream * s
        grad_scale = -grad_x * (wide / s) if inverse else upstream * (wide + t)
        grad_shift = -upstream if inverse else grad_x
    others = [dim for dim in range(x.dim()) if dim != 1]
    return (
        in_layout_of(grad_x.to(x.dtype), x),
        grad_scale.sum(others).to(scale.dtype),
        grad_shift.sum(others).to(shift.dtype),
    )
