"""The decoder of a language model: embedding, layers on a residual stream, last norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from warploom.nn import RMSNorm, RotaryEmbedding
from warploom.nn.attention import next_positions
from warploom.nn.token_cache import TokenCache


class LanguageModelConfig(Protocol):
    """What is used of a config here; `generation` uses more."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    initializer_range: float
    rms_norm_eps: float
    rope_parameters: dict[str, Any]
    tie_word_embeddings: bool

    @property
    def rotary_head_dim(self) -> int:
        """Features of a head that the rotary embedding counts its frequencies over."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Any: ...

    def to_dict(self) -> dict[str, Any]: ...


class DecoderLayer(nn.Module):
    """One decoder layer, x + attention(norm(x)) and then x + mlp(norm(x)).

    It works on the pair (what the previous layer added, the residual stream before that), so
    that each addition is fused into the normalisation that follows it.

    Args:
        index: its place among the layers, and in the cache.
        self_attn: a module with the call of `GroupedQueryAttention`.
        mlp: [B, S, hidden] -> [B, S, hidden].
    """

    def __init__(
        self,
        index: int,
        self_attn: nn.Module,
        mlp: nn.Module,
        config: LanguageModelConfig,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.index = index
        self.self_attn = self_attn
        self.mlp = mlp
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps, **factory)
        self.post_attention_layernorm = RMSNorm(size, eps, **factory)

    def forward(
        self,
        delta: Tensor,
        residual: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        positions: Tensor | None = None,
        cache: TokenCache | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """delta and residual [B, S, hidden]; a residual of None means that delta is the stream."""
        if residual is None:
            normed, residual = self.input_layernorm(delta), delta
        else:
            normed, residual = self.input_layernorm(delta.to(residual.dtype), residual)
        delta = self.self_attn(normed, rotary, positions, cache, self.index, cu_seqlens, max_seqlen)
        normed, residual = self.post_attention_layernorm(delta.to(residual.dtype), residual)
        return self.mlp(normed), residual


class Decoder(nn.Module):
    """Embedding, layers and last norm; called `model` in transformers' state dicts."""

    def __init__(
        self, config: LanguageModelConfig, layers: Sequence[DecoderLayer], **factory: Any
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.rotary_emb = RotaryEmbedding(
            config.rotary_head_dim, config.max_position_embeddings, config.rope_parameters
        )
        self.gradient_checkpointing = False

    def forward(
        self,
        input_ids: Tensor,
        cache: TokenCache | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """input_ids int [B, S], or embeddings [B, S, hidden] in their place -> the last hidden states
        [B, S, hidden]; the rest as in `CausalLanguageModel`."""
        delta = input_ids if input_ids.is_floating_point() else self.embed_tokens(input_ids)
        residual = None
        batch, count = input_ids.shape[:2]
        length = count if cu_seqlens is None else max_seqlen or batch * count
        rows = length if cache is None else cache.length_bound(length)
        table_dtype = torch.float64 if delta.dtype == torch.float64 else torch.float32
        rotary = self.rotary_emb.table(rows, delta.device, table_dtype)
        shared = (
            rotary,
            next_positions(batch, count, cache, cu_seqlens),
            cache,
            cu_seqlens,
            max_seqlen,
        )
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            if recompute:
                delta, residual = checkpoint(layer, delta, residual, *shared, use_reentrant=False)
            else:
                delta, residual = layer(delta, residual, *shared)
        hidden: Tensor
        if residual is None:
            hidden = self.norm(delta)
        else:
            hidden, _ = self.norm(delta.to(residual.dtype), residual)
        return hidden
