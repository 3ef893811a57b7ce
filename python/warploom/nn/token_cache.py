"""What a model keeps of the tokens of a batch, in pages; a kind whose shapes never change."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from warploom.nn.packing import places

CacheKind = Literal["paged", "static"]
#: Tokens of one page: a tile of the decoding kernels' keys.
PAGE_SIZE = 64
#: Tokens of one split when decoding. A fixed size, so that a row's bits do not depend on the batch.
SPLIT_SIZE = 256


class TokenCache(ABC):
    """Tensors of every layer for the tokens of a batch whose rows may differ in length.

    A step of a model is: `positions`, every layer's writing and attending, `advance`. The new tokens of a
    step are a tensor [B, count], or rows of unequal length packed one after another, [1, tokens], described
    by `pack`.

    Per layer some tensors of pages [num_blocks, page_size, ...], made when the first tokens arrive. Tokens
    p page_size to (p + 1) page_size of row b lie in block block_table[b, p]; what lies behind a row's
    last token is undefined and never attended to. Not differentiable: decode under `torch.no_grad()`.

    Attributes:
        cache_seqlens: int32 [B], tokens that each row holds, on the device.
        block_table: int32 [B, max_blocks], on the device.
        page_size: tokens of a page.
    """

    block_table: Tensor

    def __init__(
        self, num_layers: int, batch_size: int, page_size: int, device: torch.device | str | None
    ) -> None:
        self.page_size = page_size
        self.cache_seqlens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self._layers: list[tuple[Tensor, ...] | None] = [None] * num_layers

    @abstractmethod
    def length_bound(self, count: int) -> int:
        """A length that no row exceeds with `count` more tokens, known without asking the device."""

    @abstractmethod
    def _pages(self, layer: int, new: Sequence[Tensor], count: int | None) -> tuple[Tensor, ...]:
        """The layer's pages, with room for `count` more tokens a row, or for those of `pack` (None).

        `new` has for each tensor of pages one [*, *, ...] whose features, dtype and device are the pages'.
        """

    @abstractmethod
    def _is_empty(self) -> bool:
        """Whether no row holds a token, as far as the host knows."""

    def advance(self, counts: int | Sequence[int]) -> None:
        """Makes the tokens that every layer has just written part of the rows.

        `counts` may be smaller than what was written: padding at the end of a row is dropped.
        """
        if isinstance(counts, int):
            self.cache_seqlens.add_(counts)
        else:
            added = torch.tensor(counts, dtype=torch.int32, device=self.cache_seqlens.device)
            self.cache_seqlens.add_(added)

    def pack(self, lengths: Sequence[int]) -> tuple[Tensor, int]:
        """cu_seqlens, int32 [B + 1], and max_seqlen of a step that gives row b lengths[b] tokens."""
        bounds = [0]
        for length in lengths:
            bounds.append(bounds[-1] + length)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=self.cache_seqlens.device)
        return cu_seqlens, max(lengths, default=0)

    def positions(self, count: int, cu_seqlens: Tensor | None = None) -> Tensor:
        """int64 positions of the next tokens: [B, count], or packed [1, count] with `cu_seqlens`."""
        if cu_seqlens is None:
            steps = torch.arange(count, device=self.cache_seqlens.device)
            return self.cache_seqlens.unsqueeze(1) + steps
        row, place = places(cu_seqlens, count)
        return (self.cache_seqlens[row] + place).long().unsqueeze(0)

    def _write(self, pages: Sequence[Tensor], new: Sequence[Tensor], cu_seqlens: Tensor) -> None:
        """Copies packed tensors [T, ...], one for each tensor of pages, behind each row's tokens."""
        row, place = places(cu_seqlens, new[0].shape[0])
        position = self.cache_seqlens[row] + place
        block = self.block_table[row, position // self.page_size]
        slots = (block * self.page_size).long() + position % self.page_size
        for held, tokens in zip(pages, new, strict=True):
            held.flatten(0, 1).index_copy_(0, slots, tokens)


class StaticCache(TokenCache):
    """A cache of fixed capacity whose steps have fixed shapes and addresses and ask the host nothing.

    Per layer contiguous tensors [B, capacity, ...], read as pages by a table that never changes. A
    decoding step so compiles once, with `fullgraph=True`, and can be captured in a CUDA graph,
    `advance(1)` included; the first step, which makes the tensors, comes before the capture.
    Nothing can check that a row stays within the capacity: the caller does.

    Args:
        num_layers: layers that will write.
        batch_size: rows B.
        capacity: tokens that a row can hold; rounded up to whole pages of 64.
        device: where the lengths are.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_layers, batch_size, PAGE_SIZE, device)
        width = -(-capacity // PAGE_SIZE)
        self.capacity = width * PAGE_SIZE
        blocks = torch.arange(batch_size * width, dtype=torch.int32, device=device)
        self.block_table = blocks.view(batch_size, width)
        self._fresh = True

    def length_bound(self, count: int) -> int:
        return self.capacity

    def advance(self, counts: int | Sequence[int]) -> None:
        super().advance(counts)
        self._fresh = False

    def reset(self) -> None:
        """Forgets all tokens; the tensors stay where they are."""
        self.cache_seqlens.zero_()
        self._fresh = True

    def _is_empty(self) -> bool:
        return self._fresh

    def _pages(self, layer: int, new: Sequence[Tensor], count: int | None) -> tuple[Tensor, ...]:
        held = self._layers[layer]
        if held is None:
            shape = (self.block_table.numel(), self.page_size)
            held = tuple(tensor.new_empty(*shape, *tensor.shape[2:]) for tensor in new)
            self._layers[layer] = held
        return held
