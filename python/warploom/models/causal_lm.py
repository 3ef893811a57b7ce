"""What every decoder-only language model here shares: its head, checkpoints, generation.

A model gives its layers; `Llama` and `DeepseekV2` are the examples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from warploom.models import checkpoint as files
from warploom.models import generation, loss
from warploom.models.decoder import Decoder, DecoderLayer
from warploom.models.directory import existing_directory, replace_directory
from warploom.nn import PagedKeyValueCache, RMSNorm, StaticKeyValueCache
from warploom.nn.token_cache import CacheKind, TokenCache

if TYPE_CHECKING:
    from typing_extensions import Self  # in `typing` from Python 3.11 on


class CausalLanguageModel(nn.Module, ABC):
    """A decoder with a head over the vocabulary, and the names of transformers' state dict.

    Weights are drawn from N(0, initializer_range) as there; on the meta device nothing is drawn.

    Args:
        config: the shape.
        gradient_checkpointing: recompute each layer in the backward pass of a training step
            instead of keeping its activations; also an attribute.
    """

    #: The class of the config, which reads config.json.
    config_type: ClassVar[Any]

    def __init__(
        self,
        config: Any,
        *,
        gradient_checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory = {"device": device, "dtype": dtype}
        layers = [self.make_layer(index, **factory) for index in range(config.num_hidden_layers)]
        self.model = Decoder(config, layers, **factory)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, **factory)
        self.gradient_checkpointing = gradient_checkpointing
        self.tie_weights()
        self.reset_parameters()

    @abstractmethod
    def make_layer(self, index: int, **factory: Any) -> DecoderLayer:
        """The layer at place `index`, of `self.config`."""

    def make_cache(self, kind: CacheKind, batch_size: int, capacity: int) -> TokenCache:
        """What `generate` decodes from: pages, or a static cache of `capacity` tokens a row."""
        layers, device = self.config.num_hidden_layers, self.lm_head.weight.device
        if kind == "paged":
            return PagedKeyValueCache(layers, batch_size, device=device)
        return StaticKeyValueCache(layers, batch_size, capacity, device=device)

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
        cache: TokenCache | None = None,
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
                continuations of its rows (`TokenCache.pack`).
            max_seqlen: at least the longest document; None: B S. "dynamic" rotary scaling takes it
                for the length of the text, and so a static cache's capacity.
        """
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"{type(self).__name__}: input_ids: expected int64 or int32 [batch, sequence], got "
                f"{input_ids.dtype} {tuple(input_ids.shape)}"
            )
        logits: Tensor = self.lm_head(self.model(input_ids, cache, cu_seqlens, max_seqlen))
        return logits

    def loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Cross-entropy of the logits; see `warploom.models.loss.next_token_loss`."""
        return loss.next_token_loss(self, input_ids, targets, cu_seqlens, max_seqlen, **options)

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
    def open_checkpoint(cls, directory: Path) -> tuple[Any, files.WeightSource]:
        """The config of a model directory, and its tensors under this model's names."""
        config = files.read_config(directory / "config.json", cls.config_type.from_dict)
        return config, files.open_weights(directory)

    def tensors_to_save(self) -> dict[str, Tensor]:
        """The state under the names that a transformers directory has."""
        tensors = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        return tensors

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Loads a transformers directory.

        The module is made on the meta device and takes over one tensor after the other, so the
        peak is the model plus its largest tensor.

        Args:
            directory: config.json with safetensors or PyTorch files, sharded or not.
            device: where the weights go.
            dtype: floating dtype of the weights; None keeps what is stored.

        Raises:
            FileNotFoundError: no such directory, or a file that it should hold is not there.
            CheckpointError: a truncated file, missing or unexpected tensors, wrong shapes; the
                message names the file and the tensors, expected and got.
        """
        config, source = cls.open_checkpoint(existing_directory(directory))
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

    def save_pretrained(self, directory: str | Path, *, max_shard_size: int | str = "5GB") -> None:
        """Saves a directory that `from_pretrained`, here and in transformers, reads.

        The directory is replaced in one step when everything is on disk: a run that is killed
        while saving leaves what was there. Other files in it (a tokenizer) stay.

        Args:
            max_shard_size: largest weight file, in bytes or as "500MB", "5GB".
        """
        dtype = str(self.model.embed_tokens.weight.dtype).removeprefix("torch.")
        config = {**self.config.to_dict(), "dtype": dtype, "torch_dtype": dtype}
        with replace_directory(directory) as staging:
            files.write_config(staging / "config.json", config)
            files.write_safetensors(
                staging, self.tensors_to_save(), files.parse_size(max_shard_size)
            )
