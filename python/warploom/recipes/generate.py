"""Text from a model directory: tokenizer, model and sampling behind one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from warploom.lora import load_adapter
from warploom.models.auto import load_model
from warploom.recipes.text_corpus import load_tokenizer


@dataclass(frozen=True)
class Generated:
    """A continuation and why it ended: "eos", "stop", "length", or None without a token."""

    prompt_ids: list[int]
    new_ids: list[int]
    text: str
    finish: str | None


def generate_text(
    directory: Path,
    prompt: str,
    *,
    adapter: Path | None = None,
    max_new_tokens: int = 128,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generated:
    """Continue ``prompt`` with the model of a Hugging Face directory that holds a tokenizer.json.

    Args:
        directory: config.json, safetensors, tokenizer.json.
        prompt: the text to continue; the tokenizer's own special tokens are added.
        adapter: directory of an adapter that ``warploom sft`` or peft saved.
        max_new_tokens: most tokens to add.
        temperature, top_k, top_p: sampling; the likeliest token each time when none is given.
        repetition_penalty: scores of tokens that are there already are divided by it; 1.0 for none.
        stop: strings that end the text; they are part of it.
        seed: of the sampling; None draws from torch's default generator.
        on_text: called with the prompt, and then with each piece of text as soon as it is certain.
    """
    tokenizer = load_tokenizer(directory)
    model = load_model(directory, device="cuda" if torch.cuda.is_available() else "cpu").eval()
    if adapter is not None:
        load_adapter(model, adapter)
    prompt_ids = tokenizer.encode(prompt).ids
    generator = None
    if seed is not None:
        generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    if on_text is not None:
        on_text(prompt)
    new_ids: list[int] = []
    pieces: list[str] = []
    finish = None
    for token in model.stream(
        [prompt_ids],
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        stop_strings=list(stop),
        tokenizer=tokenizer,
        generator=generator,
    ):
        new_ids.append(token.id)
        pieces.append(token.text or "")
        finish = token.finish
        if on_text is not None and token.text:
            on_text(token.text)
    return Generated(prompt_ids, new_ids, "".join(pieces), finish)
