"""mla_decode on every backend against float64: sizes, pages, splits, compressed caches."""

from __future__ import annotations

import functools

import pytest
import torch
from warploom.ops.mla import mla_decode

from tests.backends import BACKENDS, DEVICE, DTYPES, SLOW_BACKENDS, every_backend, every_dtype
from tests.mla.caches import NAN, Case, prepare

# The rule compares two maxima: where a case has few rows, either is chance, hence several sequences.
CASES = {
    "deepseek-v2": Case((65, 3), heads=16, d_latent=512, d_rope=64, page_size=64),
    "transmla-448-128": Case((33, 40), heads=5, d_latent=448, d_rope=128),
    "transmla-320-256": Case((20, 31), heads=9, d_latent=320, d_rope=256, page_size=16),
    "latent-256": Case((50, 7), heads=22, d_latent=256, d_rope=64),
    "without-rotary": Case((40, 20), d_latent=64, d_rope=0),
    "one-head": Case((0, 1, 63, 64), heads=1),
    "63-heads": Case((37, 9), heads=63, page_size=16),
    "128-heads": Case((70, 20), heads=128, d_latent=64),
    "pages-of-1": Case((5, 33), page_size=1),
    "pages-of-7": Case((65, 14), page_size=7, queries=2),
    "pages-of-256": Case((300, 17), page_size=256),
    "several-queries": Case((5, 64, 3), queries=5, heads=8, page_size=16),
    "eight-queries-of-22-heads": Case((130, 8), queries=8, heads=22, d_latent=64),
    "more-queries-than-tokens": Case((3, 0, 20), queries=7, heads=3),
    "not-causal": Case((20, 2), queries=3, causal=False),
    "training-lengths": Case((70, 41), queries=41, heads=3),
    "three-splits": Case((300, 10, 0), options={"num_splits": 3}),
    "split-size": Case((200, 64), page_size=16, queries=2, options={"split_size": 64}),
    "uneven-batch": Case((400, 1, 0, 90), heads=16, page_size=64),
    "float8": Case((65, 20), heads=8, d_latent=512, d_rope=64, page_size=64, format=torch.float8_e4m3fn),
    "float8-odd-groups": Case((40, 3), queries=2, d_latent=208, format=torch.float8_e4m3fn),
    "int8": Case((65, 20), heads=8, d_latent=256, d_rope=64, page_size=16, format=torch.int8),
}  # fmt: skip

# Of the slow backends one case shows that float16 works as bfloat16 does.
GRID = [
    pytest.param(backend, dtype, case, id=f"{name}-{str(dtype).removeprefix('torch.')}-{backend}")
    for name, case in CASES.items()
    for dtype in DTYPES
    for backend in BACKENDS
    if backend not in SLOW_BACKENDS or dtype != torch.float16 or name == "pages-of-1"
]


@pytest.mark.parametrize(("backend", "dtype", "case"), GRID)
def test_output_and_log_sum_exp(backend, dtype, case):
    call = prepare(case, dtype)
    call.check(call.decode(backend))


@pytest.mark.slow
@every_backend
@every_dtype
@pytest.mark.parametrize("page_size", [None, 1, 16, 48, 256])
@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("sizes", [(512, 64), (448, 128), (320, 256), (48, 16)], ids=str)
def test_every_length_page_and_split(backend, dtype, page_size, num_splits, sizes):
    case = Case(
        (0, 1, 63, 64, 65, 300), queries=2, heads=7, d_latent=sizes[0], d_rope=sizes[1],
        page_size=page_size, options={"num_splits": num_splits},
    )  # fmt: skip
    call = prepare(case, dtype)
    call.check(call.decode(backend))


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize("heads", [1, 2, 3, 9, 22, 63, 64, 65, 126, 128])
@pytest.mark.parametrize("queries", [1, 3, 8])
def test_every_number_of_heads(backend, heads, queries):
    call = prepare(Case((130, 8, 65), queries=queries, heads=heads, page_size=16), torch.bfloat16)
    call.check(call.decode(backend))


