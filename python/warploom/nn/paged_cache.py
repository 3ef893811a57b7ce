"""Caches in pages that rows take as they grow and give back when they leave."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from warploom.nn.cache import KeyValueCache
from warploom.nn.token_cache import PAGE_SIZE, TokenCache


class PagedCache(TokenCache):
    """A cache whose pages are taken from a common pool as rows grow and go back when rows leave.

    Kwon et al., PagedAttention (arXiv:2309.06180). The lengths are host integers too, so that no step
    waits for the device; the table is sent to it when a row needs a page, at most once in `page_size`
    steps of one token. Pages that a layer's window has left behind are kept.

    Args:
        num_layers: layers that will write.
        batch_size: rows B.
        page_size: tokens of a page, 1 to 256.
        device: where the table and the lengths are.

    Attributes:
        lengths: tokens that each row holds.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        *,
        page_size: int = PAGE_SIZE,
        device: torch.device | str | None = None,
    ) -> None:
        if not 1 <= page_size <= 256:
            raise ValueError(
                f"{type(self).__name__}: page_size: expected 1 to 256, got {page_size}"
            )
        super().__init__(num_layers, batch_size, page_size, device)
        self.lengths = [0] * batch_size
        self._blocks: list[list[int]] = [[] for _ in range(batch_size)]
        self._free: list[int] = []
        self._num_blocks = 0
        self._room = 0  # tokens for which every row has pages
        self._send_table()

    def length_bound(self, count: int) -> int:
        return max(self.lengths, default=0) + count

    def pack(self, lengths: Sequence[int]) -> tuple[Tensor, int]:
        self._reserve(lengths)
        return super().pack(lengths)

    def advance(self, counts: int | Sequence[int]) -> None:
        super().advance(counts)
        if isinstance(counts, int):
            counts = [counts] * len(self.lengths)
        self.lengths = [length + n for length, n in zip(self.lengths, counts, strict=True)]
        self._count_room()

    def select(self, rows: Sequence[int]) -> None:
        """Keeps the given rows, each at most once, in that order; the others' pages become free."""
        if len({*rows}) != len(rows):
            name = type(self).__name__
            raise ValueError(f"{name}: rows: expected distinct ones, got {list(rows)}")
        for row in {*range(len(self._blocks))} - {*rows}:
            self._free += self._blocks[row]
        self.lengths = [self.lengths[row] for row in rows]
        self._blocks = [self._blocks[row] for row in rows]
        index = torch.tensor(rows, dtype=torch.int64, device=self.cache_seqlens.device)
        self.cache_seqlens = self.cache_seqlens[index]
        self._send_table()
        self._count_room()

    def _is_empty(self) -> bool:
        return not any(self.lengths)

    def _count_room(self) -> None:
        held = zip(self._blocks, self.lengths, strict=True)
        rooms = (len(blocks) * self.page_size - length for blocks, length in held)
        self._room = min(rooms, default=0)

    def _reserve(self, counts: Sequence[int]) -> None:
        """Pages for counts[b] more tokens of row b; the pool grows by half at least."""
        pairs = zip(self.lengths, counts, strict=True)
        needed = [-(-(length + count) // self.page_size) for length, count in pairs]
        if all(len(blocks) >= n for blocks, n in zip(self._blocks, needed, strict=True)):
            return
        # One page more for every row, so that the next page_size steps change nothing.
        missing = [max(n + 1 - len(blocks), 0) for blocks, n in zip(self._blocks, needed)]
        absent = sum(missing) - len(self._free)
        if absent > 0:
            grown = self._num_blocks + max(absent, self._num_blocks // 2)
            self._free += range(self._num_blocks, grown)
            self._num_blocks = grown
        for blocks, n in zip(self._blocks, missing):
            blocks += self._free[:n]
            del self._free[:n]
        self._send_table()
        self._count_room()

    def _send_table(self) -> None:
        width = max(map(len, self._blocks), default=0)
        rows = [blocks + [-1] * (width - len(blocks)) for blocks in self._blocks]
        table = torch.tensor(rows, dtype=torch.int32, device=self.cache_seqlens.device)
        self.block_table = table.view(len(rows), width)

    def _pages(self, layer: int, new: Sequence[Tensor], count: int | None) -> tuple[Tensor, ...]:
        if count is not None and count > self._room:
            self._reserve([count] * len(self.lengths))
        held = self._layers[layer]
        if held is not None and held[0].shape[0] == self._num_blocks:
            return held
        shape = (self._num_blocks, self.page_size)
        grown = tuple(tensor.new_empty(*shape, *tensor.shape[2:]) for tensor in new)
        if held is not None:
            for old, larger in zip(held, grown, strict=True):
                larger[: old.shape[0]] = old
        self._layers[layer] = grown
        return grown


class PagedKeyValueCache(KeyValueCache, PagedCache):
    """Keys and values in pages of a common pool; the constructor is `PagedCache`'s."""
