"""The models that pretraining starts from: random weights in the shape that the settings give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from warploom.models.causal_lm import CausalLanguageModel
from warploom.models.deepseek_v2 import DeepseekV2
from warploom.models.deepseek_v2_config import DeepseekV2Config
from warploom.models.llama import Llama
from warploom.models.llama_config import LlamaConfig
from warploom.recipes import text_corpus

if TYPE_CHECKING:
    from warploom.recipes.pretrain import PretrainConfig

ARCHITECTURES = ("llama", "deepseek-v2")


def build_model(config: PretrainConfig, tokenizer: Any) -> CausalLanguageModel:
    """A model for the tokenizer's vocabulary, its residual matrices scaled."""
    shared: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": tokenizer.token_to_id(text_corpus.BEGIN_TOKEN),
        "eos_token_id": tokenizer.token_to_id(text_corpus.END_TOKEN),
        "pad_token_id": tokenizer.token_to_id(text_corpus.PADDING_TOKEN),
    }
    model: CausalLanguageModel
    if config.architecture == "llama":
        shape = LlamaConfig(**shared, num_key_value_heads=config.num_key_value_heads)
        model = Llama(shape, gradient_checkpointing=config.activation_checkpointing)
    else:
        model = DeepseekV2(
            _deepseek_shape(config, shared), gradient_checkpointing=config.activation_checkpointing
        )
    scale_residual_matrices(model)
    return model


def _deepseek_shape(config: PretrainConfig, shared: dict[str, Any]) -> DeepseekV2Config:
    """One dense layer, then experts; half of a head's query is rotated."""
    head_dim = config.hidden_size // config.num_attention_heads
    return DeepseekV2Config(
        **shared,
        q_lora_rank=None,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=head_dim,
        qk_rope_head_dim=head_dim // 2,
        v_head_dim=head_dim,
        moe_intermediate_size=config.moe_intermediate_size,
        n_routed_experts=config.n_routed_experts,
        n_shared_experts=config.n_shared_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        first_k_dense_replace=1,
        balance_alphas=(config.expert_balance, 0.0, 0.0),
    )


def scale_residual_matrices(model: CausalLanguageModel) -> None:
    """Divide the initial weights of the matrices that write to the residual stream, two a layer, by
    the square root of their number, as GPT-2 does (Radford et al. 2019, section 2.3).

    It keeps the stream's variance the same at every depth; a small model then learns faster.
    """
    factor = (2 * model.config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                parameter.mul_(factor)
