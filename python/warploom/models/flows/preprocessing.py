"""The fixed map in front of a flow."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PREPROCESSING = ("none", "center", "logit")


class Preprocessing(nn.Module):
    """Data to the flow's input, with the log-determinant of the map.

    - "none": the identity, for standardised tables.
    - "center": x - 1/2, as Glow takes images in [0, 1].
    - "logit": logit(alpha + (1 - 2 alpha) x), for images in [0, 1] (Dinh et al., arXiv:1605.08803, section
      4.1, with the margin alpha at both ends): the model gives no mass to colours far outside.
    """

    def __init__(self, kind: str, alpha: float) -> None:
        super().__init__()
        self.kind = kind
        self.alpha = alpha

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "logit":
            y = torch.logit(self.alpha + (1.0 - 2.0 * self.alpha) * x)
            return y, self._log_slopes(y)
        return (x - 0.5 if self.kind == "center" else x), x.new_zeros(len(x))

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "logit":
            x = (torch.sigmoid(y) - self.alpha) / (1.0 - 2.0 * self.alpha)
            return x, -self._log_slopes(y)
        return (y + 0.5 if self.kind == "center" else y), y.new_zeros(len(y))

    def _log_slopes(self, y: Tensor) -> Tensor:
        """Sum of log dy/dx = log((1 - 2 alpha) / (p (1 - p))) with p = sigmoid(y): [B]."""
        slopes = F.softplus(y) + F.softplus(-y) + math.log1p(-2.0 * self.alpha)
        return slopes.flatten(1).sum(1)
