"""The attention launchers against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from warploom.reference import attention as reference
from warploom.reference.dropout import keep_mask
from warploom.triton_kernels.attention.attention import attention, why_not
from warploom.triton_kernels.attention.attention_backward import attention_backward
from warploom.triton_kernels.attention.tiles import (
    MAX_HEAD_DIM,
    forward_tile,
    key_gradients_tile,
    query_gradients_tile,
)

from tests.triton.pages import paged

Draw = Callable[..., Tensor]
Check = Callable[..., None]
Embed = Callable[[Tensor], Tensor]

CAUSAL = pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))

# (B, Sq, Sk, H, Hkv, D, Dv)
SHAPES = pytest.mark.parametrize(
    "shape",
    (
        pytest.param((1, 1, 1, 1, 1, 1, 1), id="one-of-everything"),
        pytest.param((2, 5, 7, 4, 2, 20, 12), id="odd-head-dims-and-groups-of-2"),
        pytest.param((1, 129, 129, 1, 1, 64, 64), id="one-past-a-tile"),
        pytest.param((1, 64, 128, 6, 2, 16, 16), id="whole-tiles-and-groups-of-3"),
        pytest.param((1, 1, 65, 4, 1, 128, 128), id="one-query-of-many-keys"),
        pytest.param((1, 70, 33, 2, 2, 40, 72), id="more-queries-than-keys"),
        pytest.param((1, 40, 100, 2, 1, 192, 128), id="latent-attention-head-dims"),
    ),
)


# Every option of the op, none of them a special case of another.
FEATURES = {
    "sliding-window": {"window": (9, 0)},
    "window-on-both-sides": {"window": (30, 13), "sinks": True},
    "softcap": {"softcap": 2.0, "window": (-1, 0)},
    "bias": {"bias": True},
    "alibi": {"alibi": True, "window": (-1, 0)},
    "padding": {"padding": True, "sinks": True},
    "dropout": {"dropout": 0.3},
    "all": {
        **{"window": (40, 0), "softcap": 5.0, "bias": True, "alibi": True, "padding": True},
        **{"dropout": 0.6, "sinks": True},
    },
}
# Lengths of queries and keys: none of either, neither, more queries than keys, past a tile.
PACKED_LENGTHS = ((5, 7), (0, 3), (6, 0), (0, 0), (33, 20), (2, 70))


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, random: Draw) -> tuple[Tensor, ...]:
    b, sq, sk, h, kv_heads, d, dv = shape
    q = random(b, sq, h, d, dtype=dtype)
    k = random(b, sk, kv_heads, d, dtype=dtype)
    v = random(b, sk, kv_heads, dv, dtype=dtype)
    return q, k, v


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    window: tuple[int, int] = (-1, -1),
    **options: Any,
) -> tuple[Any, ...]:
    """The op's positional arguments."""
    optional = ("bias", "alibi_slopes", "sinks", "key_padding_mask", "cu_seqlens_q")
    optional += ("cu_seqlens_k", "block_table", "dropout_seed")
    lengths = options.get("lengths", (q.shape[1], k.shape[1]))
    return (
        *(q, k, v),
        *(options.get(name) for name in optional),
        *(softmax_scale, *window, options.get("softcap", 0.0), options.get("dropout_p", 0.0)),
        *lengths,
    )


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = True) -> tuple[Any, ...]:
    return _arguments(q, k, v, scale, (-1, 0) if causal else (-1, -1))


def _backward_arguments(
    args: tuple[Any, ...],
    random: Draw,
    forward: tuple[Tensor, Tensor],
    grad_out: Tensor | None = None,
) -> tuple[Any, ...]:
    """The backward op's arguments for those of the forward and its results."""
    q, k, v, bias, alibi_slopes, _, padding, cu_seqlens_q, cu_seqlens_k, _, *rest = args
    out, lse = forward
    if grad_out is None:
        grad_out = random(*out.shape, dtype=out.dtype)
    optional = (bias, alibi_slopes, padding, cu_seqlens_q, cu_seqlens_k)
    needs = (bias is not None, alibi_slopes is not None)
    return (grad_out, q, k, v, out, lse, random(*lse.shape), *optional, *rest, *needs)


def _check_both(args: tuple[Any, ...], random: Draw, assert_close: Check) -> None:
    assert_close(attention(*args), reference.attention, *args, factor=2)
    args = _backward_arguments(args, random, reference.attention(*args))
    assert_close(attention_backward(*args), reference.attention_backward, *args, factor=3)


