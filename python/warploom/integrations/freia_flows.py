"""FrEIA's coupling blocks with its constructors, calls and state dicts, on the kernels of warploom.

As in FrEIA a block is called as block((x,), c=(...), rev=False, jac=True) and returns ((y,), log_det), here
log_det [B] always. Nothing of FrEIA is imported; the blocks go into its SequenceINN and GraphINN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from warploom.ops.coupling import PRESETS, affine_coupling, channel_slots

Dims = Sequence[tuple[int, ...]]
Subnet = Callable[[int, int], nn.Module]
Params = Tensor | tuple[Tensor, Tensor]
_SCALES = {"ATAN": "atan", "TANH": "tanh", "SIGMOID": "centered_sigmoid"}


class Block(nn.Module):
    """The dimensions, the condition and the clamp that all blocks have."""

    slots: Tensor

    def __init__(
        self,
        dims_in: Dims,
        dims_c: Dims | None = None,
        clamp: float = 2.0,
        clamp_activation: str | Callable[[Tensor], Tensor] = "ATAN",
        split_len: float | int = 0.5,
    ) -> None:
        super().__init__()
        self.dims_in, self.dims_c = list(dims_in), list(dims_c or [])
        channels = self.dims_in[0][0]
        limit = 1.0 if isinstance(split_len, float) else channels
        if not 0 <= split_len <= limit:
            raise ValueError(
                f"{type(self).__name__}: split_len: expected 0 to {limit}, got {split_len}"
            )
        first = round(channels * split_len) if isinstance(split_len, float) else split_len
        self.split_len1, self.split_len2 = first, channels - first
        if any(tuple(dims[1:]) != tuple(self.dims_in[0][1:]) for dims in self.dims_c):
            raise ValueError(
                f"{type(self).__name__}: dims_c: expected the sizes of {self.dims_in}, got {self.dims_c}"
            )
        self.condition_length = sum(dims[0] for dims in self.dims_c)
        self.clamp, self.clamp_activation = clamp, clamp_activation
        if isinstance(clamp_activation, str) and clamp_activation not in _SCALES:
            raise ValueError(
                f"{type(self).__name__}: clamp_activation: expected one of {', '.join(_SCALES)} or a "
                f"function, got {clamp_activation!r}"
            )
        slots = channel_slots(torch.arange(channels) < first)
        self.register_buffer("slots", slots, persistent=False)

    def _affine(
        self, x: Tensor, params: Params, mask: int | Tensor, rev: bool, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """The affine coupling of x; `mask` says what is transformed."""
        if isinstance(self.clamp_activation, str):
            keywords = {
                **PRESETS["freia"],
                "scale": _SCALES[self.clamp_activation],
                "clamp": self.clamp,
            }
        else:
            raw, shift = params.chunk(2, 1) if isinstance(params, Tensor) else params[::-1]
            params = (shift, self.clamp * self.clamp_activation(raw))
            keywords = {"scale": "exp"}
        return affine_coupling(x, params, mask=mask, inverse=rev, **{**keywords, **options})

    def output_dims(self, input_dims: Dims) -> Dims:
        if len(input_dims) != 1:
            raise ValueError(
                f"{type(self).__name__}: input_dims: expected 1, got {len(input_dims)}"
            )
        return input_dims


def conditioned(x: Tensor, c: Sequence[Tensor]) -> Tensor:
    return torch.cat([x, *c], 1) if len(c) else x


class _TwoSided(Block):
    """x1 is transformed given x2, then x2 given the result."""

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        z, total = x[0], None
        for first in (False, True) if rev else (True, False):
            given = z[:, self.split_len1 :] if first else z[:, : self.split_len1]
            params = self._params(conditioned(given, c), first)
            mask = self.slots if first else self.split_len1
            z, log_det = self._couple(z, params, mask, rev)
            total = log_det if total is None else total + log_det
        assert total is not None
        return (z,), total

    def _params(self, given: Tensor, first: bool) -> Params:
        """Of the transformation of the first or of the second part."""
        subnet: Any = self.subnet2 if first else self.subnet1
        params: Tensor = subnet(given)
        return params

    def _couple(
        self, z: Tensor, params: Params, mask: int | Tensor, rev: bool
    ) -> tuple[Tensor, Tensor]:
        return self._affine(z, params, mask, rev)


class NICECouplingBlock(_TwoSided):
    """Both parts, each shifted by a network of the other."""

    def __init__(
        self,
        dims_in: Dims,
        dims_c: Dims | None = None,
        subnet_constructor: Subnet | None = None,
        split_len: float | int = 0.5,
    ) -> None:
        super().__init__(dims_in, dims_c, split_len=split_len)
        make = needed(self, subnet_constructor)
        self.F = make(self.split_len2 + self.condition_length, self.split_len1)
        self.G = make(self.split_len1 + self.condition_length, self.split_len2)

    def _params(self, given: Tensor, first: bool) -> Params:
        params: Tensor = (self.F if first else self.G)(given)
        return params

    def _couple(
        self, z: Tensor, params: Params, mask: int | Tensor, rev: bool
    ) -> tuple[Tensor, Tensor]:
        return affine_coupling(z, params, mask=mask, scale="additive", inverse=rev)


def needed(block: nn.Module, subnet_constructor: Subnet | None) -> Subnet:
    if subnet_constructor is None:
        raise ValueError(
            f"{type(block).__name__}: subnet_constructor: expected a function, got None"
        )
    return subnet_constructor


class RNVPCouplingBlock(_TwoSided):
    """Both parts by affine maps, with two networks each."""

    def __init__(
        self,
        dims_in: Dims,
        dims_c: Dims | None = None,
        subnet_constructor: Subnet | None = None,
        clamp: float = 2.0,
        clamp_activation: str | Callable[[Tensor], Tensor] = "ATAN",
        split_len: float | int = 0.5,
    ) -> None:
        super().__init__(dims_in, dims_c, clamp, clamp_activation, split_len)
        make = needed(self, subnet_constructor)
        first, second = self.split_len1, self.split_len2
        self.subnet_s1 = make(first + self.condition_length, second)
        self.subnet_t1 = make(first + self.condition_length, second)
        self.subnet_s2 = make(second + self.condition_length, first)
        self.subnet_t2 = make(second + self.condition_length, first)

    def _params(self, given: Tensor, first: bool) -> Params:
        if first:
            return self.subnet_t2(given), self.subnet_s2(given)
        return self.subnet_t1(given), self.subnet_s1(given)


class GLOWCouplingBlock(_TwoSided):
    """Both parts by affine maps, with one network each."""

    def __init__(
        self,
        dims_in: Dims,
        dims_c: Dims | None = None,
        subnet_constructor: Subnet | None = None,
        clamp: float = 2.0,
        clamp_activation: str | Callable[[Tensor], Tensor] = "ATAN",
        split_len: float | int = 0.5,
    ) -> None:
        super().__init__(dims_in, dims_c, clamp, clamp_activation, split_len)
        make = needed(self, subnet_constructor)
        self.subnet1 = make(self.split_len1 + self.condition_length, 2 * self.split_len2)
        self.subnet2 = make(self.split_len2 + self.condition_length, 2 * self.split_len1)


class GINCouplingBlock(GLOWCouplingBlock):
    """A GLOWCouplingBlock whose log-scales have mean 0 over the channels of each place."""

    def _couple(
        self, z: Tensor, params: Params, mask: int | Tensor, rev: bool
    ) -> tuple[Tensor, Tensor]:
        return self._affine(z, params, mask, rev, center="channel")


class AffineCouplingOneSided(Block):
    """The second part by an affine map given the first."""

    def __init__(
        self,
        dims_in: Dims,
        dims_c: Dims | None = None,
        subnet_constructor: Subnet | None = None,
        clamp: float = 2.0,
        clamp_activation: str | Callable[[Tensor], Tensor] = "ATAN",
        split_len: float | int = 0.5,
    ) -> None:
        super().__init__(dims_in, dims_c, clamp, clamp_activation, split_len)
        make = needed(self, subnet_constructor)
        self.subnet = make(self.split_len1 + self.condition_length, 2 * self.split_len2)

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        params = self.subnet(conditioned(x[0][:, : self.split_len1], c))
        z, log_det = self._affine(x[0], params, self.split_len1, rev)
        return (z,), log_det
