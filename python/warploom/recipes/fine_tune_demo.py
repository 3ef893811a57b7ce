"""LoRA on a small model and instructions about the standard library: what it learns, and how fast."""

from __future__ import annotations

import importlib
import importlib.util
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from warploom.lora import get_lora_model, load_adapter
from warploom.models.auto import load_model, read_config
from warploom.models.causal_lm import CausalLanguageModel
from warploom.recipes._fine_tune_models import adapter_config
from warploom.recipes._training_log import read_log
from warploom.recipes.alpaca import FineTuneConfig, fine_tune
from warploom.recipes.docs_instructions import docs_instructions
from warploom.recipes.instruction_data import (
    Batch,
    Instruction,
    packed,
    read_instructions,
    tokenize,
    write_instructions,
)
from warploom.recipes.text_corpus import load_tokenizer

_ASKED = 4
_VALIDATED = 64
_ROUNDS = 7  # timed steps of each kind of layer
_ANSWER_TOKENS = 40
_LOSS_TOLERANCE = 1e-5  # relative, of a float32 sum over some hundred tokens in another order


@dataclass(frozen=True)
class Answer:
    """A question that was not trained on, its answer in the documentation, and a model's two."""

    question: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class FineTuneDemo:
    """What the demo found.

    Attributes:
        adapter: the directory of the adapter.
        first_loss, last_loss: validation loss before the first step and after the last.
        fused_loss, plain_loss: of one batch, without all logits and with them.
        tokens_per_second, peft_tokens_per_second: of forward and backward passes through our layers and
            peft's, the medians of steps in turn; None without peft.
        answers: to a few questions.
    """

    adapter: Path
    first_loss: float
    last_loss: float
    fused_loss: float
    plain_loss: float
    tokens_per_second: float
    peft_tokens_per_second: float | None
    answers: list[Answer]


def fine_tune_demo(
    model: Path, output: Path, *, steps: int = 150, examples: int = 4000, bfloat16: bool = False
) -> FineTuneDemo:
    """Fine-tune the model of a directory with LoRA on questions about the standard library.

    Writes ``output/instructions.json``, ``output/validation.json``, ``output/lora`` (the run) and
    ``output/fine-tuning.json``.

    Args:
        model: a Hugging Face directory with a tokenizer.json.
        output: a folder without a run of an earlier demo.
        steps: optimiser steps.
        examples: instructions in all, with those that are only asked.
        bfloat16: autocast the passes of the training to bfloat16.

    Raises:
        ValueError: the two ways to the loss differ by more than float32's rounding.
    """
    instructions = docs_instructions(limit=examples)
    held_out = instructions[:: max(1, len(instructions) // _VALIDATED)]
    trained = [example for example in instructions if example not in set(held_out)]
    write_instructions(output / "instructions.json", trained)
    write_instructions(output / "validation.json", held_out)
    config = FineTuneConfig(
        model=model,
        data=output / "instructions.json",
        validation=output / "validation.json",
        output=output / "lora",
        steps=steps,
        batch_size=8,
        accumulation_steps=1,
        learning_rate=2e-3,
        validate_every=max(1, steps // 5),
        checkpoint_every=steps,
        bfloat16=bfloat16,
    )
    asked = held_out[:: max(1, len(held_out) // _ASKED)][:_ASKED]
    before = answer(load_model(model).eval(), model, asked)
    batches = _batches(config)
    first_loss = _mean_loss(load_model(model).eval(), batches)
    adapter = fine_tune(config)
    tuned = load_model(model).eval()
    load_adapter(tuned, adapter)
    fused, plain = (_mean_loss(tuned, batches[:1], fused=way) for way in (True, False))
    if abs(fused - plain) > _LOSS_TOLERANCE * abs(plain):
        raise ValueError(f"fine_tune_demo: loss: {plain} with all logits, {fused} without")
    own, theirs = _speeds(config, batches[0])
    found = FineTuneDemo(
        adapter=adapter,
        first_loss=first_loss,
        last_loss=read_log(output / "lora" / "log.jsonl")[-1]["validation_loss"],
        fused_loss=fused,
        plain_loss=plain,
        tokens_per_second=own,
        peft_tokens_per_second=theirs,
        answers=[
            Answer(example.prompt, example.output, old, new)
            for example, old, new in zip(asked, before, answer(tuned, model, asked))
        ],
    )
    values = json.dumps(asdict(found), indent=1, default=str)
    (output / "fine-tuning.json").write_text(values + "\n", encoding="utf-8")
    return found


def answer(
    model: CausalLanguageModel, directory: Path, questions: Sequence[Instruction]
) -> list[str]:
    """What a model says to instructions, the likeliest token each time.

    Args:
        directory: where its tokenizer is.
    """
    tokenizer = load_tokenizer(directory)
    prompts = [tokenizer.encode(question.prompt).ids for question in questions]
    rows: Any = model.generate(prompts, _ANSWER_TOKENS)
    return [
        tokenizer.decode(row[len(prompt) :]).strip()
        for row, prompt in zip(rows, prompts, strict=True)
    ]


def print_fine_tune_demo(found: FineTuneDemo, console: Any) -> None:
    """The losses, the speeds and the answers."""

    def show(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    show(f"validation loss {found.first_loss:.3f} before, {found.last_loss:.3f} after")
    show(f"loss of a batch: {found.plain_loss:.6f} with all logits, {found.fused_loss:.6f} without")
    show(f"{found.tokens_per_second:.0f} tokens/s forward and backward")
    if found.peft_tokens_per_second is not None:
        ratio = found.tokens_per_second / found.peft_tokens_per_second
        show(f"{found.peft_tokens_per_second:.0f} tokens/s with peft's layers: {ratio:.2f} times")
    for entry in found.answers:
        question = entry.question.partition("### Instruction:\n")[2].partition("\n\n### Response")[
            0
        ]
        show(f"\n{question}\n  before: {entry.before!r}\n  after:  {entry.after!r}")
        show(f"  documentation: {entry.expected!r}")


def _batches(config: FineTuneConfig) -> list[Batch]:
    """The validation examples."""
    assert config.validation is not None
    tokenizer = load_tokenizer(config.model)
    end = read_config(config.model).eos_token_ids[0]
    examples = tokenize(read_instructions(config.validation), tokenizer, end, config.max_length)
    size = config.batch_size
    return [packed(examples[start : start + size]) for start in range(0, len(examples), size)]


@torch.no_grad()
def _mean_loss(model: CausalLanguageModel, batches: Sequence[Batch], fused: bool = True) -> float:
    """The mean over all targets that count."""
    sums = [model.loss(*batch[:4], fused=fused, reduction="sum").item() for batch in batches]
    return float(sum(sums)) / sum(batch.target_count for batch in batches)


def _speeds(config: FineTuneConfig, batch: Batch) -> tuple[float, float | None]:
    """Tokens a second of a forward and a backward pass through our layers and through peft's."""
    models: list[Any] = [get_lora_model(load_model(config.model), adapter_config(config))]
    if importlib.util.find_spec("peft") is not None:
        peft: Any = importlib.import_module("peft")
        theirs = peft.LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=[f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
        )
        models.append(peft.inject_adapter_in_model(theirs, load_model(config.model)))
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(_ROUNDS + 1):
        for times, model in zip(seconds, models):
            start = time.perf_counter()
            model.train().loss(*batch[:4]).backward()
            if turn:  # the first warms up
                times.append(time.perf_counter() - start)
            model.zero_grad()
    speeds = [batch.input_ids.numel() / statistics.median(times) for times in seconds]
    return speeds[0], speeds[1] if len(speeds) > 1 else None
