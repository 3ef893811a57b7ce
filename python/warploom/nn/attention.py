"""Grouped-query self-attention with its projections: cached, packed, windowed, with sinks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from warploom.nn.cache import KeyValueCache
from warploom.nn.norm import RMSNorm
from warploom.nn.packing import places
from warploom.nn.token_cache import TokenCache
from warploom.ops.attention import attention, attention_varlen
from warploom.ops.rope import apply_rotary


class GroupedQueryAttention(nn.Module):
    """Self-attention in which groups of query heads share a key/value head.

    Ainslie et al., arXiv:2305.13245; one group per query head is multi-head attention, one
    group in all is multi-query attention. The state dict is that of transformers' classes: q_proj,
    k_proj, v_proj, o_proj (`LlamaAttention`), q_norm, k_norm (`Qwen3Attention`), sinks
    (`GptOssAttention`).

    Args:
        hidden_size: features of the input and of the output.
        num_attention_heads: query heads H.
        num_key_value_heads: key/value heads, a divisor of H (default H).
        head_dim: features of a head (default hidden_size // H).
        bias: whether q_proj, k_proj and v_proj have a bias.
        causal: whether a token sees only itself and those before it.
        output_bias: whether o_proj has a bias (default: as the others).
        window: (left, right): a token sees so many tokens before and behind itself; -1: no limit.
        softcap: scores become softcap tanh(scores / softcap); 0: they do not.
        sinks: whether each query head has a learned logit beside its scores, 0 at first.
        qk_norm_eps: each head of q and k goes through an RMSNorm with this epsilon before it is
            rotated; None: no norm.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        causal: bool = True,
        *,
        output_bias: bool | None = None,
        window: Sequence[int] = (-1, -1),
        softcap: float = 0.0,
        sinks: bool = False,
        qk_norm_eps: float | None = None,
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
        self.window = (window[0], window[1])
        self.softcap = softcap
        query_size, key_size = num_attention_heads * head_dim, num_key_value_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, query_size, bias, device, dtype)
        self.k_proj = nn.Linear(hidden_size, key_size, bias, device, dtype)
        self.v_proj = nn.Linear(hidden_size, key_size, bias, device, dtype)
        output_bias = bias if output_bias is None else output_bias
        self.o_proj = nn.Linear(query_size, hidden_size, output_bias, device, dtype)
        self.q_norm = self.k_norm = None
        if qk_norm_eps is not None:
            self.q_norm, self.k_norm = (
                RMSNorm(head_dim, qk_norm_eps, device=device, dtype=dtype) for _ in range(2)
            )
        heads = torch.zeros(num_attention_heads, device=device, dtype=dtype) if sinks else None
        self.register_parameter("sinks", None if heads is None else nn.Parameter(heads))

    def extra_repr(self) -> str:
        return f"causal={self.causal}, window={self.window}, softcap={self.softcap}"

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """x [B, S, hidden_size] -> [B, S, hidden_size].

        Args:
            rotary: cos and sin [P, R / 2] (`RotaryEmbedding.table`), pairs half-split; None: no
                rotation.
            positions: int64 [B, S] rows of that table; None: behind the cache's tokens, and from 0
                where a row, or a sequence of cu_seqlens, starts.
            cache: keys and values of the tokens before x; x's own are written behind them. The
                caller advances the cache when every layer has been run. Needs `causal`.
            layer: this module's place in the cache.
            cu_seqlens: int32 [N + 1]: the B S tokens, row after row, are N sequences that do not see
                each other: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1], from 0 to B S. With
                a cache they continue its rows (`KeyValueCache.pack`).
            max_seqlen: at least the longest of them; None: B S.
        """
        if cache is not None and not self.causal:
            raise ValueError("GroupedQueryAttention: cache: expected a causal module")
        batch, count = x.shape[:2]
        # A tensor-parallel rank holds a part of the heads.
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            if positions is None:
                positions = next_positions(batch, count, cache, cu_seqlens)
            q = apply_rotary(q, *rotary, positions=positions)
            k = apply_rotary(k, *rotary, positions=positions)
        attended = self._attend(q, k, v, cache, layer, cu_seqlens, max_seqlen)
        out: Tensor = self.o_proj(attended.flatten(2))
        return out

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: KeyValueCache | None,
        layer: int,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
    ) -> Tensor:
        features: dict[str, Any] = {
            "window": self.window,
            "softcap": self.softcap,
            "sinks": self.sinks,
        }
        batch, count = q.shape[:2]
        if max_seqlen is None:
            max_seqlen = batch * count
        out: Tensor
        if cache is not None:
            out = cache.attend(
                layer, q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **features
            )
        elif cu_seqlens is None:
            out = attention(q, k, v, causal=self.causal, **features)
        else:
            q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
            bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
            out = attention_varlen(q, k, v, *bounds, causal=self.causal, **features)
            out = out.unflatten(0, (batch, count))
        return out


def next_positions(
    batch: int, count: int, cache: TokenCache | None, cu_seqlens: Tensor | None
) -> Tensor | None:
    """int64 [B, S], the positions that the tokens of one step have; None: arange(S) in every row."""
    if cache is not None:
        total = count if cu_seqlens is None else batch * count
        return cache.positions(total, cu_seqlens).view(batch, count)
    if cu_seqlens is None:
        return None
    return places(cu_seqlens, batch * count)[1].long().view(batch, count)
