"""Grouped-query attention with projections, and the cache of keys and values it decodes from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from warploom.ops.attention import attention
from warploom.ops.rope import apply_rotary

_MINIMUM_CACHE_ROWS = 64


class KeyValueCache:
    """Keys and values of every layer for a batch whose rows may differ in length.

    Per layer two tensors [B, capacity, H_kv, D], allocated from the first keys that arrive and
    grown by doubling. Row b holds `lengths[b]` tokens from slot 0 on; the slots behind them are
    undefined and never attended to. The lengths are host integers, so that no step waits for
    the device. A cache with another layout (pages, quantised) has the same methods.

    Args:
        num_layers: layers that will call `attend`.
        batch_size: rows B.
    """

    def __init__(self, num_layers: int, batch_size: int) -> None:
        self.lengths = [0] * batch_size
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def positions(self, count: int, device: torch.device) -> Tensor:
        """int64 [B, count]: the positions of the next `count` tokens of every row."""
        starts = torch.tensor(self.lengths, dtype=torch.int64, device=device)
        return starts[:, None] + torch.arange(count, device=device)

    def advance(self, counts: int | Sequence[int]) -> None:
        """Makes the tokens that every layer has just written part of the rows.

        `counts` may be smaller than what was written: padding at the end of a row is dropped.
        """
        if isinstance(counts, int):
            counts = [counts] * len(self.lengths)
        self.lengths = [length + n for length, n in zip(self.lengths, counts, strict=True)]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes k and v behind each row's tokens and attends causally to all of them.

        q [B, S, H, D], k and v [B, S, H_kv, D] -> [B, S, H, D]. Rows of equal length that stand
        together share one call, so a batch sorted by length makes the fewest calls.
        """
        count = q.shape[1]
        keys, values = self._reserve(layer, k, v, max(self.lengths, default=0) + count)
        outs, start = [], 0
        for length, group in groupby(self.lengths):
            rows = slice(start, start + len(list(group)))
            keys[rows, length : length + count] = k[rows]
            values[rows, length : length + count] = v[rows]
            held = slice(0, length + count)
            outs.append(attention(q[rows], keys[rows, held], values[rows, held], causal=True))
            start = rows.stop
        return outs[0] if len(outs) == 1 else torch.cat(outs) if outs else torch.empty_like(q)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps the given rows, in that order, and forgets the others."""
        self.lengths = [self.lengths[row] for row in rows]
        used = max(self.lengths, default=0)
        for layer, held in enumerate(self._layers):
            if held is not None:
                index = torch.tensor(rows, device=held[0].device)
                keys, values = (tensor[:, :used].index_select(0, index) for tensor in held)
                self._layers[layer] = (keys, values)

    def _reserve(self, layer: int, k: Tensor, v: Tensor, needed: int) -> tuple[Tensor, Tensor]:
        held = self._layers[layer]
        if held is not None and held[0].shape[1] >= needed:
            return held
        capacity = max(needed, _MINIMUM_CACHE_ROWS, 0 if held is None else 2 * held[0].shape[1])
        grown = (
            k.new_empty(k.shape[0], capacity, *k.shape[2:]),
            v.new_empty(v.shape[0], capacity, *v.shape[2:]),
        )
        if held is not None:
            used = max(self.lengths)
            for old, new in zip(held, grown, strict=True):
                new[:, :used] = old[:, :used]
        self._layers[layer] = grown
        return grown


class GroupedQueryAttention(nn.Module):
    """Self-attention in which groups of query heads share a key/value head.

    Ainslie et al., arXiv:2305.13245; one group per query head is multi-head attention, one
    group in all is multi-query attention. The state dict is that of transformers'
    `LlamaAttention`: q_proj, k_proj, v_proj, o_proj.

    Args:
        hidden_size: features of the input and of the output.
        num_attention_heads: query heads H.
        num_key_value_heads: key/value heads, a divisor of H (default H).
        head_dim: features of a head (default hidden_size // H).
        bias: whether the four projections have a bias.
        causal: whether a token sees only itself and those before it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        causal: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_key_value_heads is None:
            num_key_value_heads = num_attention_heads
        if num_key_value_heads < 1 or num_attention_heads % num_key_value_heads:
            raise ValueError(
                "GroupedQueryAttention: num_key_value_heads: expected a divisor of "
                f"num_attention_heads {num_attention_heads}, got {num_key_value_heads}"
            )
        if head_dim is None:
            if hidden_size % num_attention_heads:
                raise ValueError(
                    "GroupedQueryAttention: hidden_size: expected a multiple of "
                    f"num_attention_heads {num_attention_heads}, got {hidden_size}"
                )
            head_dim = hidden_size // num_attention_heads
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.causal = causal
        query_size, key_size = num_attention_heads * head_dim, num_key_value_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, query_size, bias, device, dtype)
        self.k_proj = nn.Linear(hidden_size, key_size, bias, device, dtype)
        self.v_proj = nn.Linear(hidden_size, key_size, bias, device, dtype)
        self.o_proj = nn.Linear(query_size, hidden_size, bias, device, dtype)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """x [B, S, hidden_size] -> [B, S, hidden_size].

        Args:
            rotary: cos and sin [P, R / 2] (`RotaryEmbedding.table`), pairs half-split; None: no
                rotation.
            positions: int64 [B, S] rows of that table; None: arange(S).
            cache: keys and values of the tokens before x; x's own are written behind them. The
                caller advances the cache when every layer has been run. Needs `causal`.
            layer: this module's place in the cache.
        """
        if cache is not None and not self.causal:
            raise ValueError("GroupedQueryAttention: cache: expected a causal module")
        batch, count = x.shape[:2]
        q = self.q_proj(x).view(batch, count, self.num_attention_heads, self.head_dim)
        k = self.k_proj(x).view(batch, count, self.num_key_value_heads, self.head_dim)
        v = self.v_proj(x).view(batch, count, self.num_key_value_heads, self.head_dim)
        if rotary is not None:
            q = apply_rotary(q, *rotary, positions=positions)
            k = apply_rotary(k, *rotary, positions=positions)
        if cache is None:
            attended = attention(q, k, v, causal=self.causal)
        else:
            attended = cache.attend(layer, q, k, v)
        out: Tensor = self.o_proj(attended.flatten(2))
        return out
