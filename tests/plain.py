"""Each op as plain mathematics in whatever dtype it is given, no upcasts: oracle and yardstick.

In float64 it is what everything is judged against; in a narrow dtype it says what error is usual there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    weight = weight.to(x.dtype)
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) * weight


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    variance = (centered * centered).mean(-1, keepdim=True)
    return centered / torch.sqrt(variance + eps) * weight.to(x.dtype) + bias.to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-12) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + eps)


def apply_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool
) -> Tensor:
    """Multiplication of complex numbers, written out per pair; positions [B, S]."""
    rotary_dim = 2 * cos.shape[1]
    cos = cos[positions].to(x.dtype).unsqueeze(2)
    sin = sin[positions].to(x.dtype).unsqueeze(2)
    out = x.clone()
    if interleaved:
        first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    else:
        first, second = slice(0, rotary_dim // 2), slice(rotary_dim // 2, rotary_dim)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


def geglu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One query head at a time, [B, S, H, D]; returns (out, lse)."""
    queries, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(keys - queries)
    outs, lses = [], []
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head // group].transpose(1, 2) * scale
        scores = scores.masked_fill(~visible, float("-inf"))
        weights = torch.softmax(scores, dim=-1).masked_fill(~visible.any(-1, keepdim=True), 0.0)
        outs.append(weights @ v[:, :, head // group])
        lses.append(torch.logsumexp(scores, dim=-1))
    return torch.stack(outs, dim=2), torch.stack(lses, dim=1)
