"""A scale and a shift per channel, forward and backward, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def _wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype that arithmetic happens in: float64 stays, everything else is float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _along_channels(value: Tensor, x: Tensor) -> Tensor:
    """[C] -> [C, 1, ...], which broadcasts against x [B, C, *spatial]."""
    return value.to(_wide_dtype(x)).reshape(-1, *(1,) * (x.dim() - 2))


def channel_affine(x: Tensor, scale: Tensor, shift: Tensor, order: str, inverse: bool) -> Tensor:
    """x * scale + shift ("mul_add") or (x + shift) * scale ("add_mul"), or the inverse of either.

    x [B, C, *spatial], scale and shift [C] -> z of x's shape and dtype, contiguous.
    """
    wide = x.to(_wide_dtype(x))
    s, t = _along_channels(scale, x), _along_channels(shift, x)
    if order == "mul_add":
        z = (wide - t) / s if inverse else wide * s + t
    else:
        z = wide / s - t if inverse else (wide + t) * s
    return z.to(x.dtype).contiguous()


def channel_affine_backward(
    grad_z: Tensor, x: Tensor, scale: Tensor, shift: Tensor, order: str, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `channel_affine` with respect to x, scale and shift."""
    wide, upstream = x.to(_wide_dtype(x)), grad_z.to(_wide_dtype(x))
    s, t = _along_channels(scale, x), _along_channels(shift, x)
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
        grad_x.to(x.dtype).contiguous(),
        grad_scale.sum(others).to(scale.dtype),
        grad_shift.sum(others).to(shift.dtype),
    )