@CAUSAL
@SHAPES
def test_attention(
    shape: tuple[int, ...],
    causal: bool,
    dtype: torch.dtype,
    random: Draw,
    embedded: Embed,
    assert_close: Check,
) -> None:
    q, k, v = (embedded(tensor) for tensor in _inputs(shape, dtype, random))
    _check_both(_causal(q, k, v, q.shape[-1] ** -0.5, causal), random, assert_close)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in FEATURES), ("all", torch.bfloat16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_features(
    name: str,
    dtype: torch.dtype,
    random: Draw,
    embedded: Embed,
    assert_close: Check,
) -> None:
    features = FEATURES[name]
    b, sq, sk, h = 2, 37, 90, 4
    q, k, v = (embedded(x) for x in _inputs((b, sq, sk, h, 2, 24, 16), dtype, random))
    options: dict[str, Any] = {"window": features.get("window", (-1, -1))}
    if "bias" in features:
        # Broadcast over heads and, by -inf, also a mask; one query is left without any key.
        bias = random(b, 1, sq, sk, dtype=dtype)
        bias[bias > 1.5] = -torch.inf
        bias[0, :, 3] = -torch.inf
        options["bias"] = embedded(bias).expand(b, h, sq, sk)
    if "alibi" in features:
        options["alibi_slopes"] = random(b, h).sigmoid()
    if "sinks" in features:
        options["sinks"] = random(h)
        options["sinks"][1] = -torch.inf
    if "padding" in features:
        options["key_padding_mask"] = random(b, sk) > 0.5
    if "dropout" in features:
        options["dropout_p"] = features["dropout"]
        options["dropout_seed"] = torch.tensor([2**61 + 12345])
    options["softcap"] = features.get("softcap", 0.0)
    _check_both(_arguments(q, k, v, 0.3, **options), random, assert_close)


def test_dropout_draws_the_mask_of_the_reference() -> None:
    # Equal scores, and values that show each probability by itself.
    q, k = torch.zeros(1, 5, 2, 16), torch.zeros(2, 70, 2, 16)
    v = torch.eye(70).view(1, 70, 1, 70).expand(2, 70, 2, 70)
    for seed, dropout_p in ((0, 0.5), (-7, 0.9), (2**62 + 11, 0.001)):
        seeds = torch.tensor([seed])
        args = _arguments(q.expand(2, 5, 2, 16), k, v, 1.0, dropout_p=dropout_p, dropout_seed=seeds)
        out, _ = attention(*args)
        kept = keep_mask(seeds, dropout_p, 0, 4, 5, 70).view(2, 2, 5, 70)
        assert torch.equal(out.transpose(1, 2) != 0, kept)


@pytest.mark.parametrize(
    ("window", "dtype"),
    (((-1, 0), torch.float32), ((10, 3), torch.float16)),
    ids=("causal-float32", "window-float16"),
)
def test_packed_sequences(
    window: tuple[int, int],
    dtype: torch.dtype,
    random: Draw,
    embedded: Embed,
    assert_close: Check,
) -> None:
    cu_seqlens_q, cu_seqlens_k, lengths = _bounds()
    # Three rows of each belong to no sequence.
    q, k, v = (x[0] for x in _inputs((1, 46 + 3, 100 + 3, 4, 2, 24, 16), dtype, random))
    args = _arguments(
        *(embedded(tensor) for tensor in (q, k, v)),
        0.3,
        window,
        alibi_slopes=random(len(PACKED_LENGTHS), 4).sigmoid(),
        sinks=random(4),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        dropout_seed=torch.tensor([5]),
        dropout_p=0.2,
        lengths=lengths,
    )
    _check_both(args, random, assert_close)


def _bounds() -> tuple[Tensor, Tensor, tuple[int, int]]:
    """cu_seqlens of PACKED_LENGTHS, and the longest lengths."""
    lengths = torch.tensor(PACKED_LENGTHS)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (0, 0, 1, 0)).to(torch.int32)
    return bounds[:, 0].contiguous(), bounds[:, 1].contiguous(), (33, 70)


@pytest.mark.parametrize("page_size", (1, 16, 48))
def test_pages(page_size: int, random: Draw, assert_close: Check) -> None:
    cu_seqlens_q, cu_seqlens_k, lengths = _bounds()
    sizes = [keys for _, keys in PACKED_LENGTHS]
    k, v, block_table = paged(sizes, page_size, (2, 24), (2, 16), random)
    args = _arguments(
        random(46, 4, 24), k, v, 0.3, (-1, 0), softcap=3.0, block_table=block_table,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, lengths=lengths,
    )  # fmt: skip
    assert_close(attention(*args), reference.attention, *args, factor=2)


