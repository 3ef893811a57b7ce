"""How well a model foretells a text."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from warploom.models.causal_lm import CausalLanguageModel
from warploom.recipes.text_corpus import load_tokenizer


@torch.no_grad()
def perplexity(model: CausalLanguageModel, token_ids: Tensor, window: int) -> float:
    """exp of the mean negative log-likelihood of a text's tokens.

    The text is cut into windows that do not overlap, the last one maybe shorter; a token is foretold from
    those before it in its window, and the first of each window is not counted.

    Args:
        model: in evaluation mode where that matters.
        token_ids: int64 [T], two or more.
        window: tokens of a window, from 2.
    """
    if window < 2:
        raise ValueError(f"perplexity: window: expected 2 or more, got {window}")
    if token_ids.dim() != 1 or len(token_ids) < 2:
        raise ValueError(
            f"perplexity: token_ids: expected 2 or more [T], got {tuple(token_ids.shape)}"
        )
    total, count = 0.0, 0
    for part in token_ids.to(model.lm_head.weight.device).split(window):
        if len(part) > 1:
            logits = model(part[None, :-1])[0].float()
            total += F.cross_entropy(logits, part[1:].long(), reduction="sum").item()
            count += len(part) - 1
    return math.exp(total / count)


def text_tokens(text: Path, directory: Path) -> Tensor:
    """int64 [T], a UTF-8 file's text as the tokenizer of a model directory has it."""
    ids = load_tokenizer(directory).encode(text.read_text(encoding="utf-8")).ids
    if len(ids) < 2:
        raise ValueError(f"{text}: expected a text of 2 tokens or more, got {len(ids)}")
    return torch.tensor(ids)
