"""Models of transformers with random weights, a few thousand parameters each."""

from __future__ import annotations

from typing import Any

import torch
import transformers

WINDOW = 5
VOCABULARY = 61

_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_EXPERTS = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}

#: Class and configuration, what is special about it beside.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _DECODER),
    "qwen2": ("Qwen2ForCausalLM", _DECODER),
    # All layers have a window.
    "mistral": ("MistralForCausalLM", {**_DECODER, "sliding_window": WINDOW}),
    # RMSNorm on queries and keys, a head dim of its own.
    "qwen3": ("Qwen3ForCausalLM", {**_DECODER, "head_dim": 16}),
    # Every other layer has a window; soft-cap.
    "gemma2": (
        "Gemma2ForCausalLM",
        {**_DECODER, "head_dim": 8, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0,
         "query_pre_attn_scalar": 8},
    ),
    # Every other layer has a window; sinks.
    "gpt_oss": (
        "GptOssForCausalLM",
        {**_DECODER, "head_dim": 8, "sliding_window": WINDOW, "num_local_experts": 2,
         "num_experts_per_tok": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    # The last layer has a window, of which its attention is not told.
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**_DECODER, **_EXPERTS, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1,
         "num_experts": 2, "num_experts_per_tok": 1},
    ),
    # The first layer sees chunks of WINDOW tokens, which are no window though one is named.
    "llama4": (
        "Llama4ForCausalLM",
        {**_DECODER, "head_dim": 8, "attention_chunk_size": WINDOW, "sliding_window": WINDOW,
         "no_rope_layers": [1, 0], "num_local_experts": 2, "intermediate_size_mlp": 48},
    ),
    "bert": ("BertForMaskedLM", _ENCODER),
    # Every other layer sees WINDOW - 1 keys to either side.
    "modernbert": (
        "ModernBertForMaskedLM",
        {**_ENCODER, "local_attention": 2 * (WINDOW - 1), "global_attn_every_n_layers": 2, "cls_token_id": 1,
         "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
    ),
    # An encoder, a decoder, attention from one to the other; relative positions as a bias.
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
         "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": None},
    ),
}  # fmt: skip
DECODERS = ["llama", "qwen2", "mistral", "qwen3", "gemma2", "gpt_oss", "qwen2_moe"]


def build(name: str, **changes: Any) -> Any:
    """The model in evaluation mode, eager; its weights are large enough for sharp attention."""
    class_name, options = MODELS[name]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**{**options, **changes})
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25, generator=generator)
            else:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model
