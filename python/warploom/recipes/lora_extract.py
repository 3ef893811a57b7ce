"""A full fine-tuning as an adapter, and what that costs in perplexity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from warploom.lora import load_adapter, merge_and_unload
from warploom.lora.extract import Extraction, extract_lora
from warploom.models.auto import load_model
from warploom.recipes._extras import require
from warploom.recipes._tokenizer_files import copy_tokenizer
from warploom.recipes.perplexity import perplexity, text_tokens


@dataclass(frozen=True)
class Extracted:
    """The layers of the adapter, and each model's perplexity where a text was given."""

    extraction: Extraction
    perplexities: dict[str, float]


def extract(
    base: Path,
    tuned: Path,
    output: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    text: Path | None = None,
    context: int = 2048,
) -> Extracted:
    """Save what a fine-tuning changed as an adapter; see ``warploom.lora.extract.extract_lora``.

    Args:
        base, tuned, output, rank, energy: as there; the tuned model's tokenizer goes to the output too.
        text: a UTF-8 file on which the perplexity of the base, of the tuned model, and of the base with the
            adapter, beside its weights and in them, is measured.
        context: tokens of a window of the text.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = None if text is None else text_tokens(text, tuned)
    extraction = extract_lora(base, tuned, output, rank=rank, energy=energy, device=device)
    copy_tokenizer(tuned, output)
    perplexities: dict[str, float] = {}
    if tokens is not None:
        model = load_model(base, device=device).eval()
        perplexities["base"] = perplexity(model, tokens, context)
        load_adapter(model, output)
        perplexities["with the adapter"] = perplexity(model, tokens, context)
        perplexities["merged"] = perplexity(merge_and_unload(model), tokens, context)
        model = load_model(tuned, device=device).eval()
        perplexities["tuned"] = perplexity(model, tokens, context)
    return Extracted(extraction, perplexities)


def print_extracted(extracted: Extracted, console: Any) -> None:
    """A line for each layer, and one for each perplexity."""
    extraction = extracted.extraction
    table = require("rich.table").Table()
    table.add_column("layer")
    for column in ("norm of the change", "rank", "energy kept"):
        table.add_column(column, justify="right")
    for layer in extraction.layers:
        table.add_row(layer.name, f"{layer.norm:.4g}", str(layer.rank), f"{layer.energy:.4%}")
    table.add_row("all", "", "", f"{extraction.energy:.4%}")
    console.print(table)
    for name, norm in extraction.left_behind.items():
        console.print(f"not in the adapter: {name}, norm {norm:.4g}", highlight=False)
    for name, value in extracted.perplexities.items():
        console.print(f"perplexity, {name}: {value:.4g}", highlight=False)
