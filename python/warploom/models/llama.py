"""LLaMA 1, 2 and 3, Mistral, Qwen2 and Qwen3: the model, its checkpoints, and its `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from warploom.models import checkpoint as files
from warploom.models import generation, llama_meta
from warploom.models.directory import existing_directory, replace_directory
from warploom.models.llama_config import LlamaConfig
from warploom.nn import GroupedQueryAttention, KeyValueCache, RMSNorm, RotaryEmbedding, SwiGLU
from warploom.nn.attention import next_positions


class LlamaLayer(nn.Module):
    """One decoder layer, x + attention(norm(x)) and then x + mlp(norm(x)).

    It works on the pair (what the previous layer added, the residual stream before that), so
    that each addition is fused into the normalisation that follows it.
    """

    def __init__(self, config: LlamaConfig, index: int, **factory: Any) -> None:
        super().__init__()
        self.index = index
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = GroupedQueryAttention(
            size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            bias=config.attention_bias,
            output_bias=config.attention_output_bias,
            window=config.window(index),
            qk_norm_eps=config.qk_norm_eps,
            **factory,
        )
        self.mlp = SwiGLU(size, config.intermediate_size, bias=config.mlp_bias, **factory)
        self.input_layernorm = RMSNorm(size, eps, **factory)
        self.post_attention_layernorm = RMSNorm(size, eps, **factory)

    def forward(
        self,
        delta: Tensor,
        residual: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
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


class LlamaDecoder(nn.Module):
    """Embedding, layers and last norm; called `model` in transformers' state dict."""

    def __init__(self, config: LlamaConfig, **factory: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(
            LlamaLayer(config, index, **factory) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.rotary_emb = RotaryEmbedding(
            config.head_dim, config.max_position_embeddings, config.rope_parameters
        )
        self.gradient_checkpointing = False

    def forward(
        self,
        input_ids: Tensor,
        cache: KeyValueCache | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """input_ids int [B, S] -> the last hidden states [B, S, hidden]; the rest as in `Llama`."""
        delta, residual = self.embed_tokens(input_ids), None
        batch, count = input_ids.shape
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


class Llama(nn.Module):
    """A LLaMA language model (arXiv:2302.13971, 2307.09288, 2407.21783) or a relative: Mistral
    (2310.06825), Qwen2 (2407.10671), Qwen3 (2505.09388).

    The state dict has the names of transformers' `LlamaForCausalLM` and its like. Weights are drawn from
    N(0, initializer_range) as there; on the meta device nothing is drawn.

    Args:
        config: the shape; `LlamaConfig.preset(name)` has the published ones.
        gradient_checkpointing: recompute each layer in the backward pass of a training step
            instead of keeping its activations; also an attribute.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        gradient_checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory = {"device": device, "dtype": dtype}
        self.model = LlamaDecoder(config, **factory)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, **factory)
        self.gradient_checkpointing = gradient_checkpointing
        self.tie_weights()
        self.reset_parameters()

    @property
    def gradient_checkpointing(self) -> bool:
        return self.model.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.model.gradient_checkpointing = value

    def tie_weights(self) -> None:
        """Makes the output projection the embedding's weight where the config ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all weights anew: normal matrices, zero biases, unit norms."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)

    def forward(
        self,
        input_ids: Tensor,
        cache: KeyValueCache | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """input_ids int64 or int32 [B, S] -> logits [B, S, vocab_size] in the weights' dtype.

        Rows shorter than S are padded at the end: attention is causal, so padding there changes
        nothing before it.

        Args:
            cache: holds the tokens before these; the caller then calls `cache.advance`.
            cu_seqlens: int32 [N + 1], from 0 to B S: the tokens, row after row, are N documents
                that do not see each other, each with positions from 0; with a cache the
                continuations of its rows (`KeyValueCache.pack`).
            max_seqlen: at least the longest document; None: B S. "dynamic" rotary scaling takes it
                for the length of the text, and so a static cache's capacity.
        """
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                "Llama: input_ids: expected int64 or int32 [batch, sequence], got "
                f"{input_ids.dtype} {tuple(input_ids.shape)}"
            )
        logits: Tensor = self.lm_head(self.model(input_ids, cache, cu_seqlens, max_seqlen))
        return logits

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

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Llama:
        """Loads a transformers directory, or one in Meta's layout (params.json).

        The module is made on the meta device and takes over one tensor after the other, so the
        peak is the model plus its largest tensor.

        Args:
            directory: config.json with safetensors or PyTorch files, sharded or not; or
                params.json with consolidated.NN.pth.
            device: where the weights go.
            dtype: floating dtype of the weights; None keeps what is stored.

        Raises:
            FileNotFoundError: no such directory, or a file that it should hold is not there.
            CheckpointError: a truncated file, missing or unexpected tensors, wrong shapes; the
                message names the file and the tensors, expected and got.
        """
        directory = existing_directory(directory)
        if (directory / "params.json").is_file() and not (directory / "config.json").is_file():
            config, source = llama_meta.open_checkpoint(directory)
        else:
            config = files.read_config(directory / "config.json", LlamaConfig.from_dict)
            source = files.open_weights(directory)
        model = cls(config, device="meta")
        aliases = {"lm_head.weight": "model.embed_tokens.weight"}
        files.assign_weights(
            model,
            source,
            device=device,
            dtype=dtype,
            aliases=aliases if config.tie_word_embeddings else {},
            ignored=(r".*rotary_emb\.inv_freq",),
        )
        model.tie_weights()
        return model

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
        tensors = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        if layout == "meta":
            llama_meta.save_checkpoint(directory, self.config, tensors, model_parallel_size)
            return
        with replace_directory(directory) as staging:
            files.write_config(staging / "config.json", self._config_to_save())
            files.write_safetensors(staging, tensors, files.parse_size(max_shard_size))

    def _config_to_save(self) -> dict[str, Any]:
        dtype = str(self.model.embed_tokens.weight.dtype).removeprefix("torch.")
        return {**self.config.to_dict(), "dtype": dtype, "torch_dtype": dtype}
