"""Virtual tokens before every text: prompt tuning (their embeddings) and prefix tuning (keys and values)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from warploom.models import generation
from warploom.models.causal_lm import CausalLanguageModel
from warploom.models.decoder import Decoder
from warploom.nn import GroupedQueryAttention, KeyValueCache
from warploom.nn.token_cache import PAGE_SIZE, CacheKind, TokenCache
from warploom.ops.attention import attention


class VirtualTokens(nn.Module, ABC):
    """A frozen language model and P learned tokens before every text; what they share.

    The one parameter is `prompt_embeddings`, of peft's name and layout.
    """

    def __init__(self, base: CausalLanguageModel, prompt_embeddings: Tensor) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.prompt_embeddings = nn.Parameter(prompt_embeddings)

    @abstractmethod
    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids int [B, S] -> logits [B, S, vocab_size] of these tokens, positions from P."""

    @abstractmethod
    def _fill(self, cache: TokenCache, batch_size: int) -> None:
        """Writes the virtual tokens of `batch_size` rows to an empty cache."""

    @property
    def num_virtual_tokens(self) -> int:
        return self.prompt_embeddings.shape[0]

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def lm_head(self) -> nn.Linear:
        return self.base.lm_head

    @property
    def model(self) -> Decoder:
        return self.base.model

    def make_cache(self, kind: CacheKind, batch_size: int, capacity: int) -> TokenCache:
        """A cache of the base's that holds the virtual tokens, with room for `capacity` others a row."""
        cache = self.base.make_cache(kind, batch_size, self.num_virtual_tokens + capacity)
        with torch.no_grad():
            self._fill(cache, batch_size)
        cache.advance(self.num_virtual_tokens)
        return cache

    def generate(
        self, input_ids: generation.Prompts, max_new_tokens: int, **options: Any
    ) -> Tensor | list[list[int]]:
        """Prompts with their continuations; see `warploom.models.generation.generate`."""
        return generation.generate(self, input_ids, max_new_tokens, **options)

    def stream(
        self, input_ids: generation.Prompts, max_new_tokens: int, **options: Any
    ) -> Iterator[generation.Token]:
        """The same tokens one by one; see `warploom.models.generation.stream`."""
        return generation.stream(self, input_ids, max_new_tokens, **options)

    def _weights(self) -> Tensor:
        """The parameter in the base's dtype; it is float32 itself where that has 16 bits."""
        return self.prompt_embeddings.to(self.base.model.embed_tokens.weight.dtype)


class PromptTuning(VirtualTokens):
    """Learned embeddings [P, hidden] before those of the text (Lester et al., arXiv:2104.08691).

    Args:
        base: the model; it is frozen.
        num_virtual_tokens: P.
        initial_tokens: token ids whose embeddings are the first ones, repeated to P; default: P tokens drawn
            from the vocabulary.
    """

    def __init__(
        self,
        base: CausalLanguageModel,
        num_virtual_tokens: int,
        initial_tokens: Sequence[int] | None = None,
    ) -> None:
        table = base.model.embed_tokens.weight.detach()
        if initial_tokens:
            ids = torch.tensor(initial_tokens, device=table.device)
            ids = ids.repeat(-(-num_virtual_tokens // len(ids)))[:num_virtual_tokens]
        else:
            ids = torch.randint(len(table), (num_virtual_tokens,), device=table.device)
        super().__init__(base, _wide(table[ids]))

    def forward(self, input_ids: Tensor) -> Tensor:
        prompt = self._weights().expand(len(input_ids), -1, -1)
        embeddings = torch.cat((prompt, self.model.embed_tokens(input_ids)), dim=1)
        hidden = self.model(embeddings)[:, self.num_virtual_tokens :]
        logits: Tensor = self.lm_head(hidden)
        return logits

    def _fill(self, cache: TokenCache, batch_size: int) -> None:
        self.model(self._weights().expand(batch_size, -1, -1), cache)


class PrefixTuning(VirtualTokens):
    """Learned keys and values of P tokens in every layer (Li and Liang, arXiv:2101.00190), P rows of
    [layers, 2, H_kv, D], without the network that makes them there.

    Args:
        base: a model whose layers have `GroupedQueryAttention`; it is frozen.
        num_virtual_tokens: P. The first ones are drawn from N(0, initializer_range).
    """

    def __init__(self, base: CausalLanguageModel, num_virtual_tokens: int) -> None:
        attentions: list[Any] = [layer.self_attn for layer in base.model.layers]
        if not all(isinstance(module, GroupedQueryAttention) for module in attentions):
            raise TypeError(
                "PrefixTuning: base: expected layers of GroupedQueryAttention, got "
                f"{type(attentions[0]).__name__}"
            )
        heads = (attentions[0].num_key_value_heads, attentions[0].head_dim)
        table = base.model.embed_tokens.weight
        width = len(attentions) * 2 * heads[0] * heads[1]
        drawn = _wide(table.new_empty(num_virtual_tokens, width))
        super().__init__(base, drawn.normal_(0.0, base.config.initializer_range))
        self._shape = (len(attentions), 2, *heads)

    def forward(self, input_ids: Tensor) -> Tensor:
        cache = _Prefix(self._keys_values(), len(input_ids))
        logits: Tensor = self.base(input_ids, cache)
        return logits

    def _keys_values(self) -> Tensor:
        """[layers, 2, P, H_kv, D]; keys as they are after the rotation."""
        rows: Tensor = self._weights().view(-1, *self._shape)
        return rows.permute(1, 2, 0, 3, 4)

    def _fill(self, cache: TokenCache, batch_size: int) -> None:
        assert isinstance(cache, KeyValueCache)
        for layer, (k, v) in enumerate(self._keys_values()):
            cache.write(layer, *(tensor.expand(batch_size, -1, -1, -1) for tensor in (k, v)))


class _Prefix(KeyValueCache):
    """A cache that holds learned keys and values and nothing else: one step, with gradients to them."""

    def __init__(self, keys_values: Tensor, batch_size: int) -> None:
        super().__init__(len(keys_values), batch_size, PAGE_SIZE, keys_values.device)
        self._keys_values = keys_values
        self.cache_seqlens.fill_(keys_values.shape[2])

    def length_bound(self, count: int) -> int:
        return self._keys_values.shape[2] + count

    def _pages(self, layer: int, new: Sequence[Tensor], count: int | None) -> tuple[Tensor, ...]:
        k, v = self._keys_values[layer]
        return k, v

    def _is_empty(self) -> bool:
        return False

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None,
        max_seqlen: int = 0, **features: Any,
    ) -> Tensor:  # fmt: skip
        if cu_seqlens is not None:
            raise ValueError(
                "PrefixTuning: cu_seqlens: expected None, every row has its own prefix"
            )
        keys, values = (
            torch.cat((prefix.expand(len(new), -1, -1, -1), new), dim=1)
            for prefix, new in zip(self._pages(layer, (k, v), None), (k, v), strict=True)
        )
        out: Tensor = attention(q, keys, values, causal=True, **features)
        return out


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
