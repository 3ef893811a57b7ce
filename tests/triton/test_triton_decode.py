"""The launchers of decoding, of writing to a cache and of merging, against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from warploom.reference import attention as reference
from warploom.triton_kernels.attention import attention_cache_append as append
from warploom.triton_kernels.attention.attention_decode import attention_decode, why_not
from warploom.triton_kernels.attention.merge_attention import (
    merge_attention,
    merge_attention_backward,
)

from tests.triton.pages import paged

Draw = Callable[..., Tensor]
Check = Callable[..., None]
Embed = Callable[[Tensor], Tensor]

# Keys of each sequence: few, none, and past several tiles.
LENGTHS = (7, 0, 200, 129)
HEADS, KV_HEADS, D, DV = 6, 2, 24, 16


def _arguments(
    queries: int, page_size: int, random: Draw, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, ...]:
    """The op's positional arguments, for LENGTHS in pages."""
    k, v, block_table = paged(LENGTHS, page_size, (KV_HEADS, D), (KV_HEADS, DV), random, dtype)
    return (
        random(len(LENGTHS), queries, HEADS, D, dtype=dtype),
        *(k, v, torch.tensor(LENGTHS, dtype=torch.int32), block_table),
        *(options.get("alibi_slopes"), options.get("sinks"), 0.3),
        *options.get("window", (-1, 0)),
        *(options.get(name, 0) for name in ("softcap", "num_splits", "split_size")),
    )


@pytest.mark.parametrize("page_size", (1, 16, 48, 256))
def test_pages_of_any_size(page_size: int, random: Draw, assert_close: Check) -> None:
    args = _arguments(1, page_size, random)
    assert_close(attention_decode(*args), reference.attention_decode, *args, factor=2)


@pytest.mark.parametrize(
    ("queries", "options"),
    (
        pytest.param(1, {"num_splits": 1, "softcap": 2.0, "biased": True}, id="one-split"),
        pytest.param(3, {"num_splits": 3, "window": (40, 0), "biased": True}, id="window"),
        pytest.param(7, {"num_splits": 2, "window": (-1, -1)}, id="two-tiles-of-rows"),
        pytest.param(3, {"split_size": 64, "window": (90, 2)}, id="split-size"),
    ),
)
def test_splits(queries: int, options: dict[str, Any], random: Draw, assert_close: Check) -> None:
    if "biased" in options:
        slopes = random(len(LENGTHS), HEADS).sigmoid()
        options = {**options, "alibi_slopes": slopes, "sinks": random(HEADS)}
    args = _arguments(queries, 16, random, **options)
    assert_close(attention_decode(*args), reference.attention_decode, *args, factor=2)


def test_a_cache_without_pages(
    dtype: torch.dtype, random: Draw, embedded: Embed, assert_close: Check
) -> None:
    k = random(3, 100, 1, 64, dtype=dtype)
    v = random(3, 100, 1, 64, dtype=dtype)
    lengths = torch.tensor([100, 3, 65], dtype=torch.int32)
    for row, length in enumerate(lengths.tolist()):
        k[row, length:] = math.nan
        v[row, length:] = math.nan
    q = embedded(random(3, 2, 4, 64, dtype=dtype))
    args = (q, embedded(k), embedded(v), lengths, None, None, None, 0.125, -1, 0, 0.0, 2, 0)
    assert_close(attention_decode(*args), reference.attention_decode, *args, factor=2)


