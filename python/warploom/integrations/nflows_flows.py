"""nflows' transforms with its constructors, calls and state dicts, on the kernels of warploom.

As in nflows `forward(inputs, context=None)` goes from data to noise and returns (outputs, logabsdet [B]),
`inverse` likewise. Nothing of nflows is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warploom.nn.channel_maps import FirstBatch
from warploom.ops._fakes import statistics_dtype
from warploom.ops.coupling import (
    PRESETS,
    actnorm,
    affine_coupling,
    channel_slots,
    invertible_1x1,
    lu_weight,
    rational_quadratic_spline,
    spline_coupling,
    squeeze,
)


class AffineCouplingTransform(nn.Module):
    """A coupling where `mask` is above 0; the others go to `transform_net(identity, context)`.

    `unconditional_transform(features=...)` makes a transform of the features that pass.
    """

    identity_features: Tensor
    transform_features: Tensor
    slots: Tensor
    unconditional_transform: Any
    #: The keywords of `affine_coupling`, and how many parameters a feature has.
    options: Mapping[str, Any] = PRESETS["nflows"]
    multiplier = 2

    def __init__(
        self,
        mask: Any,
        transform_net_create_fn: Callable[[int, int], nn.Module],
        unconditional_transform: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        mask = torch.as_tensor(mask)
        if mask.dim() != 1 or not mask.numel():
            raise ValueError(
                f"{type(self).__name__}: mask: expected one dimension with at least one element, got "
                f"shape {tuple(mask.shape)}"
            )
        moved = mask > 0
        self.features = len(moved)
        self.register_buffer("identity_features", (~moved).nonzero()[:, 0])
        self.register_buffer("transform_features", moved.nonzero()[:, 0])
        self.register_buffer("slots", channel_slots(moved), persistent=False)
        passing, changed = len(self.identity_features), len(self.transform_features)
        self.transform_net = transform_net_create_fn(passing, changed * self.multiplier)
        self.unconditional_transform = (
            None if unconditional_transform is None else unconditional_transform(features=passing)
        )

    def _map(self, inputs: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if inputs.dim() not in (2, 4) or inputs.shape[1] != self.features:
            raise ValueError(
                f"{type(self).__name__}: inputs: expected 2 or 4 dimensions and {self.features} features, "
                f"got shape {tuple(inputs.shape)}"
            )
        identity = inputs.index_select(1, self.identity_features)
        further: Any = None
        if self.unconditional_transform is not None and inverse:
            identity, further = self.unconditional_transform.inverse(identity, context)
        params = self.transform_net(identity, context)
        outputs, log_det = self._couple(inputs, params, inverse)
        if self.unconditional_transform is not None:
            if not inverse:
                identity, further = self.unconditional_transform(identity, context)
            outputs = outputs.index_copy(1, self.identity_features, identity)
            log_det = log_det + further
        return outputs, log_det

    def _couple(self, inputs: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return affine_coupling(inputs, params, mask=self.slots, inverse=inverse, **self.options)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(inputs, context, False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(inputs, context, True)


class AdditiveCouplingTransform(AffineCouplingTransform):
    """The coupling without a scale."""

    options = MappingProxyType({"scale": "additive"})
    multiplier = 1


class PiecewiseRationalQuadraticCouplingTransform(AffineCouplingTransform):
    """The coupling by rational-quadratic splines.

    The logits of widths and heights are divided by the square root of `transform_net.hidden_features` or
    `.hidden_channels`, where it has one. With `apply_unconditional_transform` the features that pass get
    splines of their own, [features, *img_shape].
    """

    moved: Tensor

    def __init__(
        self,
        mask: Any,
        transform_net_create_fn: Callable[[int, int], nn.Module],
        num_bins: int = 10,
        tails: str | None = None,
        tail_bound: float = 1.0,
        apply_unconditional_transform: bool = False,
        img_shape: Sequence[int] | None = None,
        min_bin_width: float = 1e-3,
        min_bin_height: float = 1e-3,
        min_derivative: float = 1e-3,
    ) -> None:
        self.multiplier = 3 * num_bins + (-1 if tails == "linear" else 1)
        spline = {
            "num_bins": num_bins,
            "tails": tails,
            "tail_bound": None if tails is None else tail_bound,
            "min_bin_width": min_bin_width,
            "min_bin_height": min_bin_height,
            "min_derivative": min_derivative,
        }

        def unconditional(features: int) -> nn.Module:
            return _Splines([features, *(img_shape or [])], self.multiplier, spline)

        super().__init__(
            mask, transform_net_create_fn, unconditional if apply_unconditional_transform else None
        )
        self.register_buffer("moved", self.slots >= 0, persistent=False)
        hidden = getattr(
            self.transform_net,
            "hidden_features",
            getattr(self.transform_net, "hidden_channels", 1),
        )
        self.options = {**spline, "logit_scale": 1 / math.sqrt(hidden)}

    def _couple(self, inputs: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return spline_coupling(inputs, params, mask=self.moved, inverse=inverse, **self.options)


class _Splines(nn.Module):
    """A spline of every element of a sample, with parameters that depend on nothing."""

    def __init__(self, shape: Sequence[int], multiplier: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        bins = options["num_bins"]
        self.unnormalized_widths = nn.Parameter(torch.rand(*shape, bins))
        self.unnormalized_heights = nn.Parameter(torch.rand(*shape, bins))
        self.unnormalized_derivatives = nn.Parameter(torch.rand(*shape, multiplier - 2 * bins))
        self.options = options

    def _map(self, inputs: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        logits = torch.cat(
            (self.unnormalized_widths, self.unnormalized_heights, self.unnormalized_derivatives), -1
        )
        params = logits.to(inputs.dtype).expand(len(inputs), *logits.shape)
        out, log_det = rational_quadratic_spline(inputs, params, inverse=inverse, **self.options)
        return out, log_det.flatten(1).sum(1)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(inputs, False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(inputs, True)


class ActNorm(FirstBatch):
    """exp(log_scale) * inputs + shift, set by the first batch in training."""

    initialized: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("initialized", torch.tensor(False))
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.shift = nn.Parameter(torch.zeros(features))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        others = [dim for dim in range(x.dim()) if dim != 1]
        std, mean = torch.std_mean(x, others)
        self.log_scale.copy_(-torch.log(std))
        self.shift.copy_(-mean / std)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training:
            self.prepare(inputs)
        return actnorm(inputs, self.log_scale, self.shift)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return actnorm(inputs, self.log_scale, self.shift, inverse=True)


class _Permutation(nn.Module):
    _permutation: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("_permutation", torch.randperm(features))


class OneByOneConvolution(nn.Module):
    """L U of the permuted channels, plus a bias, in one product.

    `using_cache` is taken for nflows' sake: the matrix is made of its factors in every call.
    """

    def __init__(
        self, num_channels: int, using_cache: bool = False, identity_init: bool = True
    ) -> None:
        super().__init__()
        self.features, self.eps = num_channels, 1e-3
        entries = num_channels * (num_channels - 1) // 2
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.lower_entries = nn.Parameter(torch.zeros(entries))
        self.upper_entries = nn.Parameter(torch.zeros(entries))
        self.unconstrained_upper_diag = nn.Parameter(
            torch.full((num_channels,), math.log(math.expm1(1 - self.eps)))
        )
        self.permutation = _Permutation(num_channels)
        if not identity_init:
            bound = 1 / math.sqrt(num_channels)
            for value in (self.lower_entries, self.upper_entries, self.unconstrained_upper_diag):
                nn.init.uniform_(value, -bound, bound)

    def _map(self, inputs: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        size = self.features
        lower, upper = (self.bias.new_zeros(size, size) for _ in range(2))
        below = torch.tril_indices(size, size, -1, device=lower.device)
        above = torch.triu_indices(size, size, 1, device=lower.device)
        lower = lower.index_put((below[0], below[1]), self.lower_entries)
        upper = upper.index_put((above[0], above[1]), self.upper_entries)
        log_diagonal = torch.log(F.softplus(self.unconstrained_upper_diag) + self.eps)
        weight, log_abs_det = lu_weight(lower, upper, log_diagonal, torch.ones_like(log_diagonal))
        weight = weight.index_select(1, torch.argsort(self.permutation._permutation))
        return invertible_1x1(
            inputs, weight, bias=self.bias, log_abs_det=log_abs_det, inverse=inverse
        )

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(inputs, False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(inputs, True)


class SqueezeTransform(nn.Module):
    """Blocks of factor x factor pixels become channels."""

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        if not isinstance(factor, int) or factor <= 1:
            raise ValueError(f"SqueezeTransform: factor: expected an integer > 1, got {factor}")
        self.factor = factor

    def get_output_shape(self, c: int, h: int, w: int) -> tuple[int, int, int]:
        return c * self.factor**2, h // self.factor, w // self.factor

    def _map(self, inputs: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        log_det = inputs.new_zeros(len(inputs), dtype=statistics_dtype(inputs))
        return squeeze(inputs, self.factor, inverse=inverse), log_det

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(inputs, False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(inputs, True)
