"""The assignments of tokens to experts: how many each expert has, and their rows in its order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


def expert_load(experts: Tensor, num_experts: int) -> Tensor:
    """int64 [E]: how many of the assignments go to each expert. Never read by the host."""
    ones = torch.ones_like(experts).flatten()
    return torch.zeros(num_experts, dtype=ones.dtype, device=ones.device).scatter_add_(
        0, experts.flatten(), ones
    )


class _Permute(torch.autograd.Function):
    """Rows in another order. Its gradient is the inverse order: a gather, no atomics."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return x[order]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return permute_rows(grad, inverse, order), None, None


def permute_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x[order] for a permutation `order` of its rows and the one that undoes it."""
    permute: Any = _Permute
    out: Tensor = permute.apply(x, order, inverse)
    return out


class Assignments(NamedTuple):
    """The T k assignments of T tokens, each token's k in a row, and their order by expert.

    Attributes:
        shape: (T, k).
        order: int64 [T k]: row i in the experts' order is assignment order[i].
        inverse: int64 [T k], the permutation that undoes it.
    """

    shape: tuple[int, ...]
    order: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, experts: Tensor) -> Assignments:
        """Of expert numbers int64 [T, k]."""
        order = experts.flatten().argsort(stable=True)
        return cls(tuple(experts.shape), order, order.argsort())

    def spread(self, x: Tensor) -> Tensor:
        """x [T, F] of tokens, or [T, k, F] of assignments -> [T k, F] in the experts' order."""
        rows = x.unsqueeze(1).expand(*self.shape, x.shape[1]) if x.dim() == 2 else x
        return permute_rows(rows.flatten(0, 1), self.order, self.inverse)

    def collect(self, rows: Tensor) -> Tensor:
        """rows [T k, F] in the experts' order -> [T, k, F]."""
        return permute_rows(rows, self.inverse, self.order).view(*self.shape, rows.shape[1])
