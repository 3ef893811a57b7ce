"""A text and a run small enough for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from warploom.models.llama import Llama
from warploom.models.llama_config import LlamaConfig
from warploom.recipes import text_corpus
from warploom.recipes.instruction_data import PROMPT_WITH_INPUT, Instruction, write_instructions
from warploom.recipes.pretrain import PretrainConfig, pretrain

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sequence_length": 16,
    "batch_size": 2,
    "warmup_steps": 3,
    "validation_sequences": 3,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hundred different English sentences, a paragraph each."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    sentences = (
        f"The {adjective} {noun} returns {number} values to the caller."
        for adjective in ("first", "second", "last", "empty", "sorted")
        for noun in ("function", "method", "class", "module", "object", "iterator")
        for number in range(10)
    )
    path.write_text("\n\n".join(sentences))
    return path


@pytest.fixture(scope="session")
def tiny_config(text_file: Path) -> Callable[..., PretrainConfig]:
    def make(output: Path, **changes: Any) -> PretrainConfig:
        return PretrainConfig(output=output, **{**TINY, "text": text_file, **changes})

    return make


@pytest.fixture(scope="session")
def trained_model(
    tiny_config: Callable[..., PretrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The model directory of a finished run of 40 steps."""
    return pretrain(
        tiny_config(tmp_path_factory.mktemp("trained") / "run", steps=40, learning_rate=1e-2)
    )


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random model of two layers and a tokenizer that knows Alpaca's prompt well."""
    directory = tmp_path_factory.mktemp("base") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    Llama(config).save_pretrained(directory)
    texts = [PROMPT_WITH_INPUT, *(f"Repeat the number {number}." for number in range(20))]
    text_corpus.train_tokenizer(texts * 3, directory, 400)
    return directory


@pytest.fixture(scope="session")
def instruction_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty tasks in Alpaca's JSON, every second with an input."""
    path = tmp_path_factory.mktemp("data") / "instructions.json"
    tasks = [
        Instruction(f"Repeat the number {n}.", f"{n} is it." if n % 2 else "", f"It is {n}, {n}.")
        for n in range(40)
    ]
    write_instructions(path, tasks)
    return path
