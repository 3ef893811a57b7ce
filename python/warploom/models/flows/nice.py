"""NICE: additive couplings and one scale per feature (Dinh, Krueger and Bengio, arXiv:1410.8516)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from warploom.models.flows.base import Flow, FlowConfig, Scale
from warploom.models.flows.latent import LatentSplit
from warploom.nn.conditioners import CouplingMLP
from warploom.nn.coupling import AdditiveCoupling


@dataclass(kw_only=True)
class NICEConfig(FlowConfig):
    """``couplings`` alternate between odd and even features; the paper's networks have 5 layers of 1000."""

    name: ClassVar[str] = "nice"

    couplings: int = 4
    hidden_features: int = 1000
    hidden_layers: int = 5
    prior: str = "logistic"


class Flatten(nn.Module):
    """[B, *shape] to [B, D]."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z.unflatten(1, self.shape), z.new_zeros(len(z))


class DiagonalScaling(nn.Module):
    """z = x exp(log_scale) per feature: what a volume-preserving flow cannot do (section 3.3)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), self.log_scale.sum().expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z * (-self.log_scale).exp(), -self.log_scale.sum().expand(len(z))


class NICE(Flow):
    """Images are flattened. See ``NICEConfig``."""

    def __init__(self, config: NICEConfig) -> None:
        features = math.prod(config.event_shape)
        steps: list[nn.Module] = [Flatten(config.event_shape)]
        for index in range(config.couplings):
            mask = alternating_mask(features, index)
            changed = int(mask.sum())
            net = CouplingMLP(
                features - changed,
                config.hidden_features,
                changed,
                depth=config.hidden_layers,
                context_features=config.context_features,
            )
            steps.append(AdditiveCoupling(net, mask))
        steps.append(DiagonalScaling(features))
        super().__init__(
            config, [Scale(steps, LatentSplit(0), [features], thrifty=config.reversible)]
        )


def alternating_mask(features: int, index: int) -> Tensor:
    """Bool [features]: the odd features are transformed, or the even ones where ``index`` is odd."""
    return (torch.arange(features) + index) % 2 == 1
