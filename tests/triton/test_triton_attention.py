"""The attention launchers against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from warploom.reference import attention as reference
from warploom.triton_kernels.attention.attention import attention, why_not
from warploom.triton_kernels.attention.attention_backward import attention_backward
from warploom.triton_kernels.attention.tiles import (
    MAX_HEAD_DIM,
    forward_tile,
    key_gradients_tile,
    query_gradients_tile,
)

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


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, random: Draw) -> tuple[Tensor, ...]:
    b, sq, sk, h, kv_heads, d, dv = shape
    q = random(b, sq, h, d, dtype=dtype)
    k = random(b, sk, kv_heads, d, dtype=dtype)
    v = random(b, sk, kv_heads, dv, dtype=dtype)
    return q, k, v


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
    scale = q.shape[-1] ** -0.5
    actual = attention(q, k, v, causal, scale)
    assert_close(actual, reference.attention, q, k, v, causal, scale, factor=2)


# A query that sees no key multiplies infinities that the mask then drops.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("with_grad_lse", (False, True), ids=("out", "out-and-lse"))
@CAUSAL
@SHAPES
def test_attention_backward(
    shape: tuple[int, ...],
    causal: bool,
    with_grad_lse: bool,
    dtype: torch.dtype,
    random: Draw,
    embedded: Embed,
    assert_close: Check,
) -> None:
    q, k, v = (embedded(tensor) for tensor in _inputs(shape, dtype, random))
    scale = q.shape[-1] ** -0.5
    out, lse = reference.attention(q, k, v, causal, scale)
    grad_out = embedded(random(*out.shape, dtype=dtype))
    grad_lse = random(*lse.shape) if with_grad_lse else None
    args = (grad_out, q, k, v, out, lse, grad_lse, causal, scale)
    actual = attention_backward(*args)
    assert_close(actual, reference.attention_backward, *args, factor=3)


@pytest.mark.parametrize("keys", (0, 3), ids=("no-keys", "fewer-keys-than-queries"))
def test_a_query_without_keys_gives_zero_and_minus_infinity(
    keys: int, dtype: torch.dtype, random: Draw
) -> None:
    q, k, v = _inputs((2, 5, keys, 2, 1, 16, 8), dtype, random)
    out, lse = attention(q, k, v, True, 1.0)
    blind = 5 - keys
    assert torch.equal(out[:, :blind], torch.zeros(2, blind, 2, 8, dtype=dtype))
    assert torch.equal(lse[..., :blind], torch.full((2, 2, blind), -torch.inf))
    assert torch.isfinite(lse[..., blind:]).all()
    grads = attention_backward(
        torch.ones_like(out), q, k, v, out, lse, torch.ones_like(lse), True, 1.0
    )
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[0][:, :blind] == 0).all()


@pytest.mark.parametrize(
    "shape", ((0, 3, 3, 2, 1, 8, 8), (2, 0, 3, 2, 1, 8, 8), (2, 0, 0, 2, 1, 8, 8)), ids=str
)
def test_nothing_to_attend(shape: tuple[int, ...], random: Draw) -> None:
    q, k, v = _inputs(shape, torch.float32, random)
    out, lse = attention(q, k, v, False, 1.0)
    assert out.shape == (*q.shape[:3], v.shape[3])
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    for grad, value in zip(
        attention_backward(out, q, k, v, out, lse, None, False, 1.0), (q, k, v), strict=True
    ):
        assert torch.equal(grad, torch.zeros_like(value))


@CAUSAL
def test_large_scores_do_not_overflow(
    causal: bool, dtype: torch.dtype, random: Draw, assert_close: Check
) -> None:
    q, k, v = _inputs((1, 40, 50, 1, 1, 32, 32), dtype, random)
    args = (q * 30, k * 30, v, causal, 1.0)
    assert_close(attention(*args), reference.attention, *args, factor=2)


def test_heads_may_lie_before_the_sequence_in_memory(random: Draw) -> None:
    q, k, v = (random(2, 2, 9, 24).transpose(1, 2) for _ in range(3))
    grad_out = random(2, 2, 9, 24).transpose(1, 2)
    dense = [tensor.contiguous() for tensor in (q, k, v)]
    out, lse = attention(q, k, v, True, 0.3)
    want_out, want_lse = attention(*dense, True, 0.3)
    assert torch.equal(out, want_out)
    assert torch.equal(lse, want_lse)
    got = attention_backward(grad_out, q, k, v, out, lse, None, True, 0.3)
    want = attention_backward(grad_out.contiguous(), *dense, out, lse, None, True, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_gradient_may_be_broadcast(random: Draw, assert_close: Check) -> None:
    q, k, v = _inputs((1, 6, 6, 2, 1, 16, 16), torch.float32, random)
    out, lse = reference.attention(q, k, v, False, 0.25)
    args = (torch.ones(()).expand(out.shape), q, k, v, out, lse, None, False, 0.25)
    actual = attention_backward(*args)
    assert_close(actual, reference.attention_backward, *args, factor=3)


def test_a_batch_row_does_not_depend_on_its_neighbours(random: Draw) -> None:
    q, k, v = _inputs((3, 20, 70, 2, 1, 32, 32), torch.bfloat16, random)
    out, lse = attention(q, k, v, True, 0.2)
    alone, lse_alone = attention(q[1:2], k[1:2], v[1:2], True, 0.2)
    assert torch.equal(out[1:2], alone)
    assert torch.equal(lse[1:2], lse_alone)


def test_why_not_names_what_triton_cannot_do(random: Draw) -> None:
    q, k, v = _inputs((1, 2, 2, 1, 1, 8, 8), torch.float32, random)
    assert why_not(q, k, v, True, 1.0) == []
    (reason,) = why_not(q.double(), k.double(), v.double(), True, 1.0)
    assert "float64" in reason
    wide = random(1, 2, 1, MAX_HEAD_DIM + 1)
    (reason,) = why_not(wide, wide, v, True, 1.0)
    assert str(MAX_HEAD_DIM) in reason


@pytest.mark.parametrize("d", (16, 64, 128, 256))
def test_tiles_are_powers_of_two(d: int, dtype: torch.dtype) -> None:
    for choose in (forward_tile, key_gradients_tile, query_gradients_tile):
        tile = choose(dtype, d, d)
        for size in (tile.queries, tile.keys, tile.num_warps):
            assert size & (size - 1) == 0
