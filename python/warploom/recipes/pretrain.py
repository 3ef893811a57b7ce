"""Pretraining with the recipe of the LLaMA paper (Touvron et al. 2023, section 2.3).

AdamW with betas 0.9 and 0.95, a linear warmup and a cosine down to a tenth of the learning rate,
weight decay 0.1 on the matrices, gradients clipped to norm 1.0. A run may be killed at any moment:
resumed, it goes on from its last checkpoint and gives the losses and weights, bit for bit, of a run
that was never stopped (on the CPU with the same number of threads; a GPU's own kernels may add in
another order).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warploom.models.directory import replace_directory
from warploom.recipes import text_corpus
from warploom.recipes._checkpoints import Checkpoints
from warploom.recipes._extras import make_console, require
from warploom.recipes._pretrain_models import ARCHITECTURES, build_model
from warploom.recipes._training_log import TrainingLog, plot_losses, read_log
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
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("warmup_steps", "seed") else 1
            if type(value) is int and value < least:
                raise ValueError(f"pretrain: {field.name}: expected at least {least}, got {value}")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"pretrain: architecture: expected one of {', '.join(ARCHITECTURES)}, got "
                f"{self.architecture!r}"
            )


_EXTRAS = ("tokenizers", "rich", "matplotlib")

#: Fields that may differ when a run is resumed: they do not change what it computes.
_FREE_FIELDS = frozenset({"output", "resume", "text", "checkpoint_every"})


def learning_rate_at(config: PretrainConfig, step: int) -> float:
    """The learning rate of optimiser step ``step`` (from 1): linear warmup, then half a cosine.

    It is the peak at the end of the warmup and ``final_learning_rate_ratio`` of the peak at the
    last step.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    ratio = config.final_learning_rate_ratio
    return config.learning_rate * (ratio + (1.0 - ratio) * cosine)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups: weight decay on matrices, none on vectors (the norms' weights)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


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


class _Run:
    """A pretraining run between its start, or its last checkpoint, and its end."""

    def __init__(self, config: PretrainConfig) -> None:
        for package in _EXTRAS:  # a run must not end for want of what draws its picture
            require(package)
        self.config = config
        self.checkpoints = Checkpoints(config.output / "checkpoints")
        self.log_path = config.output / "log.jsonl"
        self.model_directory = config.output / "model"
        if not config.resume and (self.log_path.exists() or self.checkpoints.latest() is not None):
            raise FileExistsError(
                f"pretrain: output: {config.output} holds a run; resume it or name another folder"
            )
        config.output.mkdir(parents=True, exist_ok=True)
        name = config.device
        self.device = torch.device(
            name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        )
        self.tokenizer_directory, streams = self._prepare_text()
        self.text_digest = streams.digest
        self.windows = Windows(streams.train, config.sequence_length, config.seed)
        self.validation = spread_windows(
            streams.validation, config.sequence_length, config.validation_sequences
        )
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            tokenizer = text_corpus.load_tokenizer(self.tokenizer_directory)
            self.model = build_model(config, tokenizer).to(self.device).train()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )
        self.position = 0  # windows read so far

    def train(self) -> Path:
        config = self.config
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            done = self._restore()
            if self.model_directory.exists():
                return self.model_directory
            with (
                closing(TrainingLog(self.log_path, done)) as log,
                _progress_bar(config.steps, done) as advance,
            ):
                for step in range(done + 1, config.steps + 1):
                    record = self._train_step(step)
                    if step % config.validate_every == 0 or step == config.steps:
                        record["validation_loss"] = self._validate()
                    log.append(record)
                    if step % config.checkpoint_every == 0 or step == config.steps:
                        log.sync()
                        self.checkpoints.save(step, self._state(step))
                    advance(record)
        plot_losses(read_log(self.log_path), config.output / "loss.png")
        self._save_model()
        return self.model_directory

    def _train_step(self, step: int) -> dict[str, Any]:
        """One optimiser step; returns its record for the log."""
        config = self.config
        start = time.perf_counter()
        rate = learning_rate_at(config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss_sum = torch.zeros((), device=self.device)
        for _ in range(config.accumulation_steps):
            tokens = self.windows.batch(self.position, config.batch_size).to(self.device)
            self.position += config.batch_size
            loss = self._loss(tokens)
            (loss / config.accumulation_steps).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        mean_loss, grad_norm = loss_sum.item() / config.accumulation_steps, norm.item()
        if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            raise FloatingPointError(
                f"pretrain: step {step}: loss {mean_loss}, gradient norm {grad_norm}: "
                f"expected finite numbers; lower the learning rate ({rate:g})"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        tokens_read = config.accumulation_steps * config.batch_size * config.sequence_length
        return {
            "step": step,
            "loss": mean_loss,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "tokens_per_second": round(tokens_read / (time.perf_counter() - start), 1),
        }

    def _loss(self, tokens: Tensor) -> Tensor:
        """Mean cross entropy of tokens int64 [batch, sequence + 1], computed in float32."""
        enabled = self.config.bfloat16
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            logits = self.model(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    @torch.no_grad()
    def _validate(self) -> float:
        self.model.eval()
        batches = torch.split(self.validation, self.config.batch_size)
        losses = [self._loss(batch.to(self.device)).item() * len(batch) for batch in batches]
        self.model.train()
        return sum(losses) / len(self.validation)

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

    def _state(self, step: int) -> dict[str, Any]:
        """All that the rest of the run depends on; the learning rate is a function of the step."""
        return {
            "step": step,
            "position": self.position,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "settings": self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        settings = {
            name: value for name, value in asdict(self.config).items() if name not in _FREE_FIELDS
        }
        return settings | {"text": self.text_digest, "device": self.device.type}

    def _restore(self) -> int:
        """Take up the newest checkpoint, if there is one; returns the number of steps done."""
        step = self.checkpoints.latest()
        if step is None:
            return 0
        state = self.checkpoints.load(step)
        for name, value in self._settings().items():
            saved = state["settings"].get(name)
            if saved != value:
                raise ValueError(
                    f"pretrain: {name}: {self.config.output} began with {saved!r}, got {value!r}"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.position = state["position"]
        return step

    def _save_model(self) -> None:
        """Put the model and its tokenizer in place in one step: then the run is complete."""
        with replace_directory(self.model_directory) as staging:
            self.model.save_pretrained(staging)
            for file in self.tokenizer_directory.iterdir():
                shutil.copy2(file, staging)


@contextmanager
def _progress_bar(steps: int, done: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on a terminal, a line per validation elsewhere; yields what takes the records."""
    console = make_console()
    progress = require("rich.progress")
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[loss]}"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("pretraining", total=steps, completed=done, loss="")

        def advance(record: dict[str, Any]) -> None:
            speed = f"{record['tokens_per_second']:.0f} tokens/s"
            bar.update(task, advance=1, loss=f"loss {record['loss']:.3f}, {speed}")
            if "validation_loss" in record:
                console.print(
                    f"step {record['step']}/{steps}: loss {record['loss']:.3f}, "
                    f"validation {record['validation_loss']:.3f}, {speed}",
                    highlight=False,
                )

        yield advance