@pytest.mark.parametrize("keys", (0, 3), ids=("no-keys", "fewer-keys-than-queries"))
def test_a_query_without_keys_gives_zero_and_minus_infinity(
    keys: int, dtype: torch.dtype, random: Draw
) -> None:
    q, k, v = _inputs((2, 5, keys, 2, 1, 16, 8), dtype, random)
    args = _causal(q, k, v, 1.0)
    out, lse = attention(*args)
    blind = 5 - keys
    assert torch.equal(out[:, :blind], torch.zeros(2, blind, 2, 8, dtype=dtype))
    assert torch.equal(lse[..., :blind], torch.full((2, 2, blind), -torch.inf))
    assert torch.isfinite(lse[..., blind:]).all()
    grads = attention_backward(*_backward_arguments(args, random, (out, lse)))
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[0][:, :blind] == 0).all()


@pytest.mark.parametrize(
    "shape", ((0, 3, 3, 2, 1, 8, 8), (2, 0, 3, 2, 1, 8, 8), (2, 0, 0, 2, 1, 8, 8)), ids=str
)
def test_nothing_to_attend(shape: tuple[int, ...], random: Draw) -> None:
    q, k, v = _inputs(shape, torch.float32, random)
    args = _causal(q, k, v, 1.0)
    out, lse = attention(*args)
    assert out.shape == (*q.shape[:3], v.shape[3])
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    grads = attention_backward(*_backward_arguments(args, random, (out, lse)))
    for grad, value in zip(grads[:3], (q, k, v), strict=True):
        assert torch.equal(grad, torch.zeros_like(value))


@CAUSAL
def test_large_scores_do_not_overflow(
    causal: bool, dtype: torch.dtype, random: Draw, assert_close: Check
) -> None:
    q, k, v = _inputs((1, 40, 50, 1, 1, 32, 32), dtype, random)
    args = _causal(q * 30, k * 30, v, 1.0, causal)
    assert_close(attention(*args), reference.attention, *args, factor=2)


def test_heads_may_lie_before_the_sequence_in_memory(random: Draw) -> None:
    q, k, v = (random(2, 2, 9, 24).transpose(1, 2) for _ in range(3))
    grad_out = random(2, 2, 9, 24).transpose(1, 2)
    dense = [tensor.contiguous() for tensor in (q, k, v)]
    out, lse = attention(*_causal(q, k, v, 0.3))
    want_out, want_lse = attention(*_causal(*dense, 0.3))
    assert torch.equal(out, want_out)
    assert torch.equal(lse, want_lse)
    args = _backward_arguments(_causal(q, k, v, 0.3), random, (out, lse), grad_out)
    got = attention_backward(*args)
    want = attention_backward(grad_out.contiguous(), *dense, *args[4:])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_gradient_may_be_broadcast(random: Draw, assert_close: Check) -> None:
    q, k, v = _inputs((1, 6, 6, 2, 1, 16, 16), torch.float32, random)
    args = _causal(q, k, v, 0.25)
    grad_out = torch.ones(()).expand(q.shape)
    args = _backward_arguments(args, random, reference.attention(*args), grad_out)
    assert_close(attention_backward(*args), reference.attention_backward, *args, factor=3)


def test_a_batch_row_does_not_depend_on_its_neighbours(random: Draw) -> None:
    q, k, v = _inputs((3, 20, 70, 2, 1, 32, 32), torch.bfloat16, random)
    out, lse = attention(*_causal(q, k, v, 0.2))
    alone, lse_alone = attention(*_causal(q[1:2], k[1:2], v[1:2], 0.2))
    assert torch.equal(out[1:2], alone)
    assert torch.equal(lse[1:2], lse_alone)


def test_why_not_names_what_triton_cannot_do(random: Draw) -> None:
    q, k, v = _inputs((1, 2, 2, 1, 1, 8, 8), torch.float32, random)
    # More keys than the largest head dim are no reason.
    bias = torch.zeros(1).expand(1, 1, 2, MAX_HEAD_DIM + 1)
    assert why_not(*_arguments(q, k, v, 1.0, bias=bias)) == []
    (reason,) = why_not(*_causal(q.double(), k.double(), v.double(), 1.0))
    assert "float64" in reason
    wide = random(1, 2, 1, MAX_HEAD_DIM + 1)
    (reason,) = why_not(*_causal(wide, wide, v, 1.0))
    assert str(MAX_HEAD_DIM) in reason


@pytest.mark.parametrize("d", (16, 64, 128, 256))
def test_tiles_are_powers_of_two(d: int, dtype: torch.dtype) -> None:
    for choose in (forward_tile, key_gradients_tile, query_gradients_tile):
        for plain in (True, False):
            tile = choose(dtype, d, d, plain)
            for size in (tile.queries, tile.keys, tile.num_warps):
                assert size & (size - 1) == 0
