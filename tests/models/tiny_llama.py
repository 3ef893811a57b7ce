"""The shapes that the model tests share."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from warploom.models.llama import Llama
from warploom.models.llama_config import LlamaConfig

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def transformers_config(rope: str = "llama3", **changes: Any) -> transformers.LlamaConfig:
    fields = {
        "vocab_size": 192,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_parameters": dict(ROPE[rope]),
        "initializer_range": 0.0625,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return transformers.LlamaConfig(**{**fields, **changes})


def tiny_llama(seed: int = 1, **changes: Any) -> Llama:
    """A random Llama with two query heads for each key/value head."""
    fields = {
        "vocab_size": 192,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(seed)
    return Llama(LlamaConfig(**{**fields, **changes}))
