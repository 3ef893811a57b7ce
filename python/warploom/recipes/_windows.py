"""The order in which a run reads its tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The source of an epoch's order."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


class Windows:
    """Windows of ``length`` + 1 tokens, every one of them once an epoch, in an order of its own
    each epoch.

    The window at a position is a function of the seed and the position alone, so that a run
    continues where it stopped from one integer. Each epoch cuts the stream at another offset.
    """

    def __init__(self, tokens: Tensor, length: int, seed: int) -> None:
        if len(tokens) < 2 * length:
            raise ValueError(
                f"Windows: tokens: expected at least {2 * length} (two windows), got {len(tokens)}"
            )
        self.tokens = tokens
        self.length = length
        self.seed = seed
        self.per_epoch = (len(tokens) - length) // length
        self._epoch = -1
        self._starts = torch.empty(0, dtype=torch.int64)

    def batch(self, position: int, size: int) -> Tensor:
        """int64 [size, length + 1]: the windows at ``position``, ``position`` + 1, and so on."""
        starts = [self._start(index) for index in range(position, position + size)]
        return torch.stack(
            [self.tokens[start : start + self.length + 1] for start in starts]
        ).long()

    def _start(self, position: int) -> int:
        epoch, index = divmod(position, self.per_epoch)
        if epoch != self._epoch:
            generator = epoch_generator(self.seed, epoch)
            offset = torch.randint(self.length, (1,), generator=generator)
            self._starts = (
                torch.randperm(self.per_epoch, generator=generator) * self.length + offset
            )
            self._epoch = epoch
        return int(self._starts[index])


def spread_windows(tokens: Tensor, length: int, count: int) -> Tensor:
    """int64 [min(count, windows), length + 1]: windows at equal distances over the whole stream."""
    available = (len(tokens) - 1) // length
    if available == 0:
        raise ValueError(
            f"spread_windows: tokens: expected at least {length + 1}, got {len(tokens)}"
        )
    count = min(count, available)
    starts = [available * index // count * length for index in range(count)]
    return torch.stack([tokens[start : start + length + 1] for start in starts]).long()
