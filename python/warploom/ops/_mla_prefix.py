"""A cached prefix of latent attention: expanded chunk by chunk, attended to, merged by the log-sum-exp."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from warploom.ops.attention import attention_varlen, merge_attention
from warploom.reference.mla import expand_rows

#: Rows of an expanded chunk that attention takes for one page: the largest that it takes.
_PAGE_SIZE = 256


def expand_latent(
    latent: Tensor, k_rope: Tensor, kv_b_weight: Tensor, heads: int, d_value: int
) -> tuple[Tensor, Tensor]:
    """Keys [..., H, d_nope + d_rope] and values [..., H, d_value] of latents [..., d_latent]."""
    kv = F.linear(latent, kv_b_weight).unflatten(-1, (heads, -1))
    k_nope, v = kv.split([kv.shape[-1] - d_value, d_value], dim=-1)
    shared = k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], k_rope.shape[-1])
    return torch.cat((k_nope, shared), dim=-1), v


@dataclass(frozen=True)
class Prefix:
    """The tokens that a cache holds of each sequence; the fields are `mla_prefill`'s arguments."""

    kv_cache: Tensor
    cache_seqlens: Tensor
    block_table: Tensor | None
    max_cache_seqlen: int
    chunk_size: int

    def merge(
        self,
        out: Tensor,
        lse: Tensor,
        q: Tensor,
        kv_b_weight: Tensor,
        d_latent: int,
        d_value: int,
        softmax_scale: float,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        """out and lse of the new tokens, joined with the attention of q to the prefix."""
        batch, device = self.cache_seqlens.shape[0], q.device
        shape, lse_shape = out.shape, lse.shape
        if cu_seqlens is None:
            max_seqlen = q.shape[1]
            cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * max_seqlen
            q, out = q.flatten(0, 1), out.flatten(0, 1)
            lse = lse.transpose(0, 1).flatten(1).contiguous()
        capacity = self.kv_cache.shape[1]
        if self.block_table is not None:
            capacity *= self.block_table.shape[1]
        longest = min(self.max_cache_seqlen or capacity, capacity)
        for first in range(0, longest, self.chunk_size):
            places = -(-min(self.chunk_size, longest - first) // _PAGE_SIZE)
            rows = self._rows(first, places * _PAGE_SIZE, d_latent).to(q.dtype)
            latent, k_rope = rows.split([d_latent, rows.shape[-1] - d_latent], dim=-1)
            k, v = expand_latent(latent, k_rope, kv_b_weight, q.shape[-2], d_value)
            lengths = (self.cache_seqlens - first).clamp(0, places * _PAGE_SIZE)
            table = torch.arange(batch * places, dtype=torch.int32, device=device)
            part_out, part_lse = attention_varlen(
                q,
                k.reshape(-1, _PAGE_SIZE, *k.shape[2:]),
                v.reshape(-1, _PAGE_SIZE, *v.shape[2:]),
                cu_seqlens,
                F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
                max_seqlen,
                places * _PAGE_SIZE,
                block_table=table.view(batch, places),
                softmax_scale=softmax_scale,
                return_lse=True,
                backend=backend,
            )
            out, lse = merge_attention(out, lse, part_out, part_lse, backend=backend)
        if len(lse_shape) == 3:
            lse = lse.unflatten(1, (lse_shape[0], -1)).transpose(0, 1).contiguous()
        return out.view(shape), lse

    def _rows(self, first: int, count: int, d_latent: int) -> Tensor:
        """[B, count, d_latent + d_rope] of the tokens from `first` on; 0 behind a sequence's last one."""
        positions = first + torch.arange(count, device=self.kv_cache.device)
        seen = positions < self.cache_seqlens.unsqueeze(1)
        page_size = self.kv_cache.shape[1]
        if self.block_table is None:
            rows = torch.arange(seen.shape[0], device=seen.device)
            blocks, slots = rows.unsqueeze(1), positions.clamp(max=page_size - 1)
        else:
            places = (positions // page_size).clamp(max=self.block_table.shape[1] - 1)
            blocks = torch.where(seen, self.block_table[:, places], 0).long()
            slots = positions % page_size
        held = expand_rows(self.kv_cache[blocks, slots], d_latent)
        return torch.where(seen.unsqueeze(-1), held, 0.0)
