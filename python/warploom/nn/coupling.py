"""Coupling layers: an invertible map of one half of x whose parameters are a network of the other half.

Each layer is a pair `forward(x, context=None) -> (z, log_det)`, data to latent, and
`inverse(z, context=None) -> (x, log_det)`, with log_det [B] in float32 (float64 beside float64).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from warploom.ops._autocast import without_autocast
from warploom.ops.coupling import PRESETS, affine_coupling, channel_slots, spline_coupling

Mask = str | int | Tensor
Params = Tensor | tuple[Tensor, Tensor]


def _options(op: Callable[..., Any], *own: str) -> set[str]:
    """The keywords of `op` that its module hands through."""
    return set(inspect.signature(op).parameters) - {"x", "params", "mask", "inverse", *own}


_AFFINE_OPTIONS = _options(affine_coupling, "scale_weight", "log_det_in", "out")
_SPLINE_OPTIONS = _options(spline_coupling, "num_bins")


def _check_options(name: str, options: dict[str, Any], known: set[str]) -> None:
    if unknown := set(options) - known:
        raise TypeError(
            f"{name}: options: expected {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}"
        )


class Coupling(nn.Module, ABC):
    """The conditioner of a coupling, and what of x it sees.

    For a mask over channels the conditioner is given the channels that pass, [B, C - k, *spatial]; for a
    checkerboard or a free mask x with zeros at the transformed places. `mask` is as in
    `warploom.ops.coupling.affine_coupling`: what is transformed.

    Args:
        conditioner: a module of that input, and of the context where one is given, that returns the
            parameters: a tensor, or a pair (shift, raw scale).
        mask: default "channel".
    """

    mask_tensor: Tensor | None
    passing_channels: Tensor | None
    #: The keywords of the op.
    options: dict[str, Any]

    def __init__(self, conditioner: nn.Module, mask: Mask = "channel") -> None:
        super().__init__()
        self.conditioner = conditioner
        self.mask = None if isinstance(mask, Tensor) else mask
        moved = mask.bool() if isinstance(mask, Tensor) else None
        by_channel = moved is not None and moved.dim() == 1
        passing = (~moved).nonzero()[:, 0] if moved is not None and by_channel else None
        self.register_buffer("mask_tensor", moved, persistent=False)
        self.register_buffer("passing_channels", passing, persistent=False)

    @property
    def where(self) -> Mask:
        """The mask as the op takes it."""
        if self.mask is not None:
            return self.mask
        assert self.mask_tensor is not None
        return self.mask_tensor

    def passing(self, x: Tensor) -> Tensor:
        """What the conditioner sees of x, which the coupling leaves as it is."""
        mask, channels = self.mask, x.shape[1]
        if self.passing_channels is not None:
            return x.index_select(1, self.passing_channels)
        if mask == "channel":
            return x[:, : channels - channels // 2]
        if mask == "channel_inverse":
            return x[:, channels - channels // 2 :]
        if isinstance(mask, int):
            return x[:, :mask]
        if self.mask_tensor is not None:
            return x.masked_fill(self.mask_tensor, 0)
        rows, columns = (torch.arange(size, device=x.device) for size in x.shape[-2:])
        odd = (rows[:, None] + columns) % 2 == 1
        return x.masked_fill(odd if mask == "checkerboard" else ~odd, 0)

    def params(self, x: Tensor, context: Tensor | None) -> Params:
        """The conditioner's parameters in x's dtype, which autocast does not change."""
        passing = self.passing(x)
        out = self.conditioner(passing) if context is None else self.conditioner(passing, context)
        if isinstance(out, tuple):
            return out[0].to(x.dtype), out[1].to(x.dtype)
        params: Tensor = out.to(x.dtype)
        return params

    @abstractmethod
    def transform(self, x: Tensor, params: Params, inverse: bool) -> tuple[Tensor, Tensor]:
        """(z, log_det) of x with these parameters."""

    def _map(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        params = self.params(x, context)
        with without_autocast(x):
            return self.transform(x, params, inverse)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(x, context, False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(z, context, True)

    def extra_repr(self) -> str:
        mask = "a tensor" if self.mask is None else repr(self.mask)
        return ", ".join(
            [f"mask={mask}", *(f"{key}={value!r}" for key, value in self.options.items())]
        )


class AffineCoupling(Coupling):
    """`warploom.ops.coupling.affine_coupling` with the parameters of a conditioner.

    Args:
        conditioner, mask: see `Coupling`.
        preset: a name of `warploom.ops.coupling.PRESETS`, whose keywords `options` override.
        scale_weight: [k] or [1], the first value of the learned weight of scale "tanh".
        options: keywords of the op, from `layout` to `backend`.

    Source: Dinh, Sohl-Dickstein and Bengio, Density estimation using Real NVP (2017), section 3.2.
    """

    slots: Tensor | None

    def __init__(
        self,
        conditioner: nn.Module,
        mask: Mask = "channel",
        *,
        preset: str | None = None,
        scale_weight: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(conditioner, mask)
        if preset is not None and preset not in PRESETS:
            raise ValueError(
                f"AffineCoupling: preset: expected one of {', '.join(PRESETS)}, got {preset!r}"
            )
        _check_options("AffineCoupling", options, _AFFINE_OPTIONS)
        moved, by_channel = self.mask_tensor, self.passing_channels is not None
        slots = channel_slots(moved) if moved is not None and by_channel else None
        self.register_buffer("slots", slots, persistent=False)
        self.options = {**(PRESETS[preset] if preset is not None else {}), **options}
        self.scale_weight = None if scale_weight is None else nn.Parameter(scale_weight)

    def transform(self, x: Tensor, params: Params, inverse: bool) -> tuple[Tensor, Tensor]:
        return affine_coupling(
            x,
            params,
            mask=self.where if self.slots is None else self.slots,
            scale_weight=self.scale_weight,
            inverse=inverse,
            **self.options,
        )


class AdditiveCoupling(AffineCoupling):
    """An `AffineCoupling` without a scale: z = x + t at the transformed places, log_det = 0.

    Args:
        conditioner: see `Coupling`; it returns the shift alone, [B, k, *spatial].
        mask: default "channel".

    Source: Dinh, Krueger and Bengio, NICE (2015), section 3.2.
    """

    def __init__(self, conditioner: nn.Module, mask: Mask = "channel", **options: Any) -> None:
        super().__init__(conditioner, mask, scale="additive", **options)


class SplineCoupling(Coupling):
    """`warploom.ops.coupling.spline_coupling` with the logits of a conditioner.

    Args:
        conditioner: see `Coupling`; it returns [B, k M, *spatial] or [B, k, M, *spatial], M = 3 num_bins - 1
            for linear tails, 3 num_bins for circular ones, 3 num_bins + 1 without.
        mask: over channels; default "channel".
        num_bins: of each spline.
        options: keywords of the op, from `tails` to `backend`.

    Source: Durkan et al., Neural Spline Flows (2019), section 3.
    """

    def __init__(
        self, conditioner: nn.Module, mask: Mask = "channel", *, num_bins: int, **options: Any
    ) -> None:
        super().__init__(conditioner, mask)
        _check_options("SplineCoupling", options, _SPLINE_OPTIONS)
        self.options = {"num_bins": num_bins, **options}

    def transform(self, x: Tensor, params: Params, inverse: bool) -> tuple[Tensor, Tensor]:
        if isinstance(params, tuple):
            raise TypeError("SplineCoupling: conditioner: expected one tensor, got a pair")
        return spline_coupling(x, params, mask=self.where, inverse=inverse, **self.options)
