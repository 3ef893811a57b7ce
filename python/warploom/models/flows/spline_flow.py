"""Neural spline flow, rational-quadratic couplings (Durkan et al., arXiv:1906.04032)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from warploom.models.flows.base import Flow, Scale
from warploom.models.flows.conditioners import GlowNet
from warploom.models.flows.glow import GlowConfig, multiscale
from warploom.models.flows.latent import LatentSplit
from warploom.nn.channel_maps import Invertible1x1
from warploom.nn.conditioners import CouplingMLP
from warploom.nn.coupling import SplineCoupling


@dataclass(kw_only=True)
class SplineFlowConfig(GlowConfig):
    """Splines of ``num_bins`` bins on [-tail_bound, tail_bound], the identity outside.

    Tables (standardised): ``depth`` couplings each after an LU product, with networks of
    ``hidden_layers`` layers of ``hidden_features``.
    Images: Glow's scales with spline couplings (section 5.3), networks of ``hidden_channels``.
    """

    name: ClassVar[str] = "spline"

    depth: int = 4
    num_bins: int = 8
    tail_bound: float = 3.0
    hidden_features: int = 64
    hidden_layers: int = 2
    hidden_channels: int = 64
    preprocessing: str = "none"

    def check_squeezes(self, num_scales: int) -> None:
        if len(self.event_shape) == 3:
            super().check_squeezes(num_scales)

    @property
    def params_per_element(self) -> int:
        """Widths, heights, and the slopes at the inner knots."""
        return 3 * self.num_bins - 1


class SplineFlow(Flow):
    """See ``SplineFlowConfig``."""

    def __init__(self, config: SplineFlowConfig) -> None:
        if len(config.event_shape) == 1:
            super().__init__(config, [_table_scale(config)])
        else:
            super().__init__(
                config, multiscale(config, lambda channels: _image_coupling(config, channels))
            )


def _table_scale(config: SplineFlowConfig) -> Scale:
    features = config.event_shape[0]
    half = features // 2
    steps: list[nn.Module] = []
    for _ in range(config.depth):
        net = CouplingMLP(
            features - half,
            config.hidden_features,
            half * config.params_per_element,
            depth=config.hidden_layers,
            context_features=config.context_features,
        )
        steps += [Invertible1x1(features, lu=config.lu), _coupling(config, net)]
    return Scale(steps, LatentSplit(0), [features], thrifty=config.reversible)


def _image_coupling(config: SplineFlowConfig, channels: int) -> nn.Module:
    half = channels // 2
    net = GlowNet(
        channels - half,
        half * config.params_per_element,
        config.hidden_channels,
        config.context_features,
        config.padding,
    )
    return _coupling(config, net)


def _coupling(config: SplineFlowConfig, net: nn.Module) -> nn.Module:
    return SplineCoupling(
        net, num_bins=config.num_bins, tails="linear", tail_bound=config.tail_bound
    )