@every_backend
def test_split_size_makes_a_sequence_independent_of_its_batch(backend):
    """To the bit: alone or with others, in a larger cache, with pages or without."""
    length, options = 70, {"split_size": 64}
    case = Case((length, 130, 3), queries=2, page_size=16, options=options)
    call = prepare(case, torch.bfloat16)
    out, lse = call.decode(backend)
    for capacity in (length, 300):
        rows = torch.nn.functional.pad(
            call.rows[:1, :length], (0, 0, 0, capacity - length), value=NAN
        )
        alone_out, alone_lse = mla_decode(
            call.q[:1], rows, call.cache_seqlens[:1], d_latent=case.d_latent,
            softmax_scale=case.softmax_scale, return_lse=True, backend=backend, **options,
        )  # fmt: skip
        assert torch.equal(alone_out[0], out[0]) and torch.equal(alone_lse[0], lse[0])


@every_backend
def test_two_runs_agree_to_the_bit(backend):
    call = prepare(Case((100, 20, 0)), torch.bfloat16)
    first, second = call.decode(backend), call.decode(backend)
    assert all(torch.equal(one, two) for one, two in zip(first, second))


@every_backend
def test_strided_queries_and_caches(backend):
    """Slices of larger buffers, at odd addresses."""
    call = prepare(Case((20, 33), queries=2), torch.bfloat16)

    def embed(tensor):
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), NAN)
        view = wide[..., 3:]
        view.copy_(tensor)
        return view

    call.q, call.kv_cache = embed(call.q), embed(call.kv_cache)
    call.check(call.decode(backend))


@every_backend
@pytest.mark.parametrize("empty", ["batch", "queries", "heads"])
def test_nothing_to_do(backend, empty):
    sizes = {"batch": 2, "queries": 1, "heads": 4, empty: 0}
    q = torch.randn(sizes["batch"], sizes["queries"], sizes["heads"], 48, device=DEVICE)
    cache = torch.randn(sizes["batch"], 5, 48, device=DEVICE)
    lengths = torch.full((sizes["batch"],), 5, dtype=torch.int32, device=DEVICE)
    out, lse = mla_decode(
        q, cache, lengths, d_latent=32, softmax_scale=0.2, return_lse=True, backend=backend
    )
    assert out.shape == (*q.shape[:3], 32) and lse.shape == (q.shape[0], q.shape[2], q.shape[1])


def test_errors_name_op_and_argument():
    call = prepare(Case((4, 5), page_size=16), torch.float32)
    decode = functools.partial(
        mla_decode, call.q, call.kv_cache, call.cache_seqlens, call.block_table, softmax_scale=0.2
    )
    for error, options in [
        ("mla_decode: split_size: expected a multiple of 64", {"split_size": 32}),
        ("split_size: expected 0 beside num_splits", {"split_size": 64, "num_splits": 2}),
        ("mla_decode: num_splits: expected a number >= 0", {"num_splits": -1}),
        ("mla_decode: d_latent: expected 1 to 48, got 49", {"d_latent": 49}),
    ]:
        with pytest.raises(ValueError, match=error):
            decode(**{"d_latent": 32, **options})
    with pytest.raises(TypeError, match="mla_decode: cache_seqlens: expected dtype int32"):
        mla_decode(call.q, call.kv_cache, call.cache_seqlens.long(), d_latent=32, softmax_scale=0.2)
    with pytest.raises(TypeError, match="mla_decode: kv_cache: expected dtype float32, float8"):
        mla_decode(call.q, call.kv_cache.half(), call.cache_seqlens, d_latent=32, softmax_scale=0.2)
    with pytest.raises(ValueError, match="mla_decode: kv_cache: expected rows of 68"):
        mla_decode(
            call.q, call.kv_cache.to(torch.int8), call.cache_seqlens, d_latent=32, softmax_scale=0.2
        )
    call.q.requires_grad_()
    with pytest.raises(RuntimeError, match="mla_decode: q: expected a tensor that needs no"):
        decode(d_latent=32)
