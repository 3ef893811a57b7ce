"""RMSNorm and LayerNorm over the last dimension, forward and backward, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """The dtype that arithmetic happens in: float64 stays, everything else is float32."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """out = x * rstd * weight, rstd = (mean(x^2) + eps)^-1/2 (Zhang and Sennrich 2019, eq. 4).

    x [..., N], weight [N] -> out [..., N] in x's dtype, rstd [...] in float32.
    """
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out = (wide * rstd * weight.to(wide.dtype)).to(x.dtype)
    return out.contiguous(), rstd.squeeze(-1).contiguous()


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of sum = x + residual; the sum is rounded to x's dtype before it is normalised."""
    total = (_wide(x) + _wide(residual)).to(x.dtype).contiguous()
    out, rstd = rms_norm(total, weight, eps)
    return out, total, rstd


def rms_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad_sum: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm`; `grad_sum` is what reaches x past the norm (the residual stream)."""
    wide = _wide(x)
    scale = rstd.unsqueeze(-1).to(wide.dtype)
    normalized = wide * scale
    upstream = _wide(grad_out)
    weighted = upstream * weight.to(wide.dtype)
    grad_x = scale * (weighted - normalized * (weighted * normalized).mean(-1, keepdim=True))
    if grad_sum is not None:
        grad_x = grad_x + _wide(grad_sum)
    grad_weight = (upstream * normalized).reshape(-1, x.shape[-1]).sum(0)
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(weight.dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """out = (x - mean) * rstd * weight + bias with the biased variance (Ba et al. 2016, eq. 4)."""
    wide = _wide(x)
    mean = wide.mean(-1, keepdim=True)
    centered = wide - mean
    rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    out = centered * rstd * weight.to(wide.dtype) + bias.to(wide.dtype)
    return (
        out.to(x.dtype).contiguous(),
        mean.squeeze(-1).contiguous(),
        rstd.squeeze(-1).contiguous(),
    )


def layer_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `layer_norm` with respect to x, weight and bias."""
    wide = _wide(x)
    scale = rstd.unsqueeze(-1).to(wide.dtype)
    normalized = (wide - mean.unsqueeze(-1).to(wide.dtype)) * scale
    upstream = _wide(grad_out)
    weighted = upstream * weight.to(wide.dtype)
    projection = (weighted * normalized).mean(-1, keepdim=True)
    grad_x = scale * (weighted - weighted.mean(-1, keepdim=True) - normalized * projection)
    columns = x.shape[-1]
    grad_weight = (upstream * normalized).reshape(-1, columns).sum(0)
    grad_bias = upstream.reshape(-1, columns).sum(0)
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def l2_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """out = x * rnorm, rnorm = (sum(x^2) + eps)^-1/2: rows of unit length.

    x [..., N] -> out [..., N] in x's dtype, rnorm [...] in float32.
    """
    wide = _wide(x)
    rnorm = torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)
    return (wide * rnorm).to(x.dtype).contiguous(), rnorm.squeeze(-1).contiguous()


def l2_norm_backward(grad_out: Tensor, x: Tensor, rnorm: Tensor) -> Tensor:
    """grad_x = rnorm * (grad_out - n * sum(grad_out * n)), n = x * rnorm."""
    wide, upstream = _wide(x), _wide(grad_out)
    scale = rnorm.unsqueeze(-1).to(wide.dtype)
    normalized = wide * scale
    projection = (upstream * normalized).sum(-1, keepdim=True)
    return (scale * (upstream - normalized * projection)).to(x.dtype).contiguous()
