"""The layers of rosinality's glow-pytorch with its constructors, calls and state dicts, on our kernels.

`forward` goes from data to latent and returns (out, logdet), logdet [B] here everywhere and None for an
additive coupling; `reverse` returns the data alone. Nothing of glow-pytorch is imported.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warploom.nn.channel_maps import FirstBatch
from warploom.ops.coupling import PRESETS, actnorm, affine_coupling, invertible_1x1, lu_weight


class ActNorm(FirstBatch):
    """scale * (input + loc), set by the first batch."""

    initialized: Tensor

    def __init__(self, in_channel: int, logdet: bool = True) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, in_channel, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, in_channel, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self.logdet = logdet

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        std, mean = torch.std_mean(x, (0, 2, 3), keepdim=True)
        self.loc.copy_(-mean)
        self.scale.copy_(1 / (std + 1e-6))

    def _map(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        scale, loc = self.scale.flatten(), self.loc.flatten()
        return actnorm(x, scale, loc, scale_form="raw", order="add_mul", inverse=inverse)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        self.prepare(input)
        out, log_det = self._map(input, False)
        return (out, log_det) if self.logdet else out

    def reverse(self, output: Tensor) -> Tensor:
        return self._map(output, True)[0]


class InvConv2dLU(nn.Module):
    """A 1x1 convolution by W = P L U."""

    w_p: Tensor
    s_sign: Tensor

    def __init__(self, in_channel: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(in_channel, in_channel))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        above = torch.ones_like(upper).triu(1)
        self.register_buffer("w_p", permutation)
        self.register_buffer("u_mask", above)
        self.register_buffer("l_mask", above.T.contiguous())
        self.register_buffer("s_sign", diagonal.sign())
        self.register_buffer("l_eye", torch.eye(in_channel))
        self.w_l = nn.Parameter(lower)
        self.w_s = nn.Parameter(diagonal.abs().log())
        self.w_u = nn.Parameter(upper.triu(1))

    def _map(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        weight, log_abs_det = lu_weight(self.w_l, self.w_u, self.w_s, self.s_sign, self.w_p)
        return invertible_1x1(x, weight, log_abs_det=log_abs_det, inverse=inverse)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(input, False)

    def reverse(self, output: Tensor) -> Tensor:
        return self._map(output, True)[0]


class InvConv2d(nn.Module):
    """A 1x1 convolution by a full matrix `weight` [C, C, 1, 1]."""

    def __init__(self, in_channel: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(in_channel, in_channel))[0]
        self.weight = nn.Parameter(rotation[:, :, None, None])

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return invertible_1x1(input, self.weight[:, :, 0, 0])

    def reverse(self, output: Tensor) -> Tensor:
        return invertible_1x1(output, self.weight[:, :, 0, 0], inverse=True)[0]


class ZeroConv2d(nn.Module):
    """A 3x3 convolution that starts at zero, with a border of ones and a learned scale exp(3 scale)."""

    def __init__(self, in_channel: int, out_channel: int, padding: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channel, out_channel, 3, padding=0)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.scale = nn.Parameter(torch.zeros(1, out_channel, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(input, (1, 1, 1, 1), value=1.0)) * torch.exp(self.scale * 3)
        return out


class AffineCoupling(nn.Module):
    """(b + t) * sigmoid(u + 2) of the second half of the channels, or b + t."""

    def __init__(self, in_channel: int, filter_size: int = 512, affine: bool = True) -> None:
        super().__init__()
        self.affine = affine
        half = in_channel // 2
        first = nn.Conv2d(half, filter_size, 3, padding=1)
        second = nn.Conv2d(filter_size, filter_size, 1)
        for layer in (first, second):
            nn.init.normal_(layer.weight, 0, 0.05)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        last = ZeroConv2d(filter_size, 2 * half if affine else half)
        self.net = nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True), last)
        self.options: dict[str, Any] = {"scale": "additive"}
        if affine:
            self.options = dict(PRESETS["glow_pytorch"])

    def _map(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        params = self.net(x[:, : x.shape[1] // 2])
        return affine_coupling(x, params, inverse=inverse, **self.options)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        out, log_det = self._map(input, False)
        return out, log_det if self.affine else None

    def reverse(self, output: Tensor) -> Tensor:
        return self._map(output, True)[0]
