"""Where the random numbers of a dropout come from."""

from __future__ import annotations

import torch
from torch import Tensor

from warploom.ops._check import check_device, check_tensor, fail


def dropout_seed(
    op: str, dropout_p: float, seed: Tensor | None, other: str, like: Tensor
) -> Tensor | None:
    """int64 [1] on the device of `like`, the argument named `other`: the seed given, or one drawn from
    torch's generator; None without dropout."""
    if not 0 <= dropout_p < 1:
        fail(op, "dropout_p", "a probability in [0, 1)", dropout_p)
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(2**62, (1,), dtype=torch.int64, device=like.device)
    check_tensor(op, "seed", seed)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        fail(op, "seed", "an int64 tensor of one element", f"{seed.dtype} {tuple(seed.shape)}")
    check_device(op, "seed", seed, other, like)
    return seed.reshape(1)
