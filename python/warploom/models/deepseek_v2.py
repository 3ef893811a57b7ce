"""DeepSeek-V2 and V3: latent attention and mixtures of experts, in transformers' checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warploom.models import checkpoint as files
from warploom.models.causal_lm import CausalLanguageModel
from warploom.models.decoder import DecoderLayer
from warploom.models.deepseek_v2_config import DeepseekV2Config
from warploom.nn import (
    LatentCache,
    MultiheadLatentAttention,
    PagedLatentCache,
    StaticLatentCache,
    SwiGLU,
)
from warploom.nn.grouped_linear import RoutedExperts
from warploom.nn.moe import BalanceLoss, MixtureOfExperts, TopKRouter
from warploom.nn.token_cache import CacheKind

_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
#: The tensors of one expert on disk that make a row of the fused one, in order.
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class DeepseekV2(CausalLanguageModel):
    """A DeepSeek-V2 language model (arXiv:2405.04434), or a V3 (2412.19437, without its
    multi-token-prediction layers).

    The state dict has the names of transformers' `DeepseekV2ForCausalLM` and `DeepseekV3ForCausalLM`;
    checkpoints hold one tensor an expert, as the published ones do.
    `DeepseekV2Config.preset(name)` has the published shapes; the arguments are `CausalLanguageModel`'s.

    Attributes:
        cache_dtype: torch.float8_e4m3fn or torch.int8: `generate` keeps latents compressed (`LatentCache`).
    """

    config: DeepseekV2Config
    config_type = DeepseekV2Config
    cache_dtype: torch.dtype | None = None

    def make_layer(self, index: int, **factory: Any) -> DecoderLayer:
        config = self.config
        attention = MultiheadLatentAttention(
            config.hidden_size,
            config.num_attention_heads,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            q_lora_rank=config.q_lora_rank,
            bias=config.attention_bias,
            latent_norm=config.latent_norm,
            softmax_scale=config.softmax_scale,
            **factory,
        )
        mlp: SwiGLU | MixtureOfExperts
        if index < config.first_k_dense_replace:
            width, bias = config.intermediate_size, config.mlp_bias
            mlp = SwiGLU(config.hidden_size, width, bias=bias, **factory)
        else:
            mlp = self._make_experts(**factory)
        return DecoderLayer(index, attention, mlp, config, **factory)

    def make_cache(self, kind: CacheKind, batch_size: int, capacity: int) -> LatentCache:
        layers = self.config.num_hidden_layers
        factory: dict[str, Any] = {"dtype": self.cache_dtype, "device": self.lm_head.weight.device}
        if kind == "paged":
            return PagedLatentCache(layers, batch_size, **factory)
        return StaticLatentCache(layers, batch_size, capacity, **factory)

    def _make_experts(self, **factory: Any) -> MixtureOfExperts:
        config = self.config
        groups = config.n_group if config.has_groups else 1
        top_groups = config.topk_group if config.has_groups else 1
        router = TopKRouter(
            config.hidden_size,
            config.n_routed_experts,
            config.num_experts_per_tok,
            scoring="sigmoid" if config.is_v3 else "softmax",
            num_groups=groups,
            top_groups=top_groups,
            normalize=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
            **factory,
        )
        balance = BalanceLoss(*config.balance_alphas, groups, top_groups)
        return MixtureOfExperts(
            router,
            config.hidden_size,
            config.moe_intermediate_size,
            config.n_shared_experts,
            balance=balance if any(config.balance_alphas) else None,
            **factory,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all weights anew: normal matrices, experts and routers, unit norms, no biases."""
        super().reset_parameters()
        for module in self.modules():
            if isinstance(module, RoutedExperts | TopKRouter):
                for weight in module.parameters(recurse=False):
                    weight.normal_(0.0, self.config.initializer_range)
            if isinstance(module, TopKRouter) and module.e_score_correction_bias is not None:
                module.e_score_correction_bias.zero_()

    @classmethod
    def open_checkpoint(cls, directory: Path) -> tuple[DeepseekV2Config, files.WeightSource]:
        config, source = super().open_checkpoint(directory)
        return config, _FusedExperts(source, config)

    def tensors_to_save(self) -> dict[str, Tensor]:
        """One tensor an expert, as in the published checkpoints."""
        tensors = {}
        for name, tensor in super().tensors_to_save().items():
            found = _EXPERTS.fullmatch(name)
            if found is None:
                tensors[name] = tensor
                continue
            parts = _PARTS[found[2]]
            for expert, matrix in enumerate(tensor):
                for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
                    tensors[f"{found[1]}.{expert}.{part}.weight"] = rows
        return tensors


class _FusedExperts:
    """A checkpoint whose experts are tensors of their own, seen with the fused names.

    Layers beyond the config's (V3's multi-token prediction) are left out.
    """

    def __init__(self, source: files.WeightSource, config: DeepseekV2Config) -> None:
        self._source = source
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._members: dict[str, list[str]] = {}
        expert = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
        layer = re.compile(r"model\.layers\.(\d+)\..*")
        count = config.n_routed_experts
        for name, shape in source.shapes().items():
            place = layer.fullmatch(name)
            if place is not None and int(place[1]) >= config.num_hidden_layers:
                continue
            found = expert.fullmatch(name)
            if found is None or int(found[2]) >= count:
                self._shapes[name] = shape
                continue
            fused = "down_proj" if found[3] == "down_proj" else "gate_up_proj"
            self._members.setdefault(f"{found[1]}.{fused}", []).append(name)
        for name, members in list(self._members.items()):
            parts = _PARTS[name.rpartition(".")[2]]
            prefix = name.rpartition(".")[0]
            ordered = [f"{prefix}.{e}.{part}.weight" for e in range(count) for part in parts]
            shapes = {source.shapes()[member] for member in members}
            if {*ordered} != {*members} or len(shapes) != 1:
                # Said by the caller as it says it of any other tensor: by their names on disk.
                self._shapes |= {member: source.shapes()[member] for member in members}
                del self._members[name]
                continue
            rows, columns = shapes.pop()
            self._members[name] = ordered
            self._shapes[name] = (count, rows * len(parts), columns)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def where(self, name: str) -> str:
        return self._source.where(self._members.get(name, [name])[0])

    def read(self, name: str) -> Tensor:
        members = self._members.get(name)
        if members is None:
            return self._source.read(name)
        rows, columns = self._source.shapes()[members[0]]
        first = self._source.read(members[0])
        fused = first.new_empty((len(members), rows, columns))
        for place, member in enumerate(members):
            fused[place] = first if place == 0 else self._source.read(member)
        return fused.view(self._shapes[name])
