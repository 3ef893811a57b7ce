"""Supervised fine-tuning on instructions, as Stanford Alpaca did with LLaMA: all parameters, LoRA or QLoRA.

Taori et al., Stanford Alpaca (2023), trained LLaMA-7B for 3 epochs of 52 thousand examples: 128 a step,
learning rate 2e-5, no weight decay, warmup over 3 % of the steps and a cosine down to 0, at most 512 tokens,
bfloat16.
For adapters the learning rate is QLoRA's (arXiv:2305.14314, appendix B), 2e-4.

The loss of a step is the mean over all its answers' tokens, however they lie in batches and processes. A run
may be killed at any moment: resumed, it goes on from its last checkpoint, in one process on the CPU to the
same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from warploom.lora import save_adapter
from warploom.models.directory import replace_directory
from warploom.ops._check import check_choice
from warploom.recipes import _processes as processes
from warploom.recipes import instruction_data as data
from warploom.recipes._config import check_whole_numbers
from warploom.recipes._fine_tune_models import DTYPES, METHODS, build_model, whole_model
from warploom.recipes._tokenizer_files import copy_tokenizer
from warploom.recipes._training_run import TrainingRun, parameter_groups, warmup_cosine
from warploom.recipes.instruction_data import Batch, Example, ShuffledExamples
from warploom.recipes.text_corpus import load_tokenizer
from warploom.reference.quantization import FORMATS

_LEARNING_RATES = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}


@dataclass(frozen=True)
class FineTuneConfig:
    """All that a run depends on; ``warploom sft`` has one option for each field."""

    model: Annotated[Path, "Hugging Face directory with a tokenizer.json: the model to start from."]
    data: Annotated[Path, "JSON list of {instruction, input, output}."]
    output: Annotated[Path, "Folder of the run: log, checkpoints, picture, model or adapter."]
    resume: Annotated[bool, "Continue the run that is in the output folder."] = False
    method: Annotated[str, "full, lora, or qlora: adapters on weights in 4 bits."] = "lora"
    lora_r: Annotated[int, "Rank of the adapters."] = 16
    lora_alpha: Annotated[float, "Adapters are scaled by this, divided by their rank."] = 32.0
    lora_dropout: Annotated[float, "Share of an adapter's input that is dropped."] = 0.05
    lora_target_modules: Annotated[
        str, "all-linear, names with commas between them, or a regular expression."
    ] = "all-linear"
    use_rslora: Annotated[bool, "Divide by the root of the rank instead."] = False
    use_dora: Annotated[bool, "Adapters of direction and magnitude (DoRA)."] = False
    quantization: Annotated[str, "qlora: nf4, int8 or fp8_e4m3."] = "nf4"
    epochs: Annotated[float, "Times that each example is read."] = 3.0
    steps: Annotated[int | None, "Optimiser steps; default: those of the epochs."] = None
    batch_size: Annotated[int, "Examples of a forward pass, in each process."] = 4
    accumulation_steps: Annotated[int, "Forward passes of an optimiser step."] = 32
    learning_rate: Annotated[float | None, "Peak; default: 2e-5, of adapters 2e-4."] = None
    warmup_ratio: Annotated[float, "Share of the steps that warm up."] = 0.03
    weight_decay: Annotated[float, "AdamW's weight decay, of the matrices only."] = 0.0
    clip_norm: Annotated[float, "Greatest norm of the gradient."] = 1.0
    max_length: Annotated[int, "Most tokens of an example; the rest is cut off."] = 512
    packing: Annotated[bool, "Examples one after another instead of padded rows."] = True
    fused_loss: Annotated[bool, "Never store all logits."] = True
    dtype: Annotated[str, "Of the weights: float32, bfloat16, or auto: as stored."] = "auto"
    bfloat16: Annotated[bool, "Autocast the forward and backward passes to bfloat16."] = False
    gradient_checkpointing: Annotated[bool, "Recompute each layer in the backward pass."] = False
    validation: Annotated[Path | None, "JSON like the data's to measure the loss on."] = None
    validate_every: Annotated[int, "Steps between two validations."] = 100
    checkpoint_every: Annotated[int, "Steps between two checkpoints."] = 100
    seed: Annotated[int, "Seed of the adapters and of the order of the data."] = 0
    device: Annotated[str, "cpu, cuda, or auto: cuda where there is one."] = "auto"

    def __post_init__(self) -> None:
        check_whole_numbers("sft", self)
        check_choice("sft", "method", self.method, METHODS)
        check_choice("sft", "dtype", self.dtype, DTYPES)
        check_choice(
            "sft", "quantization", self.quantization, [name for name in FORMATS if name != "dense"]
        )
        if self.epochs <= 0 or not 0 <= self.warmup_ratio < 1:
            raise ValueError(
                "sft: epochs, warmup_ratio: expected more than 0 and a share in [0, 1), got "
                f"{self.epochs} and {self.warmup_ratio}"
            )


def fine_tune(config: FineTuneConfig) -> Path:
    """Fine-tune a model on instructions; under torchrun its parameters are sharded over the processes.

    Writes into ``config.output``: ``log.jsonl`` (a record per step: step, loss, learning_rate, grad_norm,
    tokens_per_second, and validation_loss where there was a validation), ``loss.png``, ``checkpoints/`` and,
    at the end, ``model/`` or ``adapter/``.

    Returns: ``model/``, a Hugging Face directory, or ``adapter/``, one that peft reads, with the tokenizer.

    Raises:
        FileExistsError: the output folder holds a run and ``config.resume`` is not set.
        ValueError: data of another form; the run in the output folder began with other settings or data.
        FloatingPointError: the loss or the gradient is no longer finite.
    """
    with processes.joined_processes(config.device):
        return _Run(config).train()


class _Run(TrainingRun):
    name = "sft"
    title = "Fine-tuning"
    free_fields = frozenset({"output", "resume", "data", "validation", "checkpoint_every"})

    def __init__(self, config: FineTuneConfig) -> None:
        super().__init__(config, "model" if config.method == "full" else "adapter")
        self.device = processes.choose_device(config.device)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # the adapters are drawn alike in all processes
            self.model = build_model(config, self.device, self.world_size)
        self._digests: dict[str, Any] = {}
        self.examples = ShuffledExamples(self._read("data", config.data), config.seed)
        self.validation = self._read("validation", config.validation)
        read_in_a_step = config.batch_size * config.accumulation_steps * self.world_size
        epochs = math.ceil(config.epochs * len(self.examples.examples) / read_in_a_step)
        self.steps = config.steps or epochs
        self.peak = config.learning_rate or _LEARNING_RATES[config.method]
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay), lr=self.peak, fused=True
        )

    def learning_rate_at(self, step: int) -> float:
        warmup_steps = math.ceil(self.config.warmup_ratio * self.steps)
        return warmup_cosine(
            step, self.steps, peak=self.peak, warmup_steps=warmup_steps, final_ratio=0.0
        )

    def accumulate(self) -> tuple[Tensor, int]:
        batches = list(self._step_batches())
        tokens = sum(batch.input_ids.numel() for batch in batches)
        counts = torch.tensor(
            [sum(batch.target_count for batch in batches), tokens], device=self.device
        )
        count, tokens = processes.sum_over_processes(counts).tolist()
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = self._loss(batch)
            # Gradients are averaged over the processes, and shall be those of the mean over all tokens.
            (loss * (self.world_size / count)).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return processes.sum_over_processes(total) / count, tokens

    @torch.no_grad()
    def validate(self) -> float | None:
        """Every process measures all of it: sharded models are called equally often everywhere."""
        if not self.validation:
            return None
        self.model.eval()
        size = self.config.batch_size
        starts = range(0, len(self.validation), size)
        batches = [self._batch(self.validation[start : start + size]) for start in starts]
        total = sum(self._loss(batch).item() for batch in batches)
        self.model.train()
        return total / sum(batch.target_count for batch in batches)

    def inputs(self) -> dict[str, Any]:
        return dict(self._digests)

    def trained_tensors(self) -> dict[str, Tensor]:
        trained = {name for name, value in self.model.named_parameters() if value.requires_grad}
        return {name: value for name, value in self.model.state_dict().items() if name in trained}

    def save_result(self) -> None:
        model = self.model if self.world_size == 1 else whole_model(self.model)
        if self.rank == 0:
            with replace_directory(self.result) as staging:
                if self.config.method == "full":
                    model.save_pretrained(staging)
                else:
                    save_adapter(model, staging)
                copy_tokenizer(self.config.model, staging)
        processes.wait()

    def _read(self, name: str, path: Path | None) -> list[Example]:
        """The tokens of a file of examples; their digest is noted."""
        if path is None:
            return []
        examples = data.read_instructions(path)
        self._digests[name] = data.digest(examples)
        end_tokens = self.model.config.eos_token_ids
        if not end_tokens:
            raise ValueError(
                f"{self.config.model}: config.json: expected an eos_token_id, got none"
            )
        tokenizer = load_tokenizer(self.config.model)
        return data.tokenize(examples, tokenizer, end_tokens[0], self.config.max_length)

    def _step_batches(self) -> Iterator[Batch]:
        """This process's part of a step."""
        size = self.config.batch_size
        for _ in range(self.config.accumulation_steps):
            yield self._batch(self.examples.take(self.position + self.rank * size, size))
            self.position += size * self.world_size

    def _batch(self, examples: list[Example]) -> Batch:
        return data.packed(examples) if self.config.packing else data.padded(examples)

    def _loss(self, batch: Batch) -> Tensor:
        """The sum over the targets that count."""
        cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.to(self.device)
        # Of a sharded model FSDP casts the parameters.
        autocast = self.config.bfloat16 and self.world_size == 1
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=autocast):
            loss: Tensor = self.model.loss(
                batch.input_ids.to(self.device),
                batch.targets.to(self.device),
                cu_seqlens,
                batch.max_seqlen,
                fused=self.config.fused_loss,
                reduction="sum",
            )
        return loss
