"""Caches of keys and values that attention decodes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from warploom.nn.token_cache import SPLIT_SIZE, StaticCache, TokenCache
from warploom.ops.attention import attention_decode, attention_varlen

#: New tokens of a row up to which decoding serves better than prefill, whose tiles hold 64 queries or more.
_DECODE_QUERIES = 8


class KeyValueCache(TokenCache):
    """Keys and values of every layer: two tensors of pages [num_blocks, page_size, H_kv, D]."""

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
        k_pages, v_pages = self._pages(layer, (k, v), count if cu_seqlens is None else None)
        features: dict[str, Any] = {"window": window, "softcap": softcap, "sinks": sinks}
        out: Tensor
        if cu_seqlens is None and count <= _DECODE_QUERIES:
            features |= {"k": k, "v": v, "split_size": SPLIT_SIZE}
            out = attention_decode(
                q, k_pages, v_pages, self.cache_seqlens, self.block_table, **features
            )
            return out
        if cu_seqlens is None:
            rows = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
            cu_seqlens, max_seqlen = rows * count, count
        q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
        self._write((k_pages, v_pages), (k, v), cu_seqlens)
        keys, cu_seqlens_k = (k, v), cu_seqlens
        if not self._is_empty():
            lengths = self.cache_seqlens + cu_seqlens.diff()
            keys = (k_pages, v_pages)
            cu_seqlens_k = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            features["block_table"] = self.block_table
        bound = self.length_bound(max_seqlen)
        out = attention_varlen(
            q, *keys, cu_seqlens, cu_seqlens_k, max_seqlen, bound, causal=True, **features
        )
        out = out.unflatten(0, (batch, count))
        return out

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Writes k and v [B, S, H_kv, D] behind each row's tokens, as `attend` does."""
        batch, count = k.shape[:2]
        pages = self._pages(layer, (k, v), count)
        rows = torch.arange(batch + 1, dtype=torch.int32, device=k.device)
        self._write(pages, (k.flatten(0, 1), v.flatten(0, 1)), rows * count)


class StaticKeyValueCache(KeyValueCache, StaticCache):
    """Keys and values of fixed capacity; the constructor is `StaticCache`'s."""
