"""Rotary position embedding (Su et al. 2021, eq. 34) in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    conjugate: bool,
) -> Tensor:
    """Turn the first R of x's D channels, pair by pair, by the angle of the token's position.

    x [B, S, H, D]; cos, sin [P, R/2]; positions [B, S] or None for 0..S-1.
    (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin); `conjugate` turns the other way.
    Pairs are (2i, 2i+1) when interleaved, else (i, i + R/2).
    """
    sequence, rotary_dim = x.shape[1], 2 * cos.shape[1]
    if positions is None:
        cos, sin = cos[:sequence].unsqueeze(0), sin[:sequence].unsqueeze(0)
    else:
        cos, sin = cos[positions.long()], sin[positions.long()]
    wide = x if x.dtype == torch.float64 else x.float()
    cos, sin = cos.unsqueeze(2).to(wide.dtype), sin.unsqueeze(2).to(wide.dtype)
    if conjugate:
        sin = -sin
    turned, rest = wide[..., :rotary_dim], wide[..., rotary_dim:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        pair = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        rotated = pair.flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((rotated, rest), dim=-1).to(x.dtype).contiguous()
