"""Networks that give a coupling its parameters; their last layer starts at zero, the coupling as identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _at_zero(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class CouplingMLP(nn.Module):
    """Linear layers with ReLU between them: [B, in_features] -> [B, out_features].

    Args:
        in_features, out_features: of the passing half, and of the coupling's parameters.
        hidden_features: the width of the hidden layers.
        depth: how many hidden layers; default 2.
        context_features: the size of the context [B, context_features], concatenated to the input;
            default 0, no context.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        *,
        depth: int = 2,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_features + context_features
        for _ in range(depth):
            layers += [nn.Linear(width, hidden_features), nn.ReLU()]
            width = hidden_features
        self.net = nn.Sequential(*layers, _at_zero(nn.Linear(width, out_features)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        out: Tensor = self.net(x if context is None else torch.cat((x, context), 1))
        return out


class CouplingConvNet(nn.Module):
    """Glow's convolutions of sizes 3, 1 and 3: [B, in_channels, H, W] -> [B, out_channels, H, W].

    Args:
        in_channels, out_channels: of the passing half, and of the coupling's parameters.
        hidden_channels: the width of the two hidden layers.
        context_channels: of the context [B, context_channels] or [B, context_channels, H, W],
            concatenated to the input; default 0, no context.

    Source: Kingma and Dhariwal, Glow (2018), section 3.3.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        *,
        context_channels: int = 0,
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(in_channels + context_channels, hidden_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden_channels, hidden_channels, 1),
            nn.ReLU(),
            _at_zero(nn.Conv2d(hidden_channels, out_channels, 3, padding=1)),
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None:
            if context.dim() == 2:
                context = context[:, :, None, None].expand(-1, -1, *x.shape[2:])
            x = torch.cat((x, context), 1)
        out: Tensor = self.net(x)
        return out
