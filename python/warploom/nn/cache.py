"""Caches of keys and values that attention decodes from; one whose shapes never change."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from warploom.nn.packing import places
from warploom.ops.attention import attention_decode, attention_varlen

#: Keys of one page: a tile of the decoding kernels' keys.
PAGE_SIZE = 64
#: Keys of one split when decoding. A fixed size, so that a row's bits do not depend on the batch.
_SPLIT_SIZE = 256
#: New tokens of a row up to which decoding serves better than prefill, whose tiles hold 64 queries or more.
_DECODE_QUERIES = 8


class KeyValueCache(ABC):
    """Keys and values of every layer for a batch whose rows may differ in length.

    A step of a model is: `positions`, `attend` in every layer, `advance`. The new tokens of a step are a
    tensor [B, count], or rows of unequal length packed one after another, [1, tokens], described by `pack`.

    Per layer two tensors of pages [num_blocks, page_size, H_kv, D], made when the first keys arrive.
    Tokens p page_size to (p + 1) page_size of row b lie in block block_table[b, p]; what lies behind a
    row's last token is undefined and never attended to. Not differentiable: decode under `torch.no_grad()`.

    Attributes:
        cache_seqlens: int32 [B], tokens that each row holds, on the device.
        block_table: int32 [B, max_blocks], on the device.
        page_size: keys of a page.
    """

    block_table: Tensor

    def __init__(
        self, num_layers: int, batch_size: int, page_size: int, device: torch.device | str | None
    ) -> None:
        self.page_size = page_size
        self.cache_seqlens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    @abstractmethod
    def length_bound(self, count: int) -> int:
        """A length that no row exceeds with `count` more tokens, known without asking the device."""

    @abstractmethod
    def _pages(self, layer: int, k: Tensor, v: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
        """The layer's pages, with room for `count` more tokens a row, or for those of `pack` (None)."""

    def advance(self, counts: int | Sequence[int]) -> None:
        """Makes the tokens that every layer has just written part of the rows.

        `counts` may be smaller than what was written: padding at the end of a row is dropped.
        """
        if isinstance(counts, int):
            self.cache_seqlens.add_(counts)
        else:
            added = torch.tensor(counts, dtype=torch.int32, device=self.cache_seqlens.device)
            self.cache_seqlens.add_(added)

    def _is_empty(self) -> bool:
        """Whether no row holds a token, as far as the host knows."""
        return False

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

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int = 0,
        window: Sequence[int] = (-1, -1),
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Writes k and v behind each row's tokens and attends causally to all of them, in one call.

        q [B, S, H, D], k and v [B, S, H_kv, D] -> [B, S, H, D]; with the cu_seqlens and max_seqlen of
        `pack` the B S tokens are those of the rows one after another.
        """
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
            raise RuntimeError(
                f"{type(self).__name__}: expected tensors that need no gradient, got one that does: "
                "a cache is not differentiable, use torch.no_grad()"
            )
        batch, count = q.shape[:2]
        pages = self._pages(layer, k, v, count if cu_seqlens is None else None)
        features: dict[str, Any] = {"window": window, "softcap": softcap, "sinks": sinks}
        out: Tensor
        if cu_seqlens is None and count <= _DECODE_QUERIES:
            features |= {"k": k, "v": v, "split_size": _SPLIT_SIZE}
            out = attention_decode(q, *pages, self.cache_seqlens, self.block_table, **features)
            return out
        if cu_seqlens is None:
            rows = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
            cu_seqlens, max_seqlen = rows * count, count
        q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
        self._write(pages, k, v, cu_seqlens)
        keys, cu_seqlens_k = (k, v), cu_seqlens
        if not self._is_empty():
            lengths = self.cache_seqlens + cu_seqlens.diff()
            keys, cu_seqlens_k = pages, F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            features["block_table"] = self.block_table
        bound = self.length_bound(max_seqlen)
        out = attention_varlen(
            q, *keys, cu_seqlens, cu_seqlens_k, max_seqlen, bound, causal=True, **features
        )
        out = out.unflatten(0, (batch, count))
        return out

    def _write(
        self, pages: tuple[Tensor, Tensor], k: Tensor, v: Tensor, cu_seqlens: Tensor
    ) -> None:
        """Copies packed k, v [T, H_kv, D] behind each row's tokens."""
        row, place = places(cu_seqlens, k.shape[0])
        position = self.cache_seqlens[row] + place
        block = self.block_table[row, position // self.page_size]
        slots = (block * self.page_size).long() + position % self.page_size
        for held, new in zip(pages, (k, v), strict=True):
            held.flatten(0, 1).index_copy_(0, slots, new)


class StaticKeyValueCache(KeyValueCache):
    """A cache of fixed capacity whose steps have fixed shapes and addresses and ask the host nothing.

    Per layer two contiguous tensors [B, capacity, H_kv, D], read as pages by a table that never
    changes. A decoding step so compiles once, with `fullgraph=True`, and can be captured in a CUDA
    graph, `advance(1)` included; the first step, which makes the tensors, comes before the capture.
    Nothing can check that a row stays within the capacity: the caller does.

    Args:
        num_layers: layers that will call `attend`.
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

    def length_bound(self, count: int) -> int:
        return self.capacity

    def reset(self) -> None:
        """Forgets all tokens; the tensors stay where they are."""
        self.cache_seqlens.zero_()

    def _pages(self, layer: int, k: Tensor, v: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
        held = self._layers[layer]
        if held is None:
            shape = (self.block_table.numel(), self.page_size)
            held = (k.new_empty(*shape, *k.shape[2:]), v.new_empty(*shape, *v.shape[2:]))
            self._layers[layer] = held
        return held