def test_a_split_size_makes_a_sequence_independent_of_its_batch(random: Draw) -> None:
    args = _arguments(2, 16, random, dtype=torch.bfloat16, sinks=random(HEADS), split_size=64)
    out, lse = attention_decode(*args)
    for row, length in enumerate(LENGTHS):
        # Alone, with as little room in the cache as the sequence takes: fewer splits.
        places = max(1, -(-length // 16))
        q, k, v, lengths, block_table, *rest = args
        one = slice(row, row + 1)
        alone = attention_decode(q[one], k, v, lengths[one], block_table[one, :places], *rest)
        assert torch.equal(alone[0], out[one])
        assert torch.equal(alone[1], lse[one])


def test_splits_without_keys_change_no_bit(random: Draw) -> None:
    args = _arguments(1, 16, random)
    # No sequence has more than 7 tiles of keys, a split each; the others are empty.
    seven, many = (attention_decode(*args[:-2], splits, 0) for splits in (7, 11))
    assert all(torch.equal(a, b) for a, b in zip(seven, many, strict=True))


@pytest.mark.parametrize("shape", ((0, 1), (2, 0)), ids=("no-sequence", "no-query"))
def test_nothing_to_decode(shape: tuple[int, int], random: Draw) -> None:
    batch, queries = shape
    q, cache = random(batch, queries, 2, 16), random(batch, 8, 1, 16)
    lengths = torch.zeros(batch, dtype=torch.int32)
    out, lse = attention_decode(q, cache, cache, lengths, None, None, None, 1.0, -1, 0, 0.0, 0, 0)
    assert out.shape == q.shape
    assert lse.shape == (batch, 2, queries)


def test_why_not_names_what_decoding_cannot_do(random: Draw) -> None:
    args = _arguments(1, 16, random)
    assert why_not(*args) == []
    (reason,) = why_not(*(x.double() if x is args[0] else x for x in args))
    assert "float64" in reason


@pytest.mark.parametrize("paging", (False, True), ids=("contiguous", "pages"))
@pytest.mark.parametrize(
    ("rotary_dim", "interleaved"), ((0, False), (8, True), (20, False), (24, True)), ids=str
)
def test_cache_append(
    rotary_dim: int,
    interleaved: bool,
    paging: bool,
    dtype: torch.dtype,
    random: Draw,
    embedded: Embed,
) -> None:
    k, v = random(3, 5, 2, 24, dtype=dtype), random(3, 5, 2, 12, dtype=dtype)
    # One row more than the tables have, and rows that do not fit.
    lengths = torch.tensor([0, 6, 14], dtype=torch.int32)
    block_table, place = None, (3, 16)
    if paging:
        block_table, place = torch.randperm(12).view(3, 4).to(torch.int32), (12, 4)
        block_table[1, 2] = -1
    tables = [random(13, rotary_dim // 2) if rotary_dim else None for _ in range(2)]
    want = [random(*place, 2, size, dtype=dtype) for size in (24, 12)]
    got = [embedded(cache) for cache in want]
    args = (lengths, block_table, *tables, interleaved)
    reference.attention_cache_append(k, v, *want, *args)
    append.attention_cache_append(embedded(k), embedded(v), *got, *args)
    exact = torch.finfo(dtype).eps
    torch.testing.assert_close(got[0], want[0], rtol=exact, atol=exact)
    assert torch.equal(got[1], want[1])


def test_a_cache_whose_features_are_apart_is_refused(random: Draw) -> None:
    k, cache = random(1, 1, 2, 8), random(1, 4, 2, 8)
    args = (k, k, cache, random(1, 4, 8, 2).transpose(2, 3), None, None, None, None, False)
    (reason,) = append.why_not(*args)
    assert "v_cache" in reason


def test_merge(dtype: torch.dtype, random: Draw, embedded: Embed, assert_close: Check) -> None:
    out1, out2 = (random(2, 7, 3, 20, dtype=dtype) for _ in range(2))
    lse1, lse2 = random(2, 3, 7, scale=4.0), random(2, 3, 7, scale=4.0)
    # Parts without keys, which may hold anything, in either library's convention; one row in both.
    lse1[0, 0, :3], lse2[0, 0, 2:5] = -math.inf, math.inf
    out1[0, :3, 0], out2[0, 2:5, 0] = math.nan, math.nan
    args = (embedded(out1), lse1, out2, lse2)
    merged = merge_attention(*args)
    assert_close(merged, reference.merge_attention, *args, factor=2)
    for grad_lse in (None, random(2, 3, 7)):
        grad_out = embedded(random(2, 7, 3, 20, dtype=dtype))
        backward = (grad_out, grad_lse, *args)
        actual = merge_attention_backward(*backward)
        assert_close(actual, reference.merge_attention_backward, *backward, factor=3)
