"""Model directories with another kind of attention, and what that costs and saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from warploom.convert import gqa_to_mla, mha_to_gqa
from warploom.models.causal_lm import CausalLanguageModel
from warploom.models.llama import Llama
from warploom.recipes._extras import require
from warploom.recipes._tokenizer_files import copy_tokenizer
from warploom.recipes.kv_cache import CacheSize, cache_sizes
from warploom.recipes.perplexity import perplexity, text_tokens


@dataclass(frozen=True)
class Measured:
    """A model's cache for one text, and its perplexity where a text was given."""

    directory: Path
    cache: CacheSize
    perplexity: float | None


def convert_to_gqa(
    directory: Path, output: Path, kv_heads: int, *, text: Path | None = None, context: int = 2048
) -> list[Measured]:
    """Save the Llama of ``directory`` with ``kv_heads`` key/value heads; see ``mha_to_gqa``.

    Args:
        directory: config.json, safetensors and, for a text, tokenizer.json; a Llama or a relative.
        output: the new directory, with the same tokenizer.
        kv_heads: key/value heads, a divisor of the model's.
        text: a UTF-8 file on which both models' perplexity is measured.
        context: tokens of a window of the text, and of the cache whose size is given.

    Returns: the model before and after.
    """
    return _convert(directory, output, lambda model: mha_to_gqa(model, kv_heads), text, context)


def convert_to_mla(
    directory: Path,
    output: Path,
    *,
    d_latent: int | None = None,
    d_rope: int | None = None,
    calibration: Path | None = None,
    text: Path | None = None,
    context: int = 2048,
) -> list[Measured]:
    """Save the Llama of ``directory`` with latent attention; see ``gqa_to_mla``.

    Args:
        d_latent, d_rope: features of the latent and of the rotary key; without them nothing is lost.
        calibration: a UTF-8 file, best another than ``text``: what it excites in the model is kept first.
        directory, output, text, context: as in ``convert_to_gqa``.
    """

    def change(model: Llama) -> CausalLanguageModel:
        tokens = None
        if calibration is not None:
            tokens = text_tokens(calibration, directory).to(model.lm_head.weight.device)
            length = min(context, len(tokens))
            tokens = tokens[: len(tokens) // length * length].view(-1, length)
        return gqa_to_mla(model, d_latent=d_latent, d_rope=d_rope, calibration=tokens)

    return _convert(directory, output, change, text, context)


def _convert(
    directory: Path,
    output: Path,
    change: Callable[[Llama], CausalLanguageModel],
    text: Path | None,
    context: int,
) -> list[Measured]:
    if output.resolve() == directory.resolve():
        raise ValueError(f"output: expected another directory than the model's, got {output}")
    tokens = None if text is None else text_tokens(text, directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Llama.from_pretrained(directory, device=device).eval()
    changed = change(model)
    changed.save_pretrained(output)
    copy_tokenizer(directory, output)

    def measure(place: Path, measured: CausalLanguageModel) -> Measured:
        (own,) = (size for size in cache_sizes(place, context) if size.is_own)
        return Measured(
            place, own, None if tokens is None else perplexity(measured, tokens, context)
        )

    return [measure(directory, model), measure(output, changed)]


def print_measured(models: list[Measured], console: Any) -> None:
    """A line for each model."""
    table = require("rich.table").Table()
    for column in ("model", "attention"):
        table.add_column(column)
    for column in ("elements a token", "bytes a token", "MiB in all", "perplexity"):
        table.add_column(column, justify="right")
    for model in models:
        table.add_row(
            str(model.directory),
            model.cache.kind,
            f"{model.cache.elements:,}",
            f"{model.cache.bytes_per_token:,}",
            f"{model.cache.total_bytes / 2**20:.3f}",
            "" if model.perplexity is None else f"{model.perplexity:.4g}",
        )
    console.print(table)
