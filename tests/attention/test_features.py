"""What changes the scores or hides keys, alone and in pairs: every backend, values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from warploom._library import OPS
from warploom.ops.attention import attention, attention_varlen
from warploom.reference.dropout import keep_mask, philox

from tests import plain
from tests.backends import BACKENDS, DEVICE, DTYPES, INTERPRETED, every_backend
from tests.numerics import check_against_float64, inside_larger

BATCH, HEADS, KV_HEADS = 2, 4, 2
SEED = 2**40 + 12345
DROPOUT = 0.3


def _padding(keys):
    mask = torch.zeros(BATCH, keys, dtype=torch.bool, device=DEVICE)
    mask[0, -keys // 3 :] = True
    mask[1, : keys // 4] = True
    return mask


def _dropout(heads, queries, keys):
    seed = torch.tensor([SEED], device=DEVICE)
    kept = keep_mask(seed, DROPOUT, 0, BATCH * heads, queries, keys)
    return {"dropout_p": DROPOUT, "seed": seed}, {
        "dropout_p": DROPOUT,
        "kept": kept.view(BATCH, heads, queries, keys),
    }


#: name -> (options of both, shapes of the tensors that may need gradients)
OPTIONS = {
    "causal": {"causal": True},
    "window": {"window": (9, 3)},
    "softcap": {"softcap": 1.5},
    "scale": {"softmax_scale": -0.4},
}
TENSORS = {
    "sinks": lambda heads, queries, keys: (heads,),
    "bias": lambda heads, queries, keys: (1, heads, queries, keys),
    "alibi_slopes": lambda heads, queries, keys: (BATCH, heads),
}
FEATURES = (*OPTIONS, *TENSORS, "padding", "dropout")


def _draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def check_features(
    names, backend, dtype, queries=21, keys=37, head_dim=16, value_dim=16, embed=None
):
    """The features `names` together, values and every gradient."""
    # Triton's interpreter runs a program of each head after the other.
    heads, kv_heads = (2, 1) if backend in INTERPRETED else (HEADS, KV_HEADS)
    ours, oracle = {"backend": backend, "return_lse": True}, {}
    for name in names:
        if name in OPTIONS:
            ours |= OPTIONS[name]
            oracle |= OPTIONS[name]
        elif name == "padding":
            ours["key_padding_mask"] = oracle["key_padding_mask"] = _padding(keys)
        elif name == "dropout":
            options, masks = _dropout(heads, queries, keys)
            ours |= options
            oracle |= masks
    tensors = [
        _draw(BATCH, queries, heads, head_dim),
        _draw(BATCH, keys, kv_heads, head_dim),
        _draw(BATCH, keys, kv_heads, value_dim),
    ]
    extras = [name for name in names if name in TENSORS]
    for name in extras:
        drawn = _draw(*TENSORS[name](heads, queries, keys))
        tensors.append(drawn.abs() * 0.2 if name == "alibi_slopes" else drawn)
    tensors = [
        tensor.to(DEVICE, torch.float32 if index > 2 and extras[index - 3] != "bias" else dtype)
        for index, tensor in enumerate(tensors)
    ]
    if embed is not None:
        tensors = [embed(tensor) for tensor in tensors]

    def with_extras(function, options):
        return lambda q, k, v, *rest: function(q, k, v, **dict(zip(extras, rest)), **options)

    check_against_float64(
        with_extras(attention, ours), with_extras(plain.attention, oracle), tensors
    )


@every_backend
@pytest.mark.parametrize("name", FEATURES)
def test_each_feature(backend, name):
    check_features([name], backend, torch.float32)


# The instrumented mode takes every branch in `test_all_together`; its pairs are in the slow set.
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "simt_instrumented"])
@pytest.mark.parametrize("pair", itertools.combinations(FEATURES, 2), ids="+".join)
def test_every_pair(backend, pair):
    check_features(pair, backend, torch.bfloat16)


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pair", itertools.combinations(FEATURES, 2), ids="+".join)
def test_every_pair_in_every_dtype(backend, dtype, pair):
    check_features(pair, backend, dtype, queries=70, keys=133, head_dim=40, value_dim=24)


# What is rounded is in the pairs: interpreted, one type shows the rest.
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (backend, dtype)
        for backend in BACKENDS
        for dtype in DTYPES
        if dtype == torch.float32 or backend not in INTERPRETED
    ],
    ids=str,
)
def test_all_together(backend, dtype):
    check_features(FEATURES, backend, dtype, queries=66, keys=71, head_dim=24, value_dim=40)


@every_backend
def test_slices_of_larger_buffers(backend):
    names = ("causal", "bias", "sinks")
    check_features(names, backend, torch.bfloat16, embed=inside_larger)


@every_backend
@pytest.mark.parametrize("head_dims", [(192, 128), (256, 256), (128, 64)], ids=str)
def test_wide_head_dims(backend, head_dims):
    names = ("causal", "window")
    check_features(names, backend, torch.bfloat16, 18, 35, *head_dims)


@every_backend
def test_a_window_hides_whole_tiles(backend):
    """Far from the diagonal nothing is seen: more keys than a window and two tiles hold."""
    check_features(("window", "causal"), backend, torch.bfloat16, queries=150, keys=300)


@every_backend
def test_hidden_rows_with_padding_are_zero(backend):
    q, k, v = (torch.randn(1, 5, 2, 16, device=DEVICE).requires_grad_() for _ in range(3))
    mask = torch.ones(1, 5, dtype=torch.bool, device=DEVICE)
    out, lse = attention(q, k, v, key_padding_mask=mask, return_lse=True, backend=backend)
    assert torch.all(out == 0) and torch.all(torch.isneginf(lse))
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.all(gradient == 0)


@every_backend
def test_a_bias_of_minus_infinity_hides_a_key(backend):
    q, k, v = (torch.randn(1, 6, 2, 16, device=DEVICE) for _ in range(3))
    bias = torch.zeros(1, 1, 6, 6, device=DEVICE)
    bias[..., 2] = float("-inf")
    kept = [0, 1, 3, 4, 5]
    got = attention(q, k, v, bias=bias, backend=backend)
    want = attention(q, k[:, kept], v[:, kept], backend="reference")
    torch.testing.assert_close(got, want)
    all_hidden = attention(q, k, v, bias=bias - float("inf"), backend=backend)
    assert torch.all(all_hidden == 0)


@every_backend
def test_two_runs_agree_bit_for_bit(backend):
    batch, heads = (1, 2) if backend in INTERPRETED else (2, 4)
    q = torch.randn(batch, 70, heads, 32, device=DEVICE).bfloat16().requires_grad_()
    shape = (batch, 90, heads // 2, 32)
    k, v = (torch.randn(shape, device=DEVICE).bfloat16().requires_grad_() for _ in range(2))
    runs = []
    for _ in range(2):
        out = attention(q, k, v, causal=True, window=(40, 0), backend=backend)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    assert all(torch.equal(*pair) for pair in zip(*runs))


# Packed sequences ------------------------------------------------------------------------------------

LENGTHS = {"unequal": ([5, 33, 1], [9, 40, 17]), "empty-ones": ([0, 7, 12, 3], [4, 0, 12, 9])}


def _bounds(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def check_packed(lengths, backend, dtype, *, slack=0, extras=(), **options):
    lengths_q, lengths_k = lengths
    shapes = [
        (sum(lengths_q), HEADS, 16),
        (sum(lengths_k), KV_HEADS, 16),
        (sum(lengths_k), KV_HEADS, 16),
    ]
    tensors = [_draw(*shape).to(DEVICE, dtype) for shape in shapes]
    for name in extras:
        shape = (HEADS,) if name == "sinks" else (len(lengths_q), HEADS)
        tensors.append(_draw(*shape).abs().to(DEVICE, torch.float32) * 0.3)
    oracle = dict(options)
    if "dropout_p" in options:
        seed = options["seed"]
        oracle.pop("seed")
        oracle["kept"] = [
            keep_mask(seed, DROPOUT, place * HEADS, HEADS, nq, nk).unsqueeze(0)
            for place, (nq, nk) in enumerate(zip(lengths_q, lengths_k))
        ]

    def ours(q, k, v, *rest):
        return attention_varlen(
            q, k, v, _bounds(lengths_q), _bounds(lengths_k), max(lengths_q) + slack,
            max(lengths_k) + slack, return_lse=True, backend=backend, **dict(zip(extras, rest)), **options,
        )  # fmt: skip

    def exact(q, k, v, *rest):
        return plain.packed_attention(
            q, k, v, lengths_q, lengths_k, **dict(zip(extras, rest)), **oracle
        )

    check_against_float64(ours, exact, tensors)


@every_backend
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_sequences(backend, lengths, dtype):
    check_packed(lengths, backend, dtype, causal=True)


@every_backend
def test_packed_with_every_feature(backend):
    seed = torch.tensor([SEED], device=DEVICE)
    check_packed(
        LENGTHS["unequal"], backend, torch.float32, slack=40, extras=("sinks", "alibi_slopes"),
        window=(7, 2), softcap=2.0, dropout_p=DROPOUT, seed=seed,
    )  # fmt: skip


@every_backend
def test_packed_rows_without_a_sequence_are_zero(backend):
    q, k, v = (torch.randn(9, 2, 16, device=DEVICE).requires_grad_() for _ in range(3))
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32, device=DEVICE)
    out, lse = attention_varlen(q, k, v, bounds, bounds, 4, 4, return_lse=True, backend=backend)
    assert torch.all(out[6:] == 0) and torch.all(torch.isneginf(lse[:, 6:]))
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.all(gradient[6:] == 0) and torch.all(torch.isfinite(gradient))


@every_backend
def test_opcheck_of_packed_sequences(backend):
    q, k, v = (torch.randn(5, heads, 16, device=DEVICE) for heads in (4, 2, 2))
    bounds = _bounds([2, 3])
    tensors = (None, None, None, None, bounds, bounds, None, None)
    args = (q, k, v, *tensors, 0.25, -1, 0, 0.0, 0.0, 3, 3)
    overload = OPS["attention"].overloads[backend]
    out, lse = overload(*args)
    upstream = (torch.randn_like(out), q, k, v, out, lse, None)
    arguments = (*upstream, None, None, None, bounds, bounds, None, *args[11:], False, False)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(overload, args, test_utils=checks)
    backward = OPS["attention_backward"].overloads[backend]
    torch.library.opcheck(backward, arguments, test_utils=checks)


@every_backend
@pytest.mark.parametrize("page_size", [1, 7, 16, 256])
def test_packed_with_pages(backend, page_size):
    """Unused pages and slots hold NaN, unused places of the table garbage."""
    lengths_q, lengths_k = [5, 0, 20], [33, 4, 20]
    places = -(-max(lengths_k) // page_size) + 1
    table = torch.full((3, places), 2**30, dtype=torch.int32)
    order = iter(torch.randperm(3 * places).tolist())
    pages = [
        torch.full((3 * places, page_size, KV_HEADS, 16), float("nan")).bfloat16() for _ in range(2)
    ]
    rows = [torch.randn(sum(lengths_k), KV_HEADS, 16).bfloat16() for _ in range(2)]
    start = 0
    for place, length in enumerate(lengths_k):
        for first in range(0, length, page_size):
            block = table[place, first // page_size] = next(order)
            count = min(page_size, length - first)
            for cache, row in zip(pages, rows):
                cache[block, :count] = row[start + first : start + first + count]
        start += length
    q = torch.randn(sum(lengths_q), HEADS, 16).bfloat16()

    def ours(q):
        return attention_varlen(
            q, *(cache.to(DEVICE) for cache in pages), _bounds(lengths_q), _bounds(lengths_k), 20, 33,
            block_table=table.to(DEVICE), causal=True, return_lse=True, backend=backend,
        )  # fmt: skip

    def exact(q):
        keys, values = (row.to(q) for row in rows)
        return plain.packed_attention(q, keys, values, lengths_q, lengths_k, causal=True)

    check_against_float64(ours, exact, [q.to(DEVICE)], gradients=False)


# Dropout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "numbers"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, key, numbers):
    """The vectors of the paper's own library."""
    words = tuple(torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in philox(torch.tensor(key), words)) == numbers


