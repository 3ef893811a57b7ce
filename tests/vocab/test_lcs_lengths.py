"""Longest common subsequences against the table of the dynamic programme."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from warploom.ops.vocab import lcs_lengths

from tests import plain

every_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def packed(sequences):
    bounds = [0, *itertools.accumulate(map(len, sequences))]
    others = torch.tensor([token for tokens in sequences for token in tokens], dtype=torch.int64)
    return others, torch.tensor(bounds, dtype=torch.int32)


def check(backend, tokens, sequences):
    first = torch.tensor(tokens, dtype=torch.int64)
    lengths = lcs_lengths(first, *packed(sequences), backend=backend)
    assert lengths.dtype == torch.int32
    assert lengths.tolist() == [plain.lcs_length(tokens, other) for other in sequences]


@every_backend
@pytest.mark.parametrize("length", [0, 1, 5, 63, 64, 65, 130])
@pytest.mark.parametrize("vocabulary", [1, 3, 40])
def test_random_sequences(backend, length, vocabulary):
    """Around the 64 columns of a word; few tokens carry from word to word, many stand alone."""
    draw = random.Random(length * 100 + vocabulary)
    tokens = [draw.randrange(vocabulary) for _ in range(length)]
    lengths = [0, 1, 2, 17, 64, 100]
    check(backend, tokens, [[draw.randrange(vocabulary) for _ in range(n)] for n in lengths])


@every_backend
def test_equal_reversed_and_disjoint(backend):
    tokens = list(range(100))
    check(backend, tokens, [tokens, tokens[::-1], [200 + token for token in tokens], tokens[::3]])


def test_tokens_of_any_value():
    """Negative, huge, and such as share a slot of the hash table."""
    tokens = [-1, 2**63 - 1, -(2**63), 0, 7, *range(0, 2**40, 2**36)]
    check("cpu", tokens, [tokens, tokens[2:], sorted(tokens), [1, 2, 3]])


def test_many_sequences_on_threads():
    draw = random.Random(1)
    tokens = [draw.randrange(9) for _ in range(70)]
    check("cpu", tokens, [[draw.randrange(9) for _ in range(i % 40)] for i in range(500)])


@every_backend
def test_no_sequences(backend):
    empty = torch.empty(0, dtype=torch.int64)
    bounds = torch.zeros(1, dtype=torch.int32)
    assert lcs_lengths(torch.tensor([1, 2]), empty, bounds, backend=backend).shape == (0,)


def test_errors_name_the_argument():
    tokens, (others, bounds) = torch.tensor([1, 2, 3]), packed([[1, 2], [3]])
    with pytest.raises(TypeError, match="lcs_lengths: tokens: expected dtype torch.int64"):
        lcs_lengths(tokens.int(), others, bounds)
    with pytest.raises(ValueError, match="lcs_lengths: others: expected 1 dimensions"):
        lcs_lengths(tokens, others[None], bounds)
    with pytest.raises(TypeError, match="lcs_lengths: cu_seqlens: expected dtype int32"):
        lcs_lengths(tokens, others, bounds.long())
    with pytest.raises(ValueError, match="lcs_lengths: cu_seqlens: expected at least 1 number"):
        lcs_lengths(tokens, others, bounds[:0])
    with pytest.raises(RuntimeError, match="lcs_lengths: cu_seqlens: expected offsets that rise"):
        lcs_lengths(tokens, others, bounds.flip(0))
    with pytest.raises(RuntimeError, match="lcs_lengths: cu_seqlens: expected offsets .* most 2"):
        lcs_lengths(tokens, others[:2], bounds)
    with pytest.raises(RuntimeError, match="lcs_lengths has no triton implementation"):
        lcs_lengths(tokens, others, bounds, backend="triton")
