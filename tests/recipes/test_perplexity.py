"""Perplexity of a text, against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from warploom.recipes.perplexity import perplexity

from tests.models.tiny_llama import tiny_llama


@torch.no_grad()
def test_a_model_that_knows_nothing_has_the_vocabularys_size():
    model = tiny_llama()
    model.lm_head.weight.zero_()
    assert perplexity(model, torch.arange(50), 8) == pytest.approx(192, rel=1e-5)


@pytest.mark.parametrize("window", [7, 50, 64])
@torch.no_grad()
def test_it_is_the_mean_over_all_but_the_first_tokens_of_windows(window):
    model = tiny_llama(initializer_range=0.5)
    tokens = torch.randint(0, 192, (50,))
    likelihoods = []
    for start in range(0, 50, window):
        for end in range(start + 1, min(start + window, 50)):
            logits = model(tokens[None, start:end])[0, -1].double()
            likelihoods.append(logits.log_softmax(-1)[tokens[end]].item())
    expected = math.exp(-sum(likelihoods) / len(likelihoods))
    assert perplexity(model, tokens, window) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("shape", "window", "message"),
    [
        ((9,), 1, "window: expected 2 or more, got 1"),
        ((1,), 4, r"token_ids: expected 2 or more \[T\], got \(1,\)"),
        ((2, 9), 4, r"token_ids: expected 2 or more \[T\], got \(2, 9\)"),
    ],
)
def test_what_has_no_perplexity_is_refused(shape, window, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_llama(), torch.zeros(shape, dtype=torch.int64), window)
