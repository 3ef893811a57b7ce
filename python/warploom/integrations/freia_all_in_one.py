"""FrEIA's AllInOneBlock with its constructor, call and state dict, on the kernels of warploom."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warploom.integrations.freia_flows import Block, Dims, Subnet, conditioned, needed
from warploom.ops.coupling import affine_coupling, invertible_1x1


class AllInOneBlock(Block):
    """A coupling, then a scale and offset per channel and a rotation or permutation, in one product.

    The coupling's scale is exp(affine_clamping tanh(a / 10)), its shift a / 10; with `gin_block` its
    log-scales have mean 0 over a sample, and the scale per channel is 1.

    Args:
        dims_in, dims_c, subnet_constructor: as of the other blocks.
        affine_clamping: the largest logarithm of the coupling's scale; default 2.
        gin_block: keep the volume; default False.
        global_affine_init: the first value of the scale per channel; default 1.
        global_affine_type: how it is made positive, "SIGMOID", "SOFTPLUS" (default) or "EXP".
        permute_soft: a rotation in place of a permutation; default False.
        learned_householder_permutation: how many learned reflections follow it; default 0.
        reverse_permutation: undo the matrix before the coupling; default False.
    """

    w_perm: Tensor | None
    w_perm_inv: Tensor | None

    def __init__(
        self,
        dims_in: Dims,
        dims_c: Dims | None = None,
        subnet_constructor: Subnet | None = None,
        affine_clamping: float = 2.0,
        gin_block: bool = False,
        global_affine_init: float = 1.0,
        global_affine_type: str = "SOFTPLUS",
        permute_soft: bool = False,
        learned_householder_permutation: int = 0,
        reverse_permutation: bool = False,
    ) -> None:
        channels, *sizes = dims_in[0]
        super().__init__(dims_in, dims_c, affine_clamping, "TANH", channels - channels // 2)
        firsts: dict[str, Callable[[float], float]] = {
            "SIGMOID": lambda value: 2 - math.log(10 / value - 1),
            "SOFTPLUS": lambda value: 2 * math.log(math.expm1(5 * value)),
            "EXP": math.log,
        }
        if global_affine_type not in firsts:
            raise ValueError(
                f"AllInOneBlock: global_affine_type: expected one of {', '.join(firsts)}, got "
                f"{global_affine_type!r}"
            )
        self.GIN, self.reverse_pre_permute = gin_block, reverse_permutation
        self.global_affine_type = global_affine_type
        ones = [1] * len(sizes)
        first = firsts[global_affine_type](global_affine_init)
        self.global_scale = nn.Parameter(torch.full((1, channels, *ones), first))
        self.global_offset = nn.Parameter(torch.zeros(1, channels, *ones))
        matrix = (
            _rotation(channels) if permute_soft else torch.eye(channels)[torch.randperm(channels)]
        )
        self.householder = learned_householder_permutation
        if self.householder:
            self.vk_householder = nn.Parameter(0.2 * torch.randn(self.householder, channels))
            self.w_0 = nn.Parameter(matrix, requires_grad=False)
        else:
            for name, value in (("w_perm", matrix), ("w_perm_inv", matrix.T.contiguous())):
                kept = nn.Parameter(value.view(channels, channels, *ones), requires_grad=False)
                setattr(self, name, kept)
        make = needed(self, subnet_constructor)
        self.subnet = make(self.split_len1 + self.condition_length, 2 * self.split_len2)

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """The orthogonal matrix [C, C] and its inverse."""
        if not self.householder:
            assert self.w_perm is not None and self.w_perm_inv is not None
            return self.w_perm.flatten(1), self.w_perm_inv.flatten(1)
        matrix = self.w_0
        for vector in self.vk_householder:
            matrix = matrix - 2 * torch.outer(matrix @ vector, vector) / vector.dot(vector)
        return matrix, matrix.T

    def _scale(self) -> Tensor:
        """The scale per channel [C]."""
        raw = self.global_scale.flatten()
        if self.GIN:
            return torch.ones_like(raw)
        if self.global_affine_type == "SIGMOID":
            return 10 * torch.sigmoid(raw - 2)
        return raw.exp() if self.global_affine_type == "EXP" else 0.1 * F.softplus(raw, beta=0.5)

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        z, log_det = x[0], None
        matrix, inverse = self._matrices()
        scale, offset = self._scale(), self.global_offset.flatten()
        no_change = scale.new_zeros(())
        if rev:
            log_scale = scale.log().sum()
            z, log_det = invertible_1x1(
                z, inverse / scale[:, None], bias=-offset / scale, log_abs_det=-log_scale
            )
        elif self.reverse_pre_permute:
            z, _ = invertible_1x1(z, inverse, log_abs_det=no_change)
        params = self.subnet(conditioned(z[:, : self.split_len1], c))
        z, log_det = affine_coupling(
            z,
            params,
            layout="scale_shift",
            scale="tanh",
            clamp=self.clamp,
            params_scale=0.1,
            center="sample" if self.GIN else "none",
            inverse=rev,
            log_det_in=log_det,
        )
        if not rev:
            z, further = invertible_1x1(z, matrix, actnorm=(scale, offset), log_abs_det=no_change)
            log_det = log_det + further
        elif self.reverse_pre_permute:
            z, _ = invertible_1x1(z, matrix, log_abs_det=no_change)
        return (z,), log_det


def _rotation(size: int) -> Tensor:
    """Uniform among the matrices of determinant 1."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    q = q * r.diagonal().sign()
    if torch.linalg.det(q) < 0:
        q = torch.cat((-q[:, :1], q[:, 1:]), 1)
    rotation: Tensor = q.float()
    return rotation
