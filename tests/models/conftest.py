"""Small random LLaMAs in transformers and here, and a tokenizer."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from warploom.models.llama import Llama

from tests.models.tiny_llama import transformers_config

transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def peer_directory(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """Makes a random LlamaForCausalLM, norms and biases included, and the directory it saved."""

    def make(rope: str = "llama3", shard: str = "5GB", **changes: Any) -> tuple[Any, Path]:
        torch.manual_seed(0)
        peer = transformers.LlamaForCausalLM(transformers_config(rope, **changes)).eval()
        with torch.no_grad():
            for name, parameter in peer.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter.add_(0.1 * torch.randn_like(parameter))
        directory = tmp_path / "peer"
        peer.save_pretrained(directory, max_shard_size=shard)
        return peer, directory

    return make


@pytest.fixture
def pair(peer_directory: Callable[..., tuple[Any, Path]]) -> Callable[..., tuple[Any, Llama]]:
    """A random LlamaForCausalLM and the Llama loaded from the directory it saved."""

    def make(rope: str = "llama3", **changes: Any) -> tuple[Any, Llama]:
        peer, directory = peer_directory(rope, **changes)
        return peer, Llama.from_pretrained(directory).eval()

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level BPE of 192 tokens trained on Python's help texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted({*"".join(map(chr, range(32, 127))), "Ġ", "Ċ"})
    trainer = trainers.BpeTrainer(vocab_size=192, initial_alphabet=alphabet, show_progress=False)
    text = pydoc_data.topics.topics["assignment"]
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer
