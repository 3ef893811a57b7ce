"""Caches of latents, from which multi-head latent attention decodes without expanding them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warploom.nn.packing import places
from warploom.nn.paged_cache import PagedCache
from warploom.nn.token_cache import PAGE_SIZE, SPLIT_SIZE, StaticCache, TokenCache
from warploom.ops.mla import mla_cache_append, mla_decode
from warploom.reference.mla import compress_rows, compressed_row_bytes


class LatentCache(TokenCache):
    """One tensor of pages a layer, [num_blocks, page_size, d_latent + d_rope]: a latent and a
    rotated key that all heads share.

    A layer's step is `append`, which normalises the latent, or `write`, which does not; then `decode` (few
    tokens, absorbed) or `prefix` (many, expanded).

    Attributes:
        dtype: torch.float8_e4m3fn or torch.int8: rows are compressed, `compressed_row_bytes` bytes each,
            latents off by at most 1/16 of their own size, or 1/254 of the largest of their 128; None: rows
            have the dtype of what is appended.
    """

    dtype: torch.dtype | None = None

    def _set_dtype(self, dtype: torch.dtype | None) -> None:
        if dtype not in (None, torch.float8_e4m3fn, torch.int8):
            raise TypeError(
                f"{type(self).__name__}: dtype: expected float8_e4m3fn, int8 or None, got {dtype}"
            )
        self.dtype = dtype

    def append(
        self,
        layer: int,
        compressed_kv: Tensor,
        norm_weight: Tensor,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        eps: float = 1e-6,
        cu_seqlens: Tensor | None = None,
    ) -> None:
        """Writes new tokens behind each row's: the latent normalised, the shared key rotated.

        compressed_kv [B, S, d_latent + d_rope], with the cu_seqlens of `pack` the rows' tokens one after
        another; the rest as in `mla_cache_append`.
        """
        pages = self._row_pages(layer, compressed_kv, norm_weight.shape[0], cu_seqlens)
        if cu_seqlens is not None:
            compressed_kv = compressed_kv.flatten(0, 1)
        mla_cache_append(
            compressed_kv,
            norm_weight,
            pages,
            self.cache_seqlens,
            self.block_table,
            rotary=rotary,
            eps=eps,
            cu_seqlens=cu_seqlens,
        )

    def write(
        self, layer: int, latent: Tensor, k_rope: Tensor, *, cu_seqlens: Tensor | None = None
    ) -> None:
        """Writes new tokens as they are: `append` for latents that have no norm.

        latent [B, S, d_latent] and k_rope [B, S, d_rope], rotated; cu_seqlens as in `append`.
        """
        rows = torch.cat((latent, k_rope), dim=-1)
        if torch.is_grad_enabled() and rows.requires_grad:
            raise RuntimeError(
                f"{type(self).__name__}: expected tensors that need no gradient, got one that does: "
                "a cache is not differentiable, use torch.no_grad()"
            )
        pages = self._row_pages(layer, rows, latent.shape[-1], cu_seqlens)
        if cu_seqlens is None:
            batch, count = rows.shape[:2]
            cu_seqlens = count * torch.arange(batch + 1, dtype=torch.int32, device=rows.device)
        if self.dtype is not None:  # bytes: index_copy_ has no float8
            rows = compress_rows(latent, k_rope, self.dtype).view(torch.uint8)
            pages = pages.view(torch.uint8)
        self._write((pages,), (rows.flatten(0, 1),), cu_seqlens)

    def _row_pages(
        self, layer: int, tokens: Tensor, d_latent: int, cu_seqlens: Tensor | None
    ) -> Tensor:
        """The layer's pages, with room for tokens [B, S, d_latent + d_rope]."""
        width = tokens.shape[-1]
        if self.dtype is not None:
            width = compressed_row_bytes(d_latent, width - d_latent)
        row = tokens.new_empty((0, 0, width), dtype=self.dtype)
        (pages,) = self._pages(layer, (row,), tokens.shape[1] if cu_seqlens is None else None)
        return pages

    def decode(
        self,
        layer: int,
        q: Tensor,
        *,
        d_latent: int,
        softmax_scale: float,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int = 0,
    ) -> Tensor:
        """Absorbed causal attention of the tokens just appended to their rows, themselves included.

        q [B, S, H, d_latent + d_rope] -> [B, S, H, d_latent]; with the cu_seqlens and max_seqlen of `pack`
        the B S tokens are those of the rows one after another.
        """
        (pages,) = self._held(layer)
        options: dict[str, Any] = {
            "d_latent": d_latent,
            "softmax_scale": softmax_scale,
            "split_size": SPLIT_SIZE,
        }
        out: Tensor
        if cu_seqlens is None:
            lengths = self.cache_seqlens + q.shape[1]
            out = mla_decode(q, pages, lengths, self.block_table, **options)
            return out
        counts = cu_seqlens.diff()
        row, place = places(cu_seqlens, q.shape[0] * q.shape[1])
        slot = place + (max_seqlen - counts)[row]  # a row's last query is its last token
        padded = q.new_zeros((counts.shape[0], max_seqlen, *q.shape[2:]))
        padded[row, slot] = q.flatten(0, 1)
        lengths = self.cache_seqlens + counts
        out = mla_decode(padded, pages, lengths, self.block_table, **options)[row, slot]
        out = out.unflatten(0, q.shape[:2])
        return out

    def prefix(self, layer: int) -> dict[str, Any]:
        """What the rows held before this step, as arguments of `mla_prefill`; none where that is nothing."""
        if self._is_empty():
            return {}
        (pages,) = self._held(layer)
        return {
            "kv_cache": pages,
            "cache_seqlens": self.cache_seqlens,
            "block_table": self.block_table,
            "max_cache_seqlen": self.length_bound(0),
        }

    def _held(self, layer: int) -> tuple[Tensor, ...]:
        held = self._layers[layer]
        if held is None:
            raise RuntimeError(f"{type(self).__name__}: layer {layer}: expected `append` first")
        return held


class PagedLatentCache(LatentCache, PagedCache):
    """Latents in pages of a common pool; `dtype` as in `LatentCache`, the rest as in `PagedCache`."""

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        *,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_layers, batch_size, page_size=page_size, device=device)
        self._set_dtype(dtype)


class StaticLatentCache(LatentCache, StaticCache):
    """Latents of fixed capacity; `dtype` as in `LatentCache`, the rest as in `StaticCache`."""

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_layers, batch_size, capacity, device=device)
        self._set_dtype(dtype)
