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
