"""normflows' layers with its constructors, calls and state dicts, on the kernels of warploom.

As in normflows `forward` goes from latent to data, and both directions return (z, log_det); log_det is [B]
here everywhere. Nothing of normflows is imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from warploom.nn.channel_maps import FirstBatch
from warploom.ops._fakes import statistics_dtype
from warploom.ops.coupling import (
    PRESETS,
    actnorm,
    affine_coupling,
    invertible_1x1,
    lu_weight,
    squeeze,
)

_PRESETS = {
    "exp": "normflows",
    "sigmoid": "normflows_sigmoid",
    "sigmoid_inv": "normflows_sigmoid_inverse",
}


def _zero_log_det(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], dtype=statistics_dtype(x))


def _choices(scale: bool, scale_map: str) -> dict[str, Any]:
    """The keywords of `affine_coupling` for these arguments."""
    if not scale:
        return {"scale": "additive"}
    if scale_map not in _PRESETS:
        raise ValueError(
            f"AffineCoupling: scale_map: expected one of {', '.join(_PRESETS)}, got {scale_map!r}"
        )
    return dict(PRESETS[_PRESETS[scale_map]])


class AffineCoupling(nn.Module):
    """The affine map of z2 with parameters from z1, of a pair [z1, z2]."""

    def __init__(self, param_map: nn.Module, scale: bool = True, scale_map: str = "exp") -> None:
        super().__init__()
        self.param_map = param_map
        self.scale, self.scale_map = scale, scale_map
        self.options = _choices(scale, scale_map)

    def _map(self, z: list[Tensor], inverse: bool) -> tuple[list[Tensor], Tensor]:
        z1, z2 = z
        z2, log_det = affine_coupling(
            z2, self.param_map(z1), mask=0, inverse=inverse, **self.options
        )
        return [z1, z2], log_det

    def forward(self, z: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        return self._map(z, False)

    def inverse(self, z: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        return self._map(z, True)


class AffineCouplingBlock(nn.Module):
    """`AffineCoupling` of the parts of z by `split_mode`, which are not copied where they are channels.

    normflows' checkerboard alternates over the channels too, unlike that of the op.
    """

    def __init__(
        self,
        param_map: nn.Module,
        scale: bool = True,
        scale_map: str = "exp",
        split_mode: str = "channel",
    ) -> None:
        super().__init__()
        modes = ("channel", "channel_inv", "checkerboard", "checkerboard_inv")
        if split_mode not in modes:
            raise ValueError(
                f"AffineCouplingBlock: split_mode: expected one of {', '.join(modes)}, got {split_mode!r}"
            )
        self.split_mode = split_mode
        coupling = AffineCoupling(param_map, scale, scale_map)
        self.flows = nn.ModuleList([nn.Identity(), coupling, nn.Identity()])

    def _map(self, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        coupling = self.flows[1]
        assert isinstance(coupling, AffineCoupling)
        if self.split_mode.startswith("checkerboard"):
            odd = self._odd(z)
            first, second = z.unflatten(-1, (-1, 2)).unbind(-1)
            parts = [torch.where(odd, first, second), torch.where(odd, second, first)]
            (passing, moved), log_det = coupling._map(parts, inverse)
            pairs = (torch.where(odd, passing, moved), torch.where(odd, moved, passing))
            return torch.stack(pairs, -1).flatten(-2), log_det
        kept = z.shape[1] - z.shape[1] // 2
        inverted = self.split_mode == "channel_inv"
        params = coupling.param_map(z[:, kept:] if inverted else z[:, :kept])
        mask = "channel_inverse" if inverted else "channel"
        return affine_coupling(z, params, mask=mask, inverse=inverse, **coupling.options)

    def _odd(self, z: Tensor) -> Tensor:
        """Of each pair of neighbours in a row, whether the first one passes."""
        parity = torch.zeros((), dtype=torch.long, device=z.device)
        for size in z.shape[1:-1]:
            parity = parity[..., None] + torch.arange(size, device=z.device)
        return ((parity + (self.split_mode == "checkerboard_inv")) % 2 == 1)[..., None]

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(z, False)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(z, True)


class MaskedAffineFlow(nn.Module):
    """z where b is 1, z * exp(s(b z)) + t(b z) where it is 0; s and t that are not finite become NaN."""

    b: Tensor

    def __init__(self, b: Tensor, t: nn.Module | None = None, s: nn.Module | None = None) -> None:
        super().__init__()
        if not bool(((b == 0) | (b == 1)).all()):
            raise ValueError("MaskedAffineFlow: b: expected zeros and ones, got other values")
        self.register_buffer("b", b.view(1, *b.shape))
        self.s, self.t = s, t

    def _map(self, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        passing = self.b * z
        # A dimension more keeps the mask of a table free: of one dimension it would be over channels.
        x, moved = z.unsqueeze(-1), (self.b[0] == 0).unsqueeze(-1)
        shift, raw_scale = (
            torch.zeros_like(x) if net is None else _finite(net(passing)).unsqueeze(-1)
            for net in (self.t, self.s)
        )
        out, log_det = affine_coupling(x, (shift, raw_scale), mask=moved, inverse=inverse)
        return out.squeeze(-1), log_det

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(z, False)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(z, True)


def _finite(values: Tensor) -> Tensor:
    return torch.where(torch.isfinite(values), values, float("nan"))


class ActNorm(FirstBatch):
    """z * exp(s) + t for a shape (C, 1, ..., 1), set by the first batch of either direction."""

    flag = "data_dep_init_done"
    data_dep_init_done: Tensor
    s: Tensor
    t: Tensor

    def __init__(self, shape: Any, scale: bool = True, shift: bool = True) -> None:
        super().__init__()
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if any(size != 1 for size in shape[1:]):
            raise ValueError(f"ActNorm: shape: expected (C, 1, ..., 1), got {shape}")
        for name, learned in (("s", scale), ("t", shift)):
            value = torch.zeros(1, *shape)
            if learned:
                setattr(self, name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        self.register_buffer("data_dep_init_done", torch.tensor(0.0))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """From the first batch that `forward` is given, so that it comes out standardised."""
        others = [dim for dim in range(x.dim()) if dim != 1]
        std, mean = torch.std_mean(x, others, keepdim=True)
        self.s.copy_(-torch.log(std + 1e-6))
        self.t.copy_(-mean * torch.exp(self.s))

    def _map(self, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return actnorm(z, self.s.flatten(), self.t.flatten(), inverse=inverse)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self.prepare(z)
        return self._map(z, False)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if not self._known_set and not bool(self.data_dep_init_done):
            self._initialize_inverse(z)
        self._known_set = True
        return self._map(z, True)

    @torch.no_grad()
    def _initialize_inverse(self, z: Tensor) -> None:
        others = [dim for dim in range(z.dim()) if dim != 1]
        std, mean = torch.std_mean(z, others, keepdim=True)
        self.s.copy_(torch.log(std + 1e-6))
        self.t.copy_(mean)
        self.data_dep_init_done.fill_(1)


class Invertible1x1Conv(nn.Module):
    """`inverse`, data to latent, is the product with W = P L U or W."""

    P: Tensor
    sign_S: Tensor

    def __init__(self, num_channels: int, use_lu: bool = False) -> None:
        super().__init__()
        self.num_channels, self.use_lu = num_channels, use_lu
        rotation = torch.linalg.qr(torch.randn(num_channels, num_channels))[0]
        if not use_lu:
            self.W = nn.Parameter(rotation)
            return
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.register_buffer("P", permutation)
        self.L = nn.Parameter(lower)
        self.register_buffer("sign_S", diagonal.sign())
        self.log_S = nn.Parameter(diagonal.abs().log())
        self.U = nn.Parameter(upper.triu(1))
        self.register_buffer("eye", torch.eye(num_channels))

    def _map(self, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if not self.use_lu:
            return invertible_1x1(z, self.W, inverse=inverse)
        weight, log_abs_det = lu_weight(self.L, self.U, self.log_S, self.sign_S, self.P)
        return invertible_1x1(z, weight, log_abs_det=log_abs_det, inverse=inverse)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(z, True)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(z, False)


class Squeeze(nn.Module):
    """`inverse`, data to latent, makes channels of 2 x 2 pixels."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return squeeze(z, 2, inverse=True), _zero_log_det(z)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return squeeze(z, 2), _zero_log_det(z)
