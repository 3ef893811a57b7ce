"""The part of a scale's result that leaves as latent, made standard noise by its prior."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from warploom.models.flows.conditioners import ZeroConv2d
from warploom.ops.coupling import affine_coupling


class GaussianPrior(nn.Module):
    """Mean and log standard deviation of what leaves, given what stays (zeros where nothing stays).

    Returns [B, 2 channels, H, W], mean and log standard deviation in ``layout``'s order. At first both are 0.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        padding: str = "ones",
        layout: str = "shift_scale",
        context_features: int = 0,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.conv = ZeroConv2d(in_channels, 2 * channels, padding)
        if context_features:
            self.context = nn.Linear(context_features, 2 * channels)
            nn.init.zeros_(self.context.weight)
            nn.init.zeros_(self.context.bias)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        params: Tensor = self.conv(x)
        return params if context is None else params + self.context(context)[..., None, None]


class LatentSplit(nn.Module):
    """x [B, C, *spatial] to (first ``kept`` channels, the others as noise, log_det [B]).

    Without a prior the others leave as they are (RealNVP); with one as (x - mean) / standard deviation
    (Glow), which makes the density under the learned Gaussian that of standard noise plus log_det.
    """

    def __init__(self, kept: int, prior: GaussianPrior | None = None) -> None:
        super().__init__()
        self.kept = kept
        self.prior = prior

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        kept, latent = x[:, : self.kept], x[:, self.kept :]
        latent, log_det = self._normalize(kept, latent, context, inverse=True)
        return kept, latent, log_det

    def inverse(
        self, kept: Tensor, latent: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        latent, log_det = self._normalize(kept, latent, context, inverse=False)
        return torch.cat([kept, latent], 1), log_det

    def _normalize(
        self, kept: Tensor, latent: Tensor, context: Tensor | None, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """latent * exp(log sd) + mean, or its inverse."""
        if self.prior is None:
            return latent, latent.new_zeros(len(latent))
        given = kept if self.kept else torch.zeros_like(latent)
        params = self.prior(given, context)
        return affine_coupling(latent, params, mask=0, layout=self.prior.layout, inverse=inverse)
