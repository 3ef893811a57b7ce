"""attention_decode on every backend against plain mathematics in float64: pages, features, appending."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from warploom.ops._attention_ops import attention_cache_append_op
from warploom.ops.attention import attention_decode

from tests.backends import BACKENDS, DEVICE, DTYPES, SLOW_BACKENDS, every_backend, every_dtype
from tests.numerics import FORWARD, assert_within, error_near_by

NAN = float("nan")
#: What unused places of a block table hold.
GARBAGE = (2147480000, -7, -2147483648)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `page_size` None: a contiguous cache."""

    lengths: tuple[int, ...]
    queries: int = 1
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    value_dim: int = 64
    page_size: int | None = None
    spare: int = 9  # capacity beyond the longest sequence
    options: dict = dataclasses.field(default_factory=dict)

    @property
    def capacity(self) -> int:
        rows = max(self.lengths) + self.spare
        return rows if self.page_size is None else -(-rows // self.page_size) * self.page_size


# The rule compares two maxima: where a case has few rows, either is chance, hence batches of 8.
CASES = {
    "seven-heads-on-one": Case((0, 1, 63, 64), heads=7, kv_heads=1),
    "eight-heads-on-two-pages-of-16": Case((65, 64), heads=8, page_size=16),
    "pages-of-1": Case((5, 33), page_size=1, dim=32, value_dim=32),
    "pages-of-48": Case((65, 100), page_size=48, dim=128, value_dim=128),
    "pages-of-256": Case((300, 17), heads=2, kv_heads=1, page_size=256),
    "wide-heads": Case((40,) * 8, heads=3, kv_heads=1, dim=256, value_dim=256),
    "value-dim-differs": Case((33, 2), dim=96, value_dim=40),
    "odd-head-dim": Case((37,) * 8, dim=59, value_dim=59, page_size=16),
    "one-channel": Case((18,), dim=1, value_dim=3),
    "several-queries-causal": Case((5, 64, 3), queries=5, heads=8, page_size=16),
    # Every row of a tensor-core tile, each with maxima that rise from tile to tile.
    "sixteen-rows-over-many-keys": Case((300, 200), queries=2, heads=16),
    "several-queries-full": Case((20, 2), queries=3, options={"causal": False}),
    "window": Case((130, 70), queries=2, options={"window": (20, 0)}),
    "window-both-sides": Case(
        (50, 4), queries=4, page_size=16, options={"window": (9, 2), "causal": False}
    ),
    "softcap": Case((40,) * 4, queries=2, options={"softcap": 2.0}),
    "sinks": Case((0, 30), options={"sinks": True}),
    "alibi": Case((33, 20), queries=2, options={"alibi_slopes": True}),
    "everything": Case(
        (150, 9),
        queries=3,
        heads=6,
        page_size=16,
        options={
            "window": (60, -1), "softcap": 3.0, "sinks": True, "alibi_slopes": True,
            "softmax_scale": 0.3, "num_splits": 2,
        },
    ),
    "three-splits": Case((300, 10, 0), heads=2, kv_heads=1, options={"num_splits": 3}),
    "three-splits-sinks": Case((200, 0), heads=2, options={"num_splits": 3, "sinks": True}),
    "split-size": Case((200, 64), heads=2, page_size=16, options={"split_size": 64}),
}  # fmt: skip


@dataclasses.dataclass
class Call:
    q: torch.Tensor
    keys: torch.Tensor  # [B, capacity, Hkv, D], the rows in their order; 0 beyond the length
    values: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    cache_seqlens: torch.Tensor
    block_table: torch.Tensor | None
    options: dict

    def decode(self, backend, **changes):
        return attention_decode(
            self.q, self.k_cache, self.v_cache, self.cache_seqlens, self.block_table,
            return_lse=True, backend=backend, **{**self.options, **changes},
        )  # fmt: skip


def paged(rows, page_size, order):
    """[B, capacity, H, D] as pages in the order given, two more pages of NaN among them."""
    batch, capacity = rows.shape[:2]
    pages = rows.new_full((batch * capacity // page_size + 2, page_size, *rows.shape[2:]), NAN)
    cut = rows.reshape(-1, page_size, *rows.shape[2:])
    pages[order] = cut
    return pages


def prepare(case, dtype, seed=0):
    """Tensors on the test device; rows and pages that are not used are NaN, such table entries garbage."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    batch, capacity = len(case.lengths), case.capacity
    q = randn(batch, case.queries, case.heads, case.dim)
    keys = randn(batch, capacity, case.kv_heads, case.dim)
    values = randn(batch, capacity, case.kv_heads, case.value_dim)
    k_cache, v_cache = keys.clone(), values.clone()
    for row, length in enumerate(case.lengths):
        k_cache[row, length:] = v_cache[row, length:] = NAN
        keys[row, length:] = values[row, length:] = 0
    table = None
    if case.page_size is not None:
        places = capacity // case.page_size
        order = torch.randperm(batch * places + 2, generator=generator)[: batch * places]
        k_cache = paged(k_cache, case.page_size, order)
        v_cache = paged(v_cache, case.page_size, order)
        table = order.view(batch, places).to(torch.int32)
        for row, length in enumerate(case.lengths):
            used = -(-length // case.page_size)
            for place in range(used, places):
                table[row, place] = GARBAGE[place % len(GARBAGE)]
        table = table.to(DEVICE)
    options = dict(case.options)
    for name in ("sinks", "alibi_slopes"):
        if options.get(name):
            options[name] = randn(case.heads).float().abs().to(DEVICE)
    return Call(
        q.to(DEVICE), keys.to(DEVICE), values.to(DEVICE), k_cache.to(DEVICE), v_cache.to(DEVICE),
        torch.tensor(case.lengths, dtype=torch.int32, device=DEVICE), table, options,
    )  # fmt: skip


def plain_decode(
    q, keys, values, lengths, *, causal=True, window=(-1, -1), softcap=0.0, softmax_scale=None,
    sinks=None, alibi_slopes=None, num_splits=0, split_size=0,
):  # fmt: skip
    """One query of one head at a time, in the tensors' dtype."""
    batch, queries, heads, dim = q.shape
    group = heads // keys.shape[2]
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    left, right = window
    right = 0 if causal else right
    out = torch.zeros(batch, queries, heads, values.shape[-1], dtype=q.dtype)
    lse = torch.full((batch, heads, queries), -float("inf"), dtype=q.dtype)
    for b, length in enumerate(lengths):
        distance = torch.arange(length) - torch.arange(queries).unsqueeze(1) - length + queries
        seen = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            seen &= distance >= -left
        if right >= 0:
            seen &= distance <= right
        for h in range(heads):
            scores = q[b, :, h] @ keys[b, :length, h // group].T * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if alibi_slopes is not None:
                scores = scores - alibi_slopes[h].to(q.dtype) * distance.abs()
            scores = scores.masked_fill(~seen, -float("inf"))
            if sinks is not None:
                scores = torch.cat([scores, sinks[h].to(q.dtype).expand(queries, 1)], dim=1)
            some = ~torch.isneginf(scores).all(1)  # no column at all: none
            weights = torch.softmax(scores, dim=1)[some, :length]
            out[b, some, h] = weights @ values[b, :length, h // group]
            lse[b, h, some] = torch.logsumexp(scores[some], dim=1)
    return out, lse


def check(call, lengths, actual, yardstick=None):
    """The rule of docs/numerics.md for out and lse."""
    tensors = [tensor.cpu() for tensor in (call.q, call.keys, call.values)]
    options = {
        name: value.cpu() if isinstance(value, torch.Tensor) else value
        for name, value in call.options.items()
    }

    def plainly(*tensors):
        return plain_decode(*tensors, lengths, **options)

    exact, rough = plainly(*(tensor.double() for tensor in tensors)), plainly(*tensors)
    for index, (got, want, yard) in enumerate(zip(actual, exact, rough)):
        elsewhere = functools.partial(error_near_by, plainly, tensors, exact, index)
        what = ("out", "lse")[index]
        assert_within(got.cpu(), want, yard, factor=FORWARD, what=what, plain_elsewhere=elsewhere)


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
    check(call, case.lengths, call.decode(backend))


@pytest.mark.slow
@every_backend
@every_dtype
@pytest.mark.parametrize("page_size", [None, 1, 16, 48, 256])
@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("dim", [64, 111, 128, 192])
def test_every_length_page_and_split(backend, dtype, page_size, num_splits, dim):
    case = Case(
        (0, 1, 63, 64, 65, 300), queries=2, heads=7, kv_heads=1, dim=dim, value_dim=dim,
        page_size=page_size, options={"num_splits": num_splits},
    )  # fmt: skip
    call = prepare(case, dtype)
    check(call, case.lengths, call.decode(backend))


@every_backend
@pytest.mark.parametrize("sinks", [False, True], ids=["no-sinks", "sinks"])
def test_split_size_makes_a_sequence_independent_of_its_batch(backend, sinks):
    """To the bit: alone or with others, in a larger cache, with pages or without."""
    length, options = 70, {"split_size": 64}
    case = Case((length, 130, 3), queries=2, heads=4, kv_heads=1, page_size=16, options=options)
    call = prepare(case, torch.bfloat16)
    if sinks:
        call.options["sinks"] = torch.randn(case.heads, device=DEVICE)
    out, lse = call.decode(backend)

    def alone(capacity):
        rows = [
            torch.nn.functional.pad(
                tensor[:1, :length], (0, 0, 0, 0, 0, capacity - length), value=NAN
            )
            for tensor in (call.keys, call.values)
        ]
        return attention_decode(
            call.q[:1], *rows, call.cache_seqlens[:1], return_lse=True, backend=backend,
            **call.options,
        )  # fmt: skip

    for capacity in (length, 300):
        alone_out, alone_lse = alone(capacity)
        assert torch.equal(alone_out[0], out[0])
        assert torch.equal(alone_lse[0], lse[0])


@every_backend
def test_a_part_without_keys_changes_no_bit(backend):
    """A sequence of one part: written at once, or merged with others that are empty."""
    case = Case((50,), heads=2, kv_heads=1, spare=14, options={"split_size": 64})
    call = prepare(case, torch.float32)
    out, lse = call.decode(backend)
    for tensor in ("k_cache", "v_cache"):
        rows = getattr(call, tensor)
        setattr(call, tensor, torch.cat([rows, torch.full_like(rows, NAN)], dim=1))
    wider_out, wider_lse = call.decode(backend)
    assert torch.equal(out, wider_out) and torch.equal(lse, wider_lse)


@every_backend
def test_two_runs_agree_to_the_bit(backend):
    call = prepare(Case((100, 20), options={"num_splits": 2}), torch.bfloat16)
    first, second = call.decode(backend), call.decode(backend)
    assert all(torch.equal(one, two) for one, two in zip(first, second))


@every_backend
def test_strided_queries_and_caches(backend):
    """Slices of larger buffers, at odd addresses."""
    case = Case((20, 33), queries=2)
    call = prepare(case, torch.bfloat16)

    def embed(tensor):
        wide = tensor.new_full((*tensor.shape[:2], tensor.shape[2] + 1, tensor.shape[3] + 3), NAN)
        view = wide[:, :, 1:, 3:]
        view.copy_(tensor)
        return view

    call.q, call.k_cache, call.v_cache = map(embed, (call.q, call.k_cache, call.v_cache))
    check(call, case.lengths, call.decode(backend))


@every_backend
def test_empty_batch(backend):
    q = torch.randn(0, 1, 2, 8, device=DEVICE)
    cache = torch.randn(0, 4, 2, 8, device=DEVICE)
    lengths = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    out, lse = attention_decode(q, cache, cache, lengths, return_lse=True, backend=backend)
    assert out.shape == (0, 1, 2, 8) and lse.shape == (0, 2, 1)


def tables(rows, half):
    angles = torch.rand(rows, half, dtype=torch.float64) * 6
    return angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE)


def plain_rotate(x, cos, sin, positions, interleaved):
    """x [B, S, H, D] in its own dtype, each pair a complex number; positions [B, S]."""
    half = cos.shape[1]
    turns = torch.stack([cos, sin])[:, positions.clamp(max=cos.shape[0] - 1)].to(x.dtype)
    c, s = turns.unsqueeze(3)
    x = x.clone()
    pairs = x[..., : 2 * half]
    first, second = (
        (pairs[..., 0::2], pairs[..., 1::2])
        if interleaved
        else (pairs[..., :half], pairs[..., half:])
    )
    turned = first * c - second * s, second * c + first * s
    first.copy_(turned[0]), second.copy_(turned[1])
    return x


@every_backend
@every_dtype
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [0, 16, 64, 6], ids="rotary{}".format)
def test_append(backend, dtype, interleaved, rotary_dim):
    """Pages of 4: rows that do not fit and rows of negative blocks are not written, nothing else either."""
    k = torch.randn(3, 5, 2, 64).to(DEVICE, dtype)
    v = torch.randn(3, 5, 2, 24).to(DEVICE, dtype)
    k_cache = torch.full((7, 4, 2, 64), 7.0, dtype=dtype, device=DEVICE)
    v_cache = torch.full((7, 4, 2, 24), 7.0, dtype=dtype, device=DEVICE)
    lengths = torch.tensor([2, 5, 0], dtype=torch.int32, device=DEVICE)
    table = torch.tensor([[3, 0], [-5, 6], [2, -1]], dtype=torch.int32, device=DEVICE)
    cos, sin = tables(6, rotary_dim // 2) if rotary_dim else (None, None)
    attention_cache_append_op.overloads[backend](
        k, v, k_cache, v_cache, lengths, table, cos, sin, interleaved
    )
    positions = lengths.long().cpu().unsqueeze(1) + torch.arange(5)
    exact, rough = k.double().cpu(), k.cpu()
    if rotary_dim:
        turn = (cos.cpu(), sin.cpu(), positions, interleaved)
        exact, rough = plain_rotate(exact, *turn), plain_rotate(rough, *turn)
    k_cache, v_cache, v = k_cache.cpu(), v_cache.cpu(), v.cpu()
    written = torch.zeros(7, 4, dtype=torch.bool)
    got_rows, exact_rows, rough_rows = [], [], []
    for b in range(3):
        for i, position in enumerate(positions[b].tolist()):
            block = table[b, position // 4].item() if position < 8 else -1
            if block < 0:
                continue
            slot = position % 4
            written[block, slot] = True
            assert torch.equal(v_cache[block, slot], v[b, i])
            got_rows.append(k_cache[block, slot])
            exact_rows.append(exact[b, i])
            rough_rows.append(rough[b, i])
    assert written.sum() == 12
    assert (k_cache[~written] == 7).all() and (v_cache[~written] == 7).all()
    got, want, yard = (torch.stack(rows) for rows in (got_rows, exact_rows, rough_rows))
    assert_within(got, want, yard, factor=FORWARD, what="keys")
    assert torch.equal(got[..., rotary_dim:].double(), want[..., rotary_dim:])


@every_backend
@pytest.mark.parametrize("odd", [False, True], ids=["aligned", "odd"])
def test_append_to_a_contiguous_cache(backend, odd):
    """The last sequence is full: only what fits is written. Odd: slices that begin anywhere."""
    shape = (2, 9, 2, 16)
    buffer = torch.full((2, 9, 3, 19), 7.0, dtype=torch.bfloat16, device=DEVICE)
    k_cache = buffer[:, :, 1:, 3:] if odd else torch.full(shape, 7.0, device=DEVICE).bfloat16()
    v_cache = torch.full(shape, 7.0, device=DEVICE).bfloat16()
    k, v = (torch.randn(2, 3, 2, 16, device=DEVICE).bfloat16() for _ in range(2))
    lengths = torch.tensor([4, 8], dtype=torch.int32, device=DEVICE)
    attention_cache_append_op.overloads[backend](
        k, v, k_cache, v_cache, lengths, None, None, None, False
    )
    for new, cache in ((k, k_cache), (v, v_cache)):
        expected = torch.full_like(cache, 7.0)
        expected[0, 4:7] = new[0]
        expected[1, 8] = new[1, 0]
        assert torch.equal(cache, expected)
    assert (buffer[:, :, 0] == 7).all() and (buffer[..., :3] == 7).all()


@every_backend
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_decoding_with_new_keys(backend, interleaved):
    """Rotates, appends and attends: the same as attention to a cache that held the keys before."""
    case = Case((20, 33), queries=2, page_size=16, spare=0)
    call = prepare(case, torch.float32)
    before = torch.tensor([18, 31], dtype=torch.int32, device=DEVICE)
    cos, sin = tables(40, 16)
    positions = before.long().cpu().unsqueeze(1) + torch.arange(2)
    turn = (cos.cpu(), sin.cpu(), positions, interleaved)
    new_k = torch.stack([call.keys[b, n - 2 : n] for b, n in enumerate(case.lengths)])
    new_v = torch.stack([call.values[b, n - 2 : n] for b, n in enumerate(case.lengths)])
    for b, length in enumerate(case.lengths):
        turned = plain_rotate(new_k.cpu().double(), *turn)[b].float()
        call.keys[b, length - 2 : length] = turned.to(DEVICE)
        for position in (length - 2, length - 1):
            block = call.block_table[b, position // 16].item()
            call.k_cache[block, position % 16] = call.v_cache[block, position % 16] = NAN
    actual = attention_decode(
        call.q, call.k_cache, call.v_cache, before, call.block_table, k=new_k, v=new_v,
        rotary=(cos, sin), interleaved=interleaved, return_lse=True, backend=backend,
    )  # fmt: skip
    call.q = plain_rotate(call.q.cpu().double(), *turn).float().to(DEVICE)
    check(call, case.lengths, actual)


def test_errors_name_op_and_argument():
    call = prepare(Case((4, 5), dim=8, value_dim=8, page_size=16), torch.float32)
    decode = functools.partial(
        attention_decode, call.q, call.k_cache, call.v_cache, call.cache_seqlens, call.block_table
    )
    new = torch.randn(2, 1, 2, 8, device=DEVICE)
    for error, options in [
        ("attention_decode: split_size: expected a multiple of 64", {"split_size": 32}),
        ("split_size: expected 0 beside num_splits", {"split_size": 64, "num_splits": 2}),
        ("attention_decode: num_splits: expected a number >= 0", {"num_splits": -1}),
        ("attention_decode: v: expected a tensor beside the other one", {"k": new}),
        ("attention_decode: k: expected shape", {"k": new[:1], "v": new}),
        ("attention_decode: rotary: expected None without k", {"rotary": tables(4, 4)}),
        ("attention_decode: window: expected", {"window": (-2, 0)}),
        ("attention_decode: softcap: expected", {"softcap": -1.0}),
        ("attention_decode: sinks: expected shape", {"sinks": torch.randn(3, device=DEVICE)}),
    ]:
        with pytest.raises(ValueError, match=error):
            decode(**options)
    with pytest.raises(TypeError, match="attention_decode: cache_seqlens: expected dtype int32"):
        attention_decode(call.q, call.k_cache, call.v_cache, call.cache_seqlens.long())
    with pytest.raises(ValueError, match="attention_decode: k_cache: expected q's batch 2"):
        attention_decode(call.q, call.k_cache, call.v_cache, call.cache_seqlens)
    with pytest.raises(RuntimeError, match="attention_decode: q: expected a tensor that needs no"):
        attention_decode(call.q.requires_grad_(), call.k_cache, call.v_cache, call.cache_seqlens)
