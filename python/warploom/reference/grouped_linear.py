"""A linear map per group of rows in plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def grouped_linear(
    x: Tensor, weight: Tensor, group_offsets: Tensor, batch_invariant: bool
) -> Tensor:
    """out[i] = weight[g] x[i] for the rows group_offsets[g] <= i < group_offsets[g + 1].

    x [M, K], weight [G, N, K], group_offsets int32 [G + 1] rising from 0 -> [M, N]. Rows behind the last
    offset are 0. Sums are taken in at least float32; row by row where `batch_invariant`.
    Source: Gale et al., MegaBlocks (arXiv:2211.15841).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_zeros((x.shape[0], weight.shape[1]))
    bounds = group_offsets.tolist()
    for group, (begin, end) in enumerate(pairwise(bounds)):
        step = 1 if batch_invariant else max(1, end - begin)
        for row in range(begin, end, step):
            rows = slice(row, row + step)
            out[rows] = (x[rows].to(wide) @ weight[group].to(wide).T).to(x.dtype)
    return out


def grouped_linear_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    group_offsets: Tensor,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """grad_x[i] = weight[g]^T grad_out[i], grad_weight[g] = sum over the group's rows of grad_out[i] x[i]^T.

    A gradient that is not asked for is empty. Rows behind the last offset have a grad_x of 0 and add nothing;
    a group without rows has a grad_weight of 0.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_x = x.new_zeros(x.shape if needs_x else 0)
    grad_weight = weight.new_zeros(weight.shape if needs_weight else 0)
    bounds = group_offsets.tolist()
    for group, (begin, end) in enumerate(pairwise(bounds)):
        grad = grad_out[begin:end].to(wide)
        if needs_x:
            grad_x[begin:end] = (grad @ weight[group].to(wide)).to(x.dtype)
        if needs_weight:
            grad_weight[group] = (grad.T @ x[begin:end].to(wide)).to(weight.dtype)
    return grad_x, grad_weight
