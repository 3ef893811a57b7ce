"""The caches of keys and values: every step equals attention to whole sequences."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from warploom.nn import (
    GroupedQueryAttention,
    PagedKeyValueCache,
    RotaryEmbedding,
    StaticKeyValueCache,
)

HIDDEN, HEADS, KEY_VALUE_HEADS, DIM = 32, 4, 2, 8
OPTIONS = {
    "plain": {},
    "everything": {"window": (20, -1), "softcap": 5.0, "sinks": True, "qk_norm_eps": 1e-6},
}


def make_module(**options):
    torch.manual_seed(0)
    module = GroupedQueryAttention(HIDDEN, HEADS, KEY_VALUE_HEADS, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.2, 0.3)
    return module.requires_grad_(False)


def make_cache(kind, rows, capacity=400, page_size=16):
    if kind == "paged":
        return PagedKeyValueCache(1, rows, page_size=page_size)
    return StaticKeyValueCache(1, rows, capacity)


def poison(cache):
    """NaN in every slot that no row uses."""
    row_of = torch.arange(len(cache.cache_seqlens))
    for pages in cache._layers[0] or ():
        unused = torch.ones(pages.shape[0] * cache.page_size, dtype=torch.bool)
        for row in row_of:
            position = torch.arange(int(cache.cache_seqlens[row]))
            block = cache.block_table[row, position // cache.page_size]
            unused[block * cache.page_size + position % cache.page_size] = False
        pages.flatten(0, 1)[unused] = torch.nan


def run_step(module, cache, pieces, table):
    """One packed step: piece b continues row b."""
    lengths = [piece.shape[0] for piece in pieces]
    cu_seqlens, max_seqlen = cache.pack(lengths)
    poison(cache)
    x = torch.cat(pieces).unsqueeze(0)
    out = module(x, table, None, cache, 0, cu_seqlens, max_seqlen)
    cache.advance(lengths)
    return out[0].split(lengths)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["paged", "static"])
def test_packed_steps_then_decoding_equal_whole_sequences(kind, options):
    module = make_module(**OPTIONS[options])
    table = RotaryEmbedding(DIM).table(400, "cpu")
    # Prefill; a second prefill in which two rows have nothing; a few tokens; one at a time.
    packed = [[5, 70, 16, 33], [31, 0, 40, 0]]
    uniform = [12, 3, *[1] * 20]
    totals = [sum(lengths) + sum(uniform) for lengths in zip(*packed, strict=True)]
    wholes = [torch.randn(total, HIDDEN) for total in totals]
    outs = [[] for _ in wholes]
    cache = make_cache(kind, len(wholes))
    done = [0] * len(wholes)

    def take(counts):
        pieces = [whole[at : at + n] for whole, at, n in zip(wholes, done, counts, strict=True)]
        done[:] = [at + n for at, n in zip(done, counts, strict=True)]
        return pieces

    for lengths in packed:
        for out, part in zip(outs, run_step(module, cache, take(lengths), table), strict=True):
            out.append(part)
    for count in uniform:
        x = torch.stack(take([count] * len(wholes)))
        poison(cache)
        step = module(x, table, cache=cache)
        cache.advance(count)
        for out, part in zip(outs, step, strict=True):
            out.append(part)
    for whole, out in zip(wholes, outs, strict=True):
        expected = module(whole.unsqueeze(0), table)[0]
        torch.testing.assert_close(torch.cat(out), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("page_size", [1, 16, 256])
def test_pages_of_rows_that_leave_are_used_again(page_size):
    module, table = make_module(), RotaryEmbedding(DIM).table(400, "cpu")
    cache = make_cache("paged", 4, page_size=page_size)
    wholes = [torch.randn(90, HIDDEN) for _ in range(4)]
    run_step(module, cache, [whole[:60] for whole in wholes], table)
    cache.select([3, 1])
    size = cache._num_blocks
    outs = []
    for at in range(60, 90):
        poison(cache)
        outs.append(
            module(torch.stack((wholes[3][at], wholes[1][at]))[:, None], table, cache=cache)
        )
        cache.advance(1)
    assert cache._num_blocks == size
    used = [block for blocks in cache._blocks for block in blocks]
    assert sorted(used + cache._free) == list(range(size))
    for place, row in enumerate((3, 1)):
        expected = module(wholes[row][None], table)[0, 60:]
        actual = torch.cat(outs, 1)[place]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_table_is_sent_at_most_once_a_page():
    module, cache = make_module(), make_cache("paged", 3)
    sent = []
    original = cache._send_table
    cache._send_table = lambda: (sent.append(1), original())
    run_step(module, cache, [torch.randn(n, HIDDEN) for n in (3, 9, 14)], None)
    sent.clear()
    for _ in range(64):
        module(torch.randn(3, 1, HIDDEN), cache=cache)
        cache.advance(1)
    assert len(sent) <= 4


def test_a_row_has_the_same_bits_whatever_is_beside_it():
    q, kv = torch.randn(3, 600, HEADS, DIM), torch.randn(3, 600, KEY_VALUE_HEADS, DIM)
    lengths = [7, 520, 300]
    outs = []
    for rows in ([0, 1, 2], [1]):
        cache = PagedKeyValueCache(1, len(rows))
        own = [lengths[row] for row in rows]
        cu_seqlens, max_seqlen = cache.pack(own)
        k = torch.cat([kv[row, :n] for row, n in zip(rows, own, strict=True)])[None]
        cache.attend(
            0, k.repeat_interleave(2, 2), k, k, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
        )
        cache.advance(own)
        new = kv[rows, 599:]
        outs.append(cache.attend(0, q[rows, :1], new, new)[rows.index(1)])
    assert torch.equal(*outs)


@pytest.mark.parametrize("page_size", [0, 257])
def test_a_page_size_that_no_kernel_reads_is_refused(page_size):
    with pytest.raises(ValueError, match=f"page_size: expected 1 to 256, got {page_size}"):
        PagedKeyValueCache(1, 2, page_size=page_size)


def test_selecting_a_row_twice_is_refused():
    with pytest.raises(
        ValueError, match=r"PagedKeyValueCache: rows: expected distinct ones, got \[0"
    ):
        PagedKeyValueCache(1, 2).select([0, 0])


@pytest.mark.parametrize("kind", ["paged", "static"])
def test_a_cache_refuses_tensors_that_need_a_gradient(kind):
    module = make_module().requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"KeyValueCache: .* is not differentiable, use torch.no_grad"
    ):
        module(torch.randn(1, 3, HIDDEN), cache=make_cache(kind, 1))


@pytest.mark.parametrize("kind", ["paged", "static"])
def test_a_copy_goes_on_by_itself(kind):
    module, cache = make_module(), make_cache(kind, 2)
    x = torch.randn(2, 30, HIDDEN)
    module(x[:, :20], cache=cache)
    cache.advance(20)
    outs = []
    for one in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        for at in range(20, 30):
            out = module(x[:, at : at + 1], cache=one)
            one.advance(1)
        outs.append(out)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_a_static_cache_starts_again_in_its_tensors():
    module, cache = make_module(), make_cache("static", 2)
    x = torch.randn(2, 30, HIDDEN)
    expected = module(x, cache=cache)
    cache.advance(30)
    tensors = (*cache._layers[0], cache.cache_seqlens, cache.block_table)
    addresses = [tensor.data_ptr() for tensor in tensors]
    cache.reset()
    assert torch.equal(module(x, cache=cache), expected)
    cache.advance(30)
    tensors = (*cache._layers[0], cache.cache_seqlens, cache.block_table)
    assert [tensor.data_ptr() for tensor in tensors] == addresses


def test_a_static_step_is_one_graph_for_every_length():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    module, table = make_module(sinks=True), RotaryEmbedding(DIM).table(256, "cpu")
    x = torch.randn(3, 160, HIDDEN)

    @torch.compile(fullgraph=True, backend=backend)
    def step(token, cache):
        out = module(token, table, cache=cache)
        cache.advance(1)
        return out

    cache = StaticKeyValueCache(1, 3, 200)
    module(x[:, :90], table, cache=cache)
    cache.advance([90, 90, 90])
    outs = [step(x[:, at : at + 1], cache) for at in range(90, 160)]
    torch.testing.assert_close(torch.cat(outs, 1), module(x, table)[:, 90:], rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
    assert cache.cache_seqlens.tolist() == [160] * 3
