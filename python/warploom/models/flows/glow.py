"""Glow: activation norm, invertible 1x1 product, affine coupling (Kingma and Dhariwal, arXiv:1807.03039)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from warploom.models.flows.base import Flow, FlowConfig, Scale
from warploom.models.flows.conditioners import PADDINGS, GlowNet
from warploom.models.flows.latent import GaussianPrior, LatentSplit
from warploom.nn.channel_maps import ActNorm, Invertible1x1, Squeeze
from warploom.nn.coupling import AdditiveCoupling, AffineCoupling


@dataclass(kw_only=True)
class GlowConfig(FlowConfig):
    """``num_scales`` scales of a squeeze and ``depth`` steps; half of the channels leave after each but the
    last, under Gaussians whose parameters are computed from what stays.

    Args:
        hidden_channels: width of the couplings' networks.
        affine: affine couplings (s = sigmoid(u + 2), z = (x + t) s), or additive ones.
        lu: the 1x1 weights as P L U with learned factors, or as full matrices.
        layout: of a coupling's parameters: "scale_shift" (glow-pytorch) or "interleaved" (openai).
        prior_layout: of the learned Gaussians' parameters: "shift_scale", or "interleaved" (openai; the last
            scale's are "shift_scale" there too).
        padding: of the convolutions: "ones" (glow-pytorch), "edge" (openai) or "zeros" (``PaddedConv2d``).
    """

    name: ClassVar[str] = "glow"

    num_scales: int = 3
    depth: int = 32
    hidden_channels: int = 512
    affine: bool = True
    lu: bool = True
    layout: str = "scale_shift"
    prior_layout: str = "shift_scale"
    padding: str = "ones"
    preprocessing: str = "center"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_squeezes(self.num_scales)
        if self.padding not in PADDINGS:
            raise ValueError(
                f"padding: expected one of {', '.join(PADDINGS)}, got {self.padding!r}"
            )


class Glow(Flow):
    """See ``GlowConfig``; ``warploom.convert.glow`` maps the weights of glow-pytorch and openai's."""

    def __init__(self, config: GlowConfig) -> None:
        super().__init__(config, multiscale(config, lambda channels: _coupling(config, channels)))


def _coupling(config: GlowConfig, channels: int) -> nn.Module:
    half = channels // 2
    net = GlowNet(
        channels - half,
        2 * half if config.affine else half,
        config.hidden_channels,
        config.context_features,
        config.padding,
    )
    if not config.affine:
        return AdditiveCoupling(net)
    return AffineCoupling(net, layout=config.layout, scale="sigmoid", order="add_mul")


def multiscale(config: GlowConfig, coupling: Callable[[int], nn.Module]) -> list[Scale]:
    """Glow's scales, with ``coupling(channels)`` as the last part of each step."""
    channels, height, width = config.event_shape
    scales = []
    for index in range(config.num_scales):
        last = index == config.num_scales - 1
        channels, height, width = 4 * channels, height // 2, width // 2
        steps: list[nn.Module] = [Squeeze()]
        for _ in range(config.depth):
            actnorm = ActNorm(channels, order="add_mul")
            steps += [
                Invertible1x1(channels, lu=config.lu, actnorm=actnorm),
                coupling(channels),
            ]
        kept = 0 if last else channels // 2
        new = channels - kept
        prior = GaussianPrior(
            kept or new,
            new,
            padding=config.padding,
            layout="shift_scale" if last else config.prior_layout,
            context_features=config.context_features,
        )
        shape = (new, height, width)
        scales.append(Scale(steps, LatentSplit(kept, prior), shape, thrifty=config.reversible))
        channels = kept
    return scales
