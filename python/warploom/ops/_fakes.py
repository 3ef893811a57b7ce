"""Outputs without data, for the ops' fakes."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """x's shape and dtype, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Where row statistics are kept: float32, float64 beside float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def dense_like_lines(shape: torch.Size, like: Tensor) -> Tensor:
    """Contiguous of that shape and the dtype of `like`, or dense with channels last where `like` is so.

    `like` [B, C, *spatial] is so where the channels of a pixel are neighbours in memory.
    """
    if like.dim() > 2 and like.stride(1) == 1 and like.stride(-1) != 1:
        return like.new_empty(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return like.new_empty(shape)
