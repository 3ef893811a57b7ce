"""Convolutional networks for couplings. Their last layers start at zero: the coupling is the identity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PADDINGS = ("zeros", "ones", "edge")


class PaddedConv2d(nn.Conv2d):
    """A 3x3 convolution that keeps the size; the border is "zeros", "ones", or "edge".

    "edge" pads with zeros and appends a channel that is 1 on the border alone.
    """

    def __init__(self, in_channels: int, out_channels: int, padding: str) -> None:
        if padding not in PADDINGS:
            raise ValueError(f"padding: expected one of {', '.join(PADDINGS)}, got {padding!r}")
        super().__init__(in_channels + (padding == "edge"), out_channels, 3)
        self.border = padding

    def forward(self, x: Tensor) -> Tensor:
        border = (1, 1, 1, 1)
        padded = F.pad(x, border, value=1.0 if self.border == "ones" else 0.0)
        if self.border == "edge":
            edge = F.pad(x.new_zeros(len(x), 1, *x.shape[2:]), border, value=1.0)
            padded = torch.cat([padded, edge], 1)
        return super().forward(padded)


class ZeroConv2d(nn.Module):
    """A 3x3 convolution that starts at zero, times exp(3 scale) per channel (Glow, section 3.3)."""

    def __init__(self, in_channels: int, out_channels: int, padding: str = "ones") -> None:
        super().__init__()
        self.conv = PaddedConv2d(in_channels, out_channels, padding)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.scale = nn.Parameter(torch.zeros(1, out_channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(x) * torch.exp(3.0 * self.scale)
        return result


class GlowNet(nn.Module):
    """Convolutions 3x3, 1x1, 3x3 with ReLU between them (Glow, section 4); the context biases the first."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        context_features: int = 0,
        padding: str = "ones",
    ) -> None:
        super().__init__()
        first = PaddedConv2d(in_channels, hidden_channels, "edge" if padding == "edge" else "zeros")
        middle = nn.Conv2d(hidden_channels, hidden_channels, 1)
        for layer in (first, middle):
            nn.init.normal_(layer.weight, std=0.05)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        last = ZeroConv2d(hidden_channels, out_channels, padding)
        self.net = nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last)
        if context_features:
            self.context = nn.Linear(context_features, hidden_channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = self.net[0](x)
        if context is not None:
            hidden = hidden + self.context(context)[..., None, None]
        result: Tensor = self.net[1:](hidden)
        return result


class ResidualNet(nn.Module):
    """A convolution, blocks x + conv(relu(conv(relu(x)))), and a convolution (RealNVP, section 3.4).

    Without the paper's weight and batch normalisation: the flow's own ``ActNorm`` layers normalise.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        num_blocks: int,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, hidden_channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(hidden_channels, hidden_channels, 1),
            )
            for _ in range(num_blocks)
        )
        self.last = ZeroConv2d(hidden_channels, out_channels, "zeros")
        if context_features:
            self.context = nn.Linear(context_features, hidden_channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = self.first(x)
        if context is not None:
            hidden = hidden + self.context(context)[..., None, None]
        for block in self.blocks:
            hidden = hidden + block(hidden)
        result: Tensor = self.last(torch.relu(hidden))
        return result
