"""Multi-head latent attention with its projections: expanded or absorbed, cached, packed."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from warploom.nn.attention import next_positions
from warploom.nn.latent_cache import LatentCache
from warploom.nn.norm import RMSNorm
from warploom.nn.packing import places
from warploom.nn.sharded import own_part, shared_whole
from warploom.ops.mla import mla_absorbed, mla_prefill
from warploom.ops.rope import apply_rotary

Mode = Literal["auto", "expanded", "absorbed"]
#: New tokens a row, by device, from which expanding the cached latents costs less than attending to them as
#: they are. The products of DeepSeek's sizes say 2 d_latent (d_nope + d_value) / (2 (2 d_latent + d_rope) -
#: 2 (d_nope + d_rope + d_value)) = 170.7, whatever the heads and the cached tokens are. A CPU was
#: measured (docs/kernels/mla.md), a GPU was not.
_EXPANDED_FROM = {"cpu": 240, "cuda": 171}


def prefers_absorbed(device: torch.device, new_tokens: int) -> bool:
    """What "auto" does with a cache whose rows each get so many new tokens."""
    return new_tokens < _EXPANDED_FROM.get(device.type, 171)


class MultiheadLatentAttention(nn.Module):
    """Causal self-attention whose keys and values are made from one latent a token.

    DeepSeek-V2 (arXiv:2405.04434), section 2.1. The state dict is that of transformers'
    `DeepseekV2Attention` and `DeepseekV3Attention`. Rotary pairs are neighbours, as in the checkpoints.
    Heads can be on several ranks: q_proj or q_b_proj and kv_b_proj sharded by columns, o_proj by rows, the
    other parameters and x replicated DTensors.

    Args:
        hidden_size: features of the input and of the output.
        num_attention_heads: heads H.
        kv_lora_rank: features of the latent, d_latent.
        qk_nope_head_dim: features of a head's query and key that are not rotated, d_nope.
        qk_rope_head_dim: those that are, d_rope; this part of the key is shared by all heads.
        v_head_dim: features of a head's value, d_value.
        q_lora_rank: features of the query's latent; None: the query is projected at once.
        bias: whether q_a_proj, kv_a_proj_with_mqa and o_proj have a bias.
        rms_norm_eps: of the norms of both latents.
        latent_norm: whether the latent of keys and values is normalised.
        softmax_scale: default (d_nope + d_rope) ** -0.5; with YaRN times `nn.rope.yarn_softmax_factor`.
        mode: "expanded" makes keys and values of all heads (`mla_prefill`); "absorbed" moves their
            matrices to the query and the output, so that all heads attend to the latents themselves
            (`mla_absorbed`, with a cache `mla_decode`); "auto" is absorbed where a cache gets few new
            tokens a row (`prefers_absorbed`), and expanded elsewhere: packed rows too, so that a row's
            bits do not depend on the others' lengths. The same result but for rounding; also an attribute.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        *,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None = None,
        bias: bool = False,
        rms_norm_eps: float = 1e-6,
        latent_norm: bool = True,
        softmax_scale: float | None = None,
        mode: Mode = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("auto", "expanded", "absorbed"):
            raise ValueError(
                "MultiheadLatentAttention: mode: expected 'auto', 'expanded' or 'absorbed', got "
                f"{mode!r}"
            )
        self.num_attention_heads = num_attention_heads
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.rms_norm_eps = rms_norm_eps
        head_dim = qk_nope_head_dim + qk_rope_head_dim
        self.softmax_scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.mode = mode
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        query_size = num_attention_heads * head_dim
        if q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, query_size, bias=False, **factory)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias, **factory)
            self.q_a_layernorm = RMSNorm(q_lora_rank, rms_norm_eps, **factory)
            self.q_b_proj = nn.Linear(q_lora_rank, query_size, bias=False, **factory)
        self.q_lora_rank = q_lora_rank
        width = kv_lora_rank + qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, width, bias, **factory)
        self.kv_a_layernorm = (
            RMSNorm(kv_lora_rank, rms_norm_eps, **factory) if latent_norm else None
        )
        expanded_size = num_attention_heads * (qk_nope_head_dim + v_head_dim)
        self.kv_b_proj = nn.Linear(kv_lora_rank, expanded_size, bias=False, **factory)
        self.o_proj = nn.Linear(num_attention_heads * v_head_dim, hidden_size, bias, **factory)

    def extra_repr(self) -> str:
        return f"softmax_scale={self.softmax_scale:.6g}, mode={self.mode}"

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        positions: Tensor | None = None,
        cache: LatentCache | None = None,
        layer: int = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """x [B, S, hidden_size] -> [B, S, hidden_size].

        Args:
            rotary: cos and sin [P, d_rope / 2] (`RotaryEmbedding.table`); None: no rotation.
            positions: int64 [B, S] rows of that table; None: behind the cache's tokens, and from 0
                where a row, or a sequence of cu_seqlens, starts. With a cache they are always those.
            cache: latents of the tokens before x; x's own are written behind them. The caller
                advances the cache when every layer has been run.
            layer: this module's place in the cache.
            cu_seqlens: int32 [N + 1]: the B S tokens, row after row, are N sequences that do not see
                each other: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1], from 0 to B S. With
                a cache they continue its rows (`LatentCache.pack`).
            max_seqlen: at least the longest of them; None: B S.
        """
        if cache is not None and not isinstance(cache, LatentCache):
            raise TypeError(
                "MultiheadLatentAttention: cache: expected a LatentCache, got "
                f"{type(cache).__name__}"
            )
        batch, count = x.shape[:2]
        if positions is None and rotary is not None:
            positions = next_positions(batch, count, cache, cu_seqlens)
        packing: dict[str, Any] = {}
        if cu_seqlens is not None:
            packing = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen or batch * count}
        q_nope, q_rope = self._queries(x, rotary, positions)
        compressed_kv = self.kv_a_proj_with_mqa(x)
        if cache is not None:
            if self.kv_a_layernorm is None:
                latent, k_rope = self._keys(compressed_kv, rotary, positions)
                cache.write(layer, latent, k_rope, cu_seqlens=cu_seqlens)
            else:
                tokens, norm = shared_whole(compressed_kv), shared_whole(self.kv_a_layernorm.weight)
                eps = self.rms_norm_eps
                cache.append(layer, tokens, norm, rotary=rotary, eps=eps, cu_seqlens=cu_seqlens)
        if self._absorbs(x, cache, cu_seqlens):
            w_uk, w_uv = self._head_weights()
            q = torch.cat((torch.einsum("bshn,hnl->bshl", q_nope, w_uk), q_rope), dim=-1)
            options = {**packing, "d_latent": self.kv_lora_rank}
            options["softmax_scale"] = self.softmax_scale
            if cache is not None:
                attended = cache.decode(layer, q, **options)
            else:
                kv = torch.cat(self._keys(compressed_kv, rotary, positions), dim=-1)
                attended = _attend_absorbed(q, kv, **options)
            # The matrix on the left: einsum's order takes four times as long in bfloat16 on a CPU.
            attended = torch.bmm(w_uv, attended.flatten(0, 1).permute(1, 2, 0))
            attended = attended.permute(2, 0, 1).unflatten(0, (batch, count))
        else:
            q = torch.cat((q_nope, q_rope), dim=-1)
            latent, k_rope = self._keys(compressed_kv, rotary, positions)
            if cu_seqlens is not None:
                q, latent, k_rope = (tensor.flatten(0, 1) for tensor in (q, latent, k_rope))
            options = {**packing, "softmax_scale": self.softmax_scale}
            if cache is not None:
                options |= cache.prefix(layer)
            attended = mla_prefill(q, latent, k_rope, own_part(_weight(self.kv_b_proj)), **options)
            if cu_seqlens is not None:
                attended = attended.unflatten(0, (batch, count))
        out: Tensor = self.o_proj(attended.flatten(2))
        return out

    def _absorbs(self, x: Tensor, cache: LatentCache | None, cu_seqlens: Tensor | None) -> bool:
        if self.mode != "auto":
            return self.mode == "absorbed"
        few = cache is not None and cu_seqlens is None
        return few and prefers_absorbed(x.device, x.shape[1])

    def _queries(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """[B, S, H, d_nope] and, rotated, [B, S, H, d_rope]; a tensor-parallel rank has a part of H."""
        if self.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        sizes = [self.qk_nope_head_dim, self.qk_rope_head_dim]
        q_nope, q_rope = q.unflatten(-1, (-1, sum(sizes))).split(sizes, dim=-1)
        return q_nope, _rotate(q_rope, rotary, positions)

    def _keys(
        self, compressed_kv: Tensor, rotary: tuple[Tensor, Tensor] | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Latents [B, S, d_latent], normalised, and rotated keys [B, S, d_rope]: a row of the cache."""
        sizes = [self.kv_lora_rank, self.qk_rope_head_dim]
        latent, k_rope = compressed_kv.split(sizes, dim=-1)
        if self.kv_a_layernorm is not None:
            latent = self.kv_a_layernorm(latent)
        latent, k_rope = shared_whole(latent), shared_whole(k_rope)
        return latent, _rotate(k_rope.unsqueeze(2), rotary, positions).squeeze(2)

    def _head_weights(self) -> tuple[Tensor, Tensor]:
        """W_UK [H, d_nope, d_latent] and W_UV [H, d_value, d_latent]: parts of kv_b_proj, head by head."""
        sizes = [self.qk_nope_head_dim, self.v_head_dim]
        w_uk, w_uv = (
            own_part(_weight(self.kv_b_proj)).unflatten(0, (-1, sum(sizes))).split(sizes, dim=1)
        )
        return w_uk, w_uv


def _weight(linear: Any) -> Tensor:
    """What a linear layer multiplies with; one that is not its `weight` alone says what it is."""
    effective = getattr(linear, "effective_weight", None)
    weight: Tensor = linear.weight if effective is None else effective()
    return weight


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor] | None, positions: Tensor | None) -> Tensor:
    """x [B, S, H, d_rope], pairs of neighbours turned."""
    return x if rotary is None else apply_rotary(x, *rotary, positions=positions, interleaved=True)


def _attend_absorbed(
    q: Tensor,
    kv: Tensor,
    *,
    d_latent: int,
    softmax_scale: float,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
) -> Tensor:
    """`mla_absorbed`; packed sequences become rows that are filled up behind their ends, unseen there."""
    sizes: dict[str, Any] = {"d_latent": d_latent, "softmax_scale": softmax_scale}
    out: Tensor
    if cu_seqlens is None:
        out = mla_absorbed(q, kv, **sizes)
        return out
    index = places(cu_seqlens, q.shape[0] * q.shape[1])
    shape = (cu_seqlens.shape[0] - 1, max_seqlen)
    padded = (
        tensor.new_zeros((*shape, *tensor.shape[2:])).index_put(index, tensor.flatten(0, 1))
        for tensor in (q, kv)
    )
    out = mla_absorbed(*padded, **sizes)[index].unflatten(0, q.shape[:2])
    return out
