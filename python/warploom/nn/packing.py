"""Sequences packed one after another: which one a token belongs to, and its place there."""

from __future__ import annotations

import torch
from torch import Tensor


def places(cu_seqlens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of tokens 0 to count - 1 the sequence, int64 [count], and the place in it, from 0, int32 [count].

    cu_seqlens int32 [B + 1]: sequence b is the tokens cu_seqlens[b] to cu_seqlens[b + 1]. Tokens behind
    the last sequence count as its continuation. Nothing is read by the host.
    """
    token = torch.arange(count, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    sequence = sequence.clamp(max=cu_seqlens.shape[0] - 2)
    return sequence, token - cu_seqlens[sequence]
