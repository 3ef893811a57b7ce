"""Many long prompts, prefilled and decoded with the paged cache, equal one pass over whole rows."""

from __future__ import annotations

import pytest
import torch
from warploom.nn import PagedKeyValueCache

from tests.models.tiny_llama import tiny_llama


def check_decoding(model, lengths, steps, page_size):
    """Hidden states of prompts of these lengths and of `steps` tokens after each."""
    rows = [torch.randint(0, 192, (1, length + steps)) for length in lengths]
    cache = PagedKeyValueCache(len(model.model.layers), len(rows), page_size=page_size)
    prompts = torch.cat([row[:, :length] for row, length in zip(rows, lengths, strict=True)], 1)
    prefilled = model.model(prompts, cache, *cache.pack(lengths))[0].split(lengths)
    cache.advance(lengths)
    decoded = []
    for step in range(steps):
        tokens = torch.cat([row[:, n + step] for row, n in zip(rows, lengths, strict=True)])
        decoded.append(model.model(tokens.unsqueeze(1), cache))
        cache.advance(1)
    assert cache.lengths == [length + steps for length in lengths]
    for row, before, after in zip(rows, prefilled, torch.cat(decoded, 1), strict=True):
        actual = torch.cat((before, after)).unsqueeze(0)
        torch.testing.assert_close(actual, model.model(row), rtol=0, atol=2e-5)


@torch.inference_mode()
@pytest.mark.parametrize("window", [None, 50])
def test_unequal_prompts_up_to_300_tokens(window):
    model = tiny_llama(model_type="mistral", sliding_window=window, initializer_range=0.2)
    check_decoding(model, [300, 1, 16, 17, 255, 64, 130, 299], steps=40, page_size=16)


@pytest.mark.slow
@torch.inference_mode()
def test_32_prompts_of_4096_tokens():
    model = tiny_llama(num_hidden_layers=1, hidden_size=16, num_attention_heads=2,
                       num_key_value_heads=1)  # fmt: skip
    check_decoding(model, [4096] * 32, steps=8, page_size=64)
