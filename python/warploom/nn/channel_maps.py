"""Invertible layers beside couplings: activation norm, 1x1 products, squeezing.

Each layer is a pair `forward(x, context=None) -> (z, log_det)`, data to latent, and
`inverse(z, context=None) -> (x, log_det)`, with log_det [B] in float32 (float64 beside float64).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from warploom.ops._fakes import statistics_dtype
from warploom.ops.coupling import actnorm, invertible_1x1, lu_weight, squeeze


class FirstBatch(nn.Module, ABC):
    """A layer whose parameters the first batch sets; the buffer named `flag` says whether it has.

    The buffer is read from the device once, at the first use and after loading a state dict.
    """

    flag = "initialized"
    _known_set = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known_set = False

    @abstractmethod
    def initialize(self, x: Tensor) -> None:
        """Sets the parameters from x [B, C, *spatial]."""

    def prepare(self, x: Tensor) -> None:
        """Initialises from x where that has not been done."""
        if self._known_set:
            return
        flag = getattr(self, self.flag)
        if not bool(flag):
            self.initialize(x)
            flag.fill_(1)
        self._known_set = True


class ActNorm(FirstBatch):
    """A scale and a shift per channel, set by the first batch in training to mean 0 and variance 1.

    z = exp(log_scale) * x + shift ("mul_add") or exp(log_scale) * (x + shift) ("add_mul"). The buffer
    `initialized` says whether they have been set. Ranks that see different data set different
    parameters: run one batch before wrapping the model for data parallelism.

    Args:
        features: C.
        order: "mul_add" (default) or "add_mul".
        eps: added to the standard deviation; default 1e-6.

    Source: Kingma and Dhariwal, Glow (2018), section 3.1.
    """

    initialized: Tensor

    def __init__(
        self,
        features: int,
        *,
        order: str = "mul_add",
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features, self.order, self.eps = features, order, eps
        self.log_scale = nn.Parameter(torch.zeros(features, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.zeros(features, device=device, dtype=dtype))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool, device=device))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Sets the parameters so that each channel of x [B, C, *spatial] comes out standardised."""
        others = [dim for dim in range(x.dim()) if dim != 1]
        if x.numel() < 2 * self.features:
            raise ValueError(
                f"ActNorm: x: expected at least 2 values a channel to initialise from, got shape "
                f"{tuple(x.shape)}"
            )
        wide = x.to(statistics_dtype(x))
        std, mean = torch.std_mean(wide, others, correction=0)
        scale = 1 / (std + self.eps)
        self.log_scale.copy_(scale.log())
        self.shift.copy_(-mean if self.order == "add_mul" else -mean * scale)

    def prepare(self, x: Tensor) -> None:
        """Initialises from x where that is due: in training, once."""
        if self.training:
            super().prepare(x)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The layer as (scale, shift) of scale * x + shift."""
        scale = self.log_scale.exp()
        return scale, self.shift * scale if self.order == "add_mul" else self.shift

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.prepare(x)
        return actnorm(x, self.log_scale, self.shift, order=self.order)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return actnorm(z, self.log_scale, self.shift, order=self.order, inverse=True)

    def extra_repr(self) -> str:
        return f"{self.features}, order={self.order!r}"


class Invertible1x1(nn.Module):
    """z = W x at each place, W [C, C] drawn as a rotation.

    Args:
        features: C.
        lu: keep W as P L U with P fixed (parameters `lower`, `upper`, `log_diagonal`, buffers `sign`,
            `permutation`), whose determinant costs nothing; False keeps `weight` itself. Default True.
        actnorm: an `ActNorm` before the product, folded into it: one pass for both.

    Source: Kingma and Dhariwal, Glow (2018), section 3.2.
    """

    sign: Tensor
    permutation: Tensor

    def __init__(
        self,
        features: int,
        *,
        lu: bool = True,
        actnorm: ActNorm | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features, self.lu, self.actnorm = features, lu, actnorm
        rotation = torch.linalg.qr(torch.randn(features, features, dtype=torch.float64))[0]

        def parameter(value: Tensor) -> nn.Parameter:
            dense = torch.empty(value.shape, device=device, dtype=dtype)
            return nn.Parameter(dense.copy_(value))

        if not lu:
            self.weight = parameter(rotation)
            return
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.lower = parameter(lower.tril(-1))
        self.upper = parameter(upper.triu(1))
        self.log_diagonal = parameter(diagonal.abs().log())
        self.register_buffer("sign", parameter(diagonal.sign()).detach())
        self.register_buffer("permutation", parameter(permutation).detach())

    def weight_and_log_abs_det(self) -> tuple[Tensor, Tensor | None]:
        """W, and log |det W| where it is known."""
        if not self.lu:
            return self.weight, None
        return lu_weight(self.lower, self.upper, self.log_diagonal, self.sign, self.permutation)

    def _map(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        weight, log_abs_det = self.weight_and_log_abs_det()
        before = None if self.actnorm is None else self.actnorm.scale_and_shift()
        return invertible_1x1(x, weight, actnorm=before, log_abs_det=log_abs_det, inverse=inverse)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.actnorm is not None:
            self.actnorm.prepare(x)
        return self._map(x, False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(z, True)

    def extra_repr(self) -> str:
        return f"{self.features}, lu={self.lu}"


class Squeeze(nn.Module):
    """Blocks of factor x factor pixels become channels, as `warploom.ops.coupling.squeeze`; log_det is 0."""

    def __init__(self, factor: int = 2, *, order: str = "channel_major") -> None:
        super().__init__()
        self.factor, self.order = factor, order

    def _map(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        z = squeeze(x, self.factor, order=self.order, inverse=inverse)
        return z, x.new_zeros(x.shape[0], dtype=statistics_dtype(x))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(x, False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(z, True)

    def extra_repr(self) -> str:
        return f"{self.factor}, order={self.order!r}"
