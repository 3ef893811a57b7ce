"""Pretraining with the recipe of the LLaMA paper (Touvron et al. 2023, section 2.3).

AdamW with betas 0.9 and 0.95, a linear warmup and a cosine down to a tenth of the learning rate,
weight decay 0.1 on the matrices, gradients clipped to norm 1.0. A run may be killed at any moment:
resumed, it goes on from its last checkpoint and gives the losses and weights, bit for bit, of a run
that was never stopped (on the CPU with the same number of threads; a GPU's own kernels may add in
another order).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from warploom.models.causal_lm import CausalLanguageModel
from warploom.models.directory import replace_directory
from warploom.ops._check import check_choice
from warploom.recipes import text_corpus
from warploom.recipes._config import check_whole_numbers
from warploom.recipes._pretrain_models import ARCHITECTURES, build_model
from warploom.recipes._processes import choose_device
from warploom.recipes._training_run import TrainingRun, parameter_groups, warmup_cosine
from warploom.recipes._windows import Windows, spread_windows


@dataclass(frozen=True)
class PretrainConfig:
    """All that a run depends on; ``warploom pretrain`` has one option for each field."""

    output: Annotated[Path, "Folder of the run: log, checkpoints, picture, model."]
    resume: Annotated[bool, "Continue the run that is in the output folder."] = False
    text: Annotated[
        Path | None, "UTF-8 text to train on; default: the documentation in CPython."
    ] = None
    vocab_size: Annotated[int, "Entries of the tokenizer that is trained on the text."] = 4096
    hidden_size: Annotated[int, "Width of the model."] = 256
    intermediate_size: Annotated[int, "Width of the feed-forward layers."] = 704
    num_hidden_layers: Annotated[int, "Number of layers."] = 4
    num_attention_heads: Annotated[int, "Query heads."] = 4
    num_key_value_heads: Annotated[int, "Key and value heads, a divisor of the query heads."] = 2
    architecture: Annotated[str, "llama, or deepseek-v2: latent attention and experts."] = "llama"
    kv_lora_rank: Annotated[int, "deepseek-v2: features of the latent that is cached."] = 64
    moe_intermediate_size: Annotated[int, "deepseek-v2: width inside an expert."] = 128
    n_routed_experts: Annotated[int, "deepseek-v2: experts of a layer that tokens choose from."] = 8
    n_shared_experts: Annotated[int, "deepseek-v2: experts that every token visits."] = 2
    num_experts_per_tok: Annotated[int, "deepseek-v2: experts that a token chooses."] = 3
    expert_balance: Annotated[float, "deepseek-v2: factor of the expert balance loss."] = 0.003
    tie_word_embeddings: Annotated[bool, "Use the embedding's matrix as output matrix too."] = True
    max_position_embeddings: Annotated[int, "Longest text that the model is told to handle."] = 1024
    sequence_length: Annotated[int, "Tokens of a training sequence."] = 256
    batch_size: Annotated[int, "Sequences of a forward pass."] = 4
    accumulation_steps: Annotated[int, "Forward passes of an optimiser step."] = 1
    steps: Annotated[int, "Optimiser steps in all."] = 1200
    warmup_steps: Annotated[int, "Steps of the linear warmup."] = 60
    learning_rate: Annotated[float, "Peak learning rate."] = 2e-3
    final_learning_rate_ratio: Annotated[float, "Last learning rate as a share of the peak."] = 0.1
    beta1: Annotated[float, "AdamW's decay of the first moment."] = 0.9
    beta2: Annotated[float, "AdamW's decay of the second moment."] = 0.95
    epsilon: Annotated[float, "AdamW's epsilon."] = 1e-8
    weight_decay: Annotated[float, "AdamW's weight decay, of the matrices only."] = 0.1
    clip_norm: Annotated[float, "Greatest norm of the gradient."] = 1.0
    bfloat16: Annotated[bool, "Autocast the forward and backward passes to bfloat16."] = False
    activation_checkpointing: Annotated[bool, "Recompute each layer in the backward pass."] = False
    validate_every: Annotated[int, "Steps between two validations."] = 100
    validation_sequences: Annotated[int, "Sequences of a validation."] = 32
    checkpoint_every: Annotated[int, "Steps between two checkpoints."] = 100
    seed: Annotated[int, "Seed of the weights and of the order of the data."] = 0
    device: Annotated[str, "cpu, cuda, or auto: cuda where there is one."] = "auto"

    def __post_init__(self) -> None:
        check_whole_numbers("pretrain", self)
        check_choice("pretrain", "architecture", self.architecture, ARCHITECTURES)


def learning_rate_at(config: PretrainConfig, step: int) -> float:
    """The learning rate of optimiser step ``step``, counted from 1; see ``warmup_cosine``."""
    return warmup_cosine(
        step,
        config.steps,
        peak=config.learning_rate,
        warmup_steps=config.warmup_steps,
        final_ratio=config.final_learning_rate_ratio,
    )


def pretrain(config: PretrainConfig) -> Path:
    """Train a language model from random weights on a text.

    Writes into ``config.output``: ``log.jsonl`` (a record per step: step, loss, learning_rate,
    grad_norm, tokens_per_second, and validation_loss where there was a validation), ``loss.png``,
    ``checkpoints/`` and, at the end, ``model/``.

    Returns: ``model/``, a Hugging Face directory: config.json, model.safetensors, tokenizer.json.

    Raises:
        FileExistsError: the output folder holds a run and ``config.resume`` is not set.
        ValueError: the run in the output folder was started with other settings or another text.
        FloatingPointError: the loss or the gradient is no longer finite.
    """
    return _Run(config).train()


class _Run(TrainingRun):
    name = "pretrain"
    title = "Pretraining"
    free_fields = frozenset({"output", "resume", "text", "checkpoint_every"})

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config, "model")
        self.steps = config.steps
        self.device = choose_device(config.device)
        self.tokenizer_directory, streams = self._prepare_text()
        self.text_digest = streams.digest
        self.windows = Windows(streams.train, config.sequence_length, config.seed)
        self.validation = spread_windows(
            streams.validation, config.sequence_length, config.validation_sequences
        )
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            tokenizer = text_corpus.load_tokenizer(self.tokenizer_directory)
            self.model: CausalLanguageModel = build_model(config, tokenizer).to(self.device).train()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )

    def learning_rate_at(self, step: int) -> float:
        return learning_rate_at(self.config, step)

    def accumulate(self) -> tuple[Tensor, int]:
        config = self.config
        loss_sum = torch.zeros((), device=self.device)
        for _ in range(config.accumulation_steps):
            tokens = self.windows.batch(self.position, config.batch_size).to(self.device)
            self.position += config.batch_size
            loss = self._loss(tokens)
            (loss / config.accumulation_steps).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()
        tokens_read = config.accumulation_steps * config.batch_size * config.sequence_length
        return loss_sum / config.accumulation_steps, tokens_read

    def inputs(self) -> dict[str, Any]:
        return {"text": self.text_digest}

    def save_result(self) -> None:
        with replace_directory(self.result) as staging:
            self.model.save_pretrained(staging)
            for file in self.tokenizer_directory.iterdir():
                shutil.copy2(file, staging)

    @torch.no_grad()
    def validate(self) -> float:
        self.model.eval()
        batches = torch.split(self.validation, self.config.batch_size)
        losses = [self._loss(batch.to(self.device)).item() * len(batch) for batch in batches]
        self.model.train()
        return sum(losses) / len(self.validation)

    def _loss(self, tokens: Tensor) -> Tensor:
        """Mean cross entropy of tokens int64 [batch, sequence + 1], computed in float32."""
        enabled = self.config.bfloat16
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            logits = self.model(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def _prepare_text(self) -> tuple[Path, text_corpus.TokenStreams]:
        """The tokenizer's folder and the token streams; both are made once for a run."""
        config = self.config
        if config.text is None:
            documents = text_corpus.standard_library_documents()
        else:
            documents = text_corpus.file_documents(config.text)
        train, validation = text_corpus.split_documents(documents)
        directory = config.output / "tokenizer"
        if self.checkpoints.latest() is None:
            with replace_directory(directory) as staging:
                texts = (document.text for document in train)
                text_corpus.train_tokenizer(texts, staging, config.vocab_size)
        streams = text_corpus.token_streams(
            train,
            validation,
            text_corpus.load_tokenizer(directory),
            config.output / "tokens.safetensors",
        )
        return directory, streams
