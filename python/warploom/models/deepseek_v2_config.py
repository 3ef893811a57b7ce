"""The shape of a DeepSeek-V2 or V3: transformers' config.json and the published sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from warploom.models.config_fields import (
    complete_rope,
    old_rope_fields,
    read_fields,
    token_ids,
)
from warploom.nn.rope import yarn_softmax_factor

#: transformers' defaults of each model type, where a config.json may leave a field out.
_MODEL_TYPES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {},
    "deepseek_v3": {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}


@dataclass
class DeepseekV2Config:
    """Fields and defaults of transformers' `DeepseekV2Config`; model_type "deepseek_v3" is V3.

    V2 routes by a softmax, without (topk_method "greedy") or with groups ("group_limited_greedy"); V3 by
    a sigmoid with a correction bias. The first `first_k_dense_replace` layers have a dense feed-forward
    block. `balance_alphas` are the factors of the expert, device and communication balance losses in
    training (`warploom.nn.moe.BalanceLoss`); without `latent_norm` the latent of keys and values is not
    normalised (`warploom.convert`). transformers has neither.
    """

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    n_shared_experts: int = 2
    n_routed_experts: int = 64
    routed_scaling_factor: float = 1.0
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    topk_method: str = "greedy"
    n_group: int = 1
    topk_group: int = 1
    num_experts_per_tok: int = 6
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    rope_interleave: bool = True
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None
    model_type: str = "deepseek_v2"
    balance_alphas: tuple[float, float, float] = (0.0, 0.0, 0.0)
    latent_norm: bool = True

    def __post_init__(self) -> None:
        if self.model_type not in _MODEL_TYPES:
            raise ValueError(
                f"model_type: expected one of {', '.join(_MODEL_TYPES)}, got {self.model_type!r}"
            )
        if self.topk_method not in ("greedy", "group_limited_greedy", "noaux_tc"):
            raise ValueError(
                "topk_method: expected greedy, group_limited_greedy or noaux_tc, got "
                f"{self.topk_method!r}"
            )
        if not self.rope_interleave:
            raise ValueError("rope_interleave: expected true, got false")
        self.balance_alphas = (*self.balance_alphas,)
        self.rope_parameters = complete_rope(self.rope_parameters, self.max_position_embeddings)

    @property
    def is_v3(self) -> bool:
        return self.model_type == "deepseek_v3"

    @property
    def has_groups(self) -> bool:
        """Whether a token reaches only some groups of experts."""
        return self.is_v3 or self.topk_method == "group_limited_greedy"

    @property
    def rotary_head_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """(nope + rope) ** -0.5, times the square of YaRN's temperature where the config has one."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        return float(scale * yarn_softmax_factor(self.rope_parameters))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text."""
        return token_ids(self.eos_token_id)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> DeepseekV2Config:
        """The published shape `name`, a key of `PRESETS`, with fields changed by keyword."""
        if name not in PRESETS:
            raise ValueError(
                f"DeepseekV2Config: expected one of {', '.join(PRESETS)}, got {name!r}"
            )
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeepseekV2Config:
        """Reads a config.json, with `rope_parameters` or with `rope_theta` and `rope_scaling`."""
        return cls(**read_fields(cls, values, _MODEL_TYPES, nullable=("q_lora_rank",)))

    def to_dict(self) -> dict[str, Any]:
        """A config.json that transformers reads, with the old rope fields beside the new one."""
        values = dataclasses.asdict(self)
        if not self.is_v3:
            del values["rope_interleave"]
        return {
            "architectures": [f"Deepseek{'V3' if self.is_v3 else 'V2'}ForCausalLM"],
            "hidden_act": "silu",
            **values,
            "num_key_value_heads": self.num_attention_heads,
            **old_rope_fields(self.rope_parameters),
        }


def _yarn(mscale: float) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096,
    }


_V2 = {
    "max_position_embeddings": 163840,
    "first_k_dense_replace": 1,
    "rope_parameters": _yarn(0.707),
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}
PRESETS: dict[str, dict[str, Any]] = {
    "deepseek-v2": {
        **_V2,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "n_routed_experts": 160,
        "routed_scaling_factor": 16.0,
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
    },
    "deepseek-v2-lite": {
        **_V2,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "q_lora_rank": None,
    },
    "deepseek-v3": {
        **_MODEL_TYPES["deepseek_v3"],
        "model_type": "deepseek_v3",
        "topk_method": "noaux_tc",
        "max_position_embeddings": 163840,
        "rope_parameters": _yarn(1.0),
    },
}
