"""Small random DeepSeek models in transformers and here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from warploom.models.deepseek_v2 import DeepseekV2
from warploom.models.deepseek_v2_config import DeepseekV2Config

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 32,
}
SHAPE = {
    "vocab_size": 192,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "max_position_embeddings": 128,
    "rope_parameters": YARN,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
}
#: The models that parity is shown for, each with what differs.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("v2", {"topk_method": "group_limited_greedy"}),
    "v2-lite": ("v2", {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    "v2-without-yarn": ("v2", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "v2-biases": ("v2", {"attention_bias": True, "tie_word_embeddings": True}),
    "v3": ("v3", {"norm_topk_prob": True, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "v3-not-normalised": ("v3", {"norm_topk_prob": False, "n_shared_experts": 1}),
}  # fmt: skip


def peer(variant: str) -> Any:
    """A random model of transformers; its norms, biases and correction biases are random too."""
    kind, changes = VARIANTS[variant]
    config_type, model_type = {
        "v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
        "v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
    }[kind]
    torch.manual_seed(0)
    model = model_type(config_type(**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name or name.endswith("bias"):
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def pair(variant: str, directory: Path) -> tuple[Any, DeepseekV2]:
    """A model of transformers, and ours loaded from the directory that it saved."""
    theirs = peer(variant)
    theirs.save_pretrained(directory)
    return theirs, DeepseekV2.from_pretrained(directory).eval()


def tiny_deepseek(seed: int = 1, **changes: Any) -> DeepseekV2:
    torch.manual_seed(seed)
    fields = {**SHAPE, "topk_method": "group_limited_greedy", "num_hidden_layers": 2}
    return DeepseekV2(DeepseekV2Config(**{**fields, **changes}))