@every_backend
def test_dropout_follows_the_seed(backend):
    q, k, v = (torch.randn(1, 16, 2, 16, device=DEVICE) for _ in range(3))
    one, two = (torch.tensor([seed], device=DEVICE) for seed in (1, 2))

    def run(seed):
        return attention(q, k, v, dropout_p=0.5, seed=seed, backend=backend)

    assert torch.equal(run(one), run(one)) and not torch.equal(run(one), run(two))


def test_dropout_draws_from_torchs_generator():
    q, k, v = (torch.randn(1, 16, 2, 16, device=DEVICE) for _ in range(3))
    torch.manual_seed(5)
    first, second = attention(q, k, v, dropout_p=0.5), attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(5)
    assert torch.equal(attention(q, k, v, dropout_p=0.5), first) and not torch.equal(first, second)


def test_dropout_keeps_the_mean():
    q, k, v = (torch.randn(1, 64, 4, 16, device=DEVICE) for _ in range(3))
    mean = torch.stack([attention(q, k, v, dropout_p=0.4) for _ in range(200)]).mean(0)
    assert (mean - attention(q, k, v)).abs().mean() < 0.03


# Bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": (3,)}, ValueError, r"window: expected \(left, right\)"),
        ({"window": (-2, 0)}, ValueError, "window: expected"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a number >= 0"),
        ({"sinks": torch.ones(3)}, ValueError, r"sinks: expected shape \(4,\), got \(3,\)"),
        ({"bias": torch.ones(1, 4, 3, 6)}, ValueError, "bias: expected a shape that broadcasts"),
        ({"bias": torch.ones(1, 4, 3, 5).half()}, TypeError, "bias: expected q's dtype float32"),
        ({"alibi_slopes": torch.ones(5)}, ValueError, "alibi_slopes: expected shape"),
        ({"key_padding_mask": torch.ones(1, 5)}, TypeError, "key_padding_mask: expected dtype bool"),
        ({"key_padding_mask": torch.ones(1, 6).bool()}, ValueError, "key_padding_mask: expected shape"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a probability in \[0, 1\)"),
        ({"dropout_p": 0.1, "seed": torch.ones(2)}, ValueError, "seed: expected an int64 tensor"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_bad_input_is_named(change, error, message):
    q, k = torch.ones(1, 3, 4, 8), torch.ones(1, 5, 2, 8)
    with pytest.raises(error, match=f"attention: {message}"):
        attention(q, k, k, **change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 3])}, TypeError, "cu_seqlens_q: expected dtype int32"),
        ({"cu_seqlens_k": torch.tensor([0, 2, 5], dtype=torch.int32)}, ValueError,
         r"cu_seqlens_k: expected shape \(2\)"),
        ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k: expected a length >= 0"),
        ({"q": torch.ones(1, 3, 4, 8)}, ValueError, r"q: expected 3 dimensions \[Tq, H, D\]"),
        ({"block_table": torch.zeros(1, 2, dtype=torch.int32)}, ValueError,
         r"k: expected 4 dimensions \[num_blocks"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_bad_packed_input_is_named(change, error, message):
    good = {
        "q": torch.ones(3, 4, 8),
        "k": torch.ones(5, 2, 8),
        "v": torch.ones(5, 2, 8),
        "cu_seqlens_q": torch.tensor([0, 3], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 5], dtype=torch.int32),
        "max_seqlen_q": 3,
        "max_seqlen_k": 5,
    }
    with pytest.raises(error, match=f"attention_varlen: {message}"):
        attention_varlen(**{**good, **change})


def test_pages_are_not_differentiable():
    q, pages = torch.ones(3, 4, 8, requires_grad=True), torch.ones(2, 4, 2, 8)
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    table = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="block_table: expected tensors that need no gradient"):
        attention_varlen(q, pages, pages, bounds, bounds, 3, 3, block_table=table)
