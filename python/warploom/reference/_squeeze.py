"""Blocks of pixels that become channels, and back, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from warploom.reference._channel_affine import in_layout_of


def squeeze(x: Tensor, factor: int, order: str, inverse: bool) -> Tensor:
    """[B, C, H, W] -> [B, C f^2, H / f, W / f], or with `inverse` back; dense in x's layout.

    Pixel (dy, dx) of a block of channel c is channel c f^2 + dy f + dx of "channel_major", channel
    (dy f + dx) C + c of "position_major".
    """
    channel_first = order == "channel_major"
    if inverse:
        sizes = (-1, factor, factor) if channel_first else (factor, factor, -1)
        blocks = x.unflatten(1, sizes)  # [B, C, f, f, H, W] or [B, f, f, C, H, W]
        c, dy, dx = (1, 2, 3) if channel_first else (3, 1, 2)
        return in_layout_of(blocks.permute(0, c, 4, dy, 5, dx).flatten(2, 3).flatten(3, 4), x)
    blocks = x.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))  # [B, C, H / f, f, W / f, f]
    parts = (1, 3, 5) if channel_first else (3, 5, 1)
    return in_layout_of(blocks.permute(0, *parts, 2, 4).flatten(1, 3), x)
