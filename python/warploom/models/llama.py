"""LLaMA 1, 2 and 3, Mistral, Qwen2 and Qwen3: the model and its checkpoints in both layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from warploom.models import checkpoint as files
from warploom.models import llama_meta
from warploom.models.causal_lm import CausalLanguageModel
from warploom.models.decoder import DecoderLayer
from warploom.models.llama_config import LlamaConfig
from warploom.nn import GroupedQueryAttention, SwiGLU


class Llama(CausalLanguageModel):
    """A LLaMA language model (arXiv:2302.13971, 2307.09288, 2407.21783) or a relative: Mistral
    (2310.06825), Qwen2 (2407.10671), Qwen3 (2505.09388).

    The state dict has the names of transformers' `LlamaForCausalLM` and its like.
    `LlamaConfig.preset(name)` has the published shapes; the arguments are `CausalLanguageModel`'s.
    """

    config: LlamaConfig
    config_type = LlamaConfig

    def make_layer(self, index: int, **factory: Any) -> DecoderLayer:
        config = self.config
        attention = GroupedQueryAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            bias=config.attention_bias,
            output_bias=config.attention_output_bias,
            window=config.window(index),
            qk_norm_eps=config.qk_norm_eps,
            **factory,
        )
        mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, **factory)
        return DecoderLayer(index, attention, mlp, config, **factory)

    @classmethod
    def open_checkpoint(cls, directory: Path) -> tuple[LlamaConfig, files.WeightSource]:
        """A transformers directory, or one in Meta's layout: params.json, consolidated.NN.pth."""
        if (directory / "params.json").is_file() and not (directory / "config.json").is_file():
            return llama_meta.open_checkpoint(directory)
        return super().open_checkpoint(directory)

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        layout: str = "huggingface",
        max_shard_size: int | str = "5GB",
        model_parallel_size: int = 1,
    ) -> None:
        """Saves a directory that `from_pretrained`, here and in the layout's library, reads.

        The directory is replaced in one step when everything is on disk: a run that is killed
        while saving leaves what was there. Other files in it (a tokenizer) stay.

        Args:
            layout: "huggingface" (config.json, safetensors) or "meta" (params.json,
                consolidated.NN.pth).
            max_shard_size: largest weight file of the first, in bytes or as "500MB", "5GB".
            model_parallel_size: files of the second, a divisor of the key/value heads.
        """
        if layout not in ("huggingface", "meta"):
            raise ValueError(f"layout: expected 'huggingface' or 'meta', got {layout!r}")
        if layout == "meta":
            tensors = self.tensors_to_save()
            llama_meta.save_checkpoint(directory, self.config, tensors, model_parallel_size)
        else:
            super().save_pretrained(directory, max_shard_size=max_shard_size)
