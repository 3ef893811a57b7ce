"""Sampling against transformers' logits processors, and draws against its generate."""

from __future__ import annotations

import pytest
import torch
from transformers.generation import logits_process as peers
from warploom.models.sampling import Sampling, keep_top_k, keep_top_p, penalize_repetition


@pytest.fixture
def logits():
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 50)
    logits[1, :10] = logits[1, 20]  # a tie
    logits[2] = 0.0
    logits[3, 7] = 40.0  # one token has all the probability
    return logits


@pytest.mark.parametrize("k", [1, 5, 50, 80])
def test_top_k(logits, k):
    expected = peers.TopKLogitsWarper(k)(None, logits)
    assert torch.equal(keep_top_k(logits, k), expected)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p(logits, p):
    expected = peers.TopPLogitsWarper(p)(None, logits)
    assert torch.equal(keep_top_p(logits, p), expected)


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty(logits, penalty):
    ids = torch.randint(0, 50, (4, 12))
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter(1, ids, True)
    expected = peers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    torch.testing.assert_close(penalize_repetition(logits, seen, penalty), expected)


def test_all_together_in_the_order_of_transformers(logits):
    ids = torch.randint(0, 50, (4, 12))
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter(1, ids, True)
    expected = logits
    for processor in (
        peers.RepetitionPenaltyLogitsProcessor(1.3),
        peers.TemperatureLogitsWarper(0.7),
        peers.TopKLogitsWarper(20),
        peers.TopPLogitsWarper(0.8),
    ):
        expected = processor(ids, expected)
    actual = Sampling(None, 0.7, 20, 0.8, 1.3).scores(logits, seen)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.5, "top_p": 0.7, "repetition_penalty": 1.4},
    ],
    ids=["temperature", "top-k", "top-p-and-penalty"],
)
def test_the_same_seed_draws_the_tokens_of_transformers(pair, options):
    peer, ours = pair("llama3")
    ids = torch.randint(0, 192, (2, 11))
    torch.manual_seed(5)
    everything = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, **options}
    expected = peer.generate(ids, max_new_tokens=20, do_sample=True, pad_token_id=0, **everything)
    torch.manual_seed(5)
    assert torch.equal(ours.generate(ids, max_new_tokens=20, **options), expected)


@pytest.mark.parametrize(
    ("options", "draws"),
    [
        ({}, False),
        ({"temperature": 0.0}, False),
        ({"temperature": 0.0, "do_sample": True}, False),
        ({"do_sample": True}, True),
        ({"temperature": 0.5}, True),
        ({"temperature": 0.5, "do_sample": False}, False),
        ({"top_p": 0.5}, True),
        ({"repetition_penalty": 1.2}, False),
    ],
    ids=str,
)
def test_a_token_is_drawn_only_when_it_is_asked_for(options, draws):
    assert Sampling(**options).draws == draws


def test_frequencies_follow_the_probabilities():
    sampling = Sampling(do_sample=True)
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0])
    generator = torch.Generator().manual_seed(0)
    drawn = sampling.choose(probabilities.log().expand(20_000, 4), generator)
    share = drawn.bincount(minlength=4) / 20_000
    # Five standard deviations of a share of 0.5 among 20000 draws.
    torch.testing.assert_close(share, probabilities, rtol=0, atol=0.018)
    assert share[3] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0},
    ],
    ids=str,
)
def test_parameters_out_of_range_are_named(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"generate: {name}: expected .*, got {value}"):
        Sampling(**options)
