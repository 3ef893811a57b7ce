"""RealNVP: affine couplings, checkerboard and channel masks, factoring out (arXiv:1605.08803)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from warploom.models.flows.base import Flow, FlowConfig, Scale
from warploom.models.flows.conditioners import ResidualNet
from warploom.models.flows.latent import LatentSplit
from warploom.models.flows.nice import alternating_mask
from warploom.nn.channel_maps import ActNorm, Squeeze
from warploom.nn.conditioners import CouplingMLP
from warploom.nn.coupling import AffineCoupling


@dataclass(kw_only=True)
class RealNVPConfig(FlowConfig):
    """Images: ``num_scales`` scales of ``couplings`` couplings with checkerboard masks, a squeeze, as many
    with channel masks; half of the channels leave after each. The last scale has one checkerboard coupling
    more, no squeeze. The networks have ``num_blocks`` residual blocks of ``hidden_channels``.

    Tables: ``couplings`` couplings that alternate between odd and even features, with networks of
    ``hidden_layers`` layers of ``hidden_features``.

    log s = scale_weight * tanh(u), scale_weight learned per channel, as in the paper. An ``ActNorm`` stands
    before each coupling, where the paper has batch normalisation after it.
    """

    name: ClassVar[str] = "realnvp"

    num_scales: int = 2
    couplings: int = 3
    hidden_channels: int = 64
    num_blocks: int = 4
    hidden_features: int = 64
    hidden_layers: int = 2


class RealNVP(Flow):
    """See ``RealNVPConfig``."""

    def __init__(self, config: RealNVPConfig) -> None:
        is_image = len(config.event_shape) == 3
        super().__init__(config, _image_scales(config) if is_image else [_table_scale(config)])


def _table_scale(config: RealNVPConfig) -> Scale:
    features = config.event_shape[0]
    steps: list[nn.Module] = []
    for index in range(config.couplings):
        mask = alternating_mask(features, index)
        changed = int(mask.sum())
        net = CouplingMLP(
            features - changed,
            config.hidden_features,
            2 * changed,
            depth=config.hidden_layers,
            context_features=config.context_features,
        )
        steps += [ActNorm(features), _coupling(net, mask, changed)]
    return Scale(steps, LatentSplit(0), [features], thrifty=config.reversible)


def _image_scales(config: RealNVPConfig) -> list[Scale]:
    config.check_squeezes(config.num_scales - 1)
    channels, height, width = config.event_shape
    scales = []
    for index in range(config.num_scales):
        last = index == config.num_scales - 1
        steps = []
        for step in range(config.couplings + last):
            mask = ("checkerboard", "checkerboard_inverse")[step % 2]
            steps += _step(config, channels, channels, 2 * channels, mask)
        if not last:
            steps.append(Squeeze())
            channels, height, width = 4 * channels, height // 2, width // 2
            half = channels // 2
            for step in range(config.couplings):
                mask = ("channel", "channel_inverse")[step % 2]
                steps += _step(config, channels, half, 2 * half, mask)
        kept = 0 if last else channels // 2
        shape = (channels - kept, height, width)
        scales.append(Scale(steps, LatentSplit(kept), shape, thrifty=config.reversible))
        channels = kept
    return scales


def _step(
    config: RealNVPConfig, channels: int, in_channels: int, out_channels: int, mask: str
) -> list[nn.Module]:
    net = ResidualNet(
        in_channels,
        out_channels,
        config.hidden_channels,
        config.num_blocks,
        config.context_features,
    )
    return [ActNorm(channels), _coupling(net, mask, out_channels // 2)]


def _coupling(net: nn.Module, mask: str | Tensor, count: int) -> AffineCoupling:
    """log s = w tanh(u), with w learned for each of ``count`` channels."""
    return AffineCoupling(net, mask, scale="tanh", scale_weight=torch.ones(count))
