"""Attention on every backend against float64, values and gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F
from warploom.ops.attention import attention

from tests import plain
from tests.backends import BACKENDS, DEVICE, DTYPES, every_backend, every_dtype
from tests.numerics import check_against_float64, inside_larger

#: batch, queries, keys, heads, kv_heads, head_dim, value_dim
SHAPES = {
    "one-token": (1, 1, 1, 1, 1, 64, 64),
    "odd-lengths-GQA": (2, 33, 47, 4, 2, 64, 64),
    "MQA-seven-heads": (1, 65, 65, 7, 1, 32, 32),
    "more-queries-than-keys": (1, 70, 40, 2, 2, 64, 64),
    "decode": (2, 1, 129, 8, 2, 128, 128),
    "value-dim-differs": (1, 20, 31, 2, 1, 96, 40),
    "odd-head-dim": (1, 17, 18, 2, 2, 59, 59),
    "wide-heads": (1, 18, 35, 2, 1, 256, 256),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
masked = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def inputs(shape, dtype):
    batch, queries, keys, heads, kv_heads, head_dim, value_dim = shape
    sizes = [
        (batch, queries, heads, head_dim),
        (batch, keys, kv_heads, head_dim),
        (batch, keys, kv_heads, value_dim),
    ]
    return [torch.randn(size, dtype=torch.float64).to(DEVICE, dtype) for size in sizes]


def check(backend, causal, tensors, **options):
    check_against_float64(
        functools.partial(attention, causal=causal, return_lse=True, backend=backend),
        functools.partial(plain.attention, causal=causal),
        tensors,
        **options,
    )


@every_backend
@every_dtype
@every_shape
@masked
def test_output_and_log_sum_exp(backend, dtype, shape, causal):
    if backend == "simt_instrumented" and dtype == torch.float16:
        dtype = torch.bfloat16  # one 16-bit type is enough of the slowest mode
    check(backend, causal, inputs(shape, dtype), gradients=False)


@every_backend
@every_dtype
@pytest.mark.parametrize("name", ["odd-lengths-GQA", "more-queries-than-keys", "value-dim-differs"])
def test_gradients(backend, dtype, name):
    tensors = inputs(SHAPES[name], dtype)
    check_against_float64(
        functools.partial(attention, causal=True, backend=backend),
        lambda q, k, v: plain.attention(q, k, v, causal=True)[0],
        tensors,
    )


@every_backend
@pytest.mark.parametrize("head_dim", [65, 129, 193])
def test_gradients_one_past_a_width_that_kernels_are_made_for(backend, head_dim):
    check(backend, True, inputs((2, 5, 9, 2, 1, head_dim, head_dim), torch.bfloat16))


@every_backend
def test_one_key_leaves_nothing_to_choose(backend):
    """softmax over one key is 1 whatever q and k are: their gradients are 0 up to rounding."""
    tensors = [tensor.requires_grad_() for tensor in inputs(SHAPES["one-token"], torch.float32)]
    out = attention(*tensors, backend=backend)
    grad_q, grad_k, grad_v = torch.autograd.grad(out.sum(), tensors)
    assert grad_q.abs().max() < 1e-6 and grad_k.abs().max() < 1e-6
    assert torch.equal(grad_v, torch.ones_like(grad_v))


@every_backend
def test_gradient_through_log_sum_exp(backend):
    check(backend, False, inputs((2, 9, 14, 4, 2, 32, 32), torch.float32))


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys"), [(0, 5), (63, 64), (64, 65), (65, 63), (113, 203), (1, 512)]
)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 80, 111, 128, 192, 256])
@masked
def test_grid_of_lengths_and_head_dims(backend, dtype, queries, keys, head_dim, causal):
    # The rule compares two maxima: with the two rows of one query in two heads, either is chance.
    batch = 32 if queries == 1 else 3
    tensors = inputs((batch, queries, keys, 2, 1, head_dim, head_dim), dtype)
    check(backend, causal, tensors, gradients=False)


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 65), (63, 64), (64, 65), (65, 63), (113, 203), (203, 113)]
)
@masked
def test_gradients_over_lengths(backend, queries, keys, causal):
    check(backend, causal, inputs((3, queries, keys, 4, 2, 64, 64), torch.bfloat16))


@pytest.mark.slow
@every_backend
def test_a_thousand_queries_and_keys(backend):
    check(backend, True, inputs((1, 1023, 1024, 1, 1, 64, 64), torch.bfloat16))


@every_backend
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (3, 0)], ids=["no-queries", "no-keys"])
def test_empty_sequences(backend, queries, keys):
    q, k, v = inputs((2, queries, keys, 4, 2, 64, 64), torch.bfloat16)
    out, lse = attention(q, k, v, return_lse=True, backend=backend)
    assert out.shape == (2, queries, 4, 64) and torch.all(out == 0)
    assert lse.shape == (2, 4, queries) and torch.all(torch.isneginf(lse))


@every_backend
def test_rows_that_see_no_key_are_zero(backend):
    q, k, v = inputs((1, 40, 8, 2, 2, 64, 64), torch.float16)
    out, lse = attention(q, k, v, causal=True, return_lse=True, backend=backend)
    assert torch.all(out[:, :32] == 0) and torch.all(torch.isneginf(lse[..., :32]))
    assert torch.all(torch.isfinite(lse[..., 32:])) and out[:, 32:].abs().sum() > 0


@every_backend
@every_dtype
def test_slices_of_larger_buffers(backend, dtype):
    tensors = [inside_larger(tensor) for tensor in inputs((2, 21, 37, 4, 2, 64, 64), dtype)]
    check(backend, True, tensors, gradients=False)


@every_backend
def test_heads_first_memory(backend):
    """[B, H, S, D] memory seen as [B, S, H, D]."""
    tensors = [
        tensor.transpose(1, 2).contiguous().transpose(1, 2)
        for tensor in inputs((2, 21, 37, 4, 2, 64, 64), torch.bfloat16)
    ]
    check(backend, True, tensors, gradients=False)


@every_backend
@pytest.mark.parametrize("magnitude", [1e-3, 30.0], ids=["tiny", "large"])
def test_magnitudes(backend, magnitude):
    q, k, v = inputs((1, 33, 65, 2, 1, 64, 64), torch.float32)
    check(backend, False, [q * magnitude, k * magnitude, v], gradients=False)


@every_backend
def test_softmax_scale(backend):
    tensors = inputs((1, 9, 11, 2, 2, 32, 32), torch.float32)
    check_against_float64(
        functools.partial(attention, softmax_scale=0.31, backend=backend),
        lambda q, k, v: plain.attention(q, k, v, softmax_scale=0.31)[0],
        tensors,
        gradients=False,
    )


@every_backend
def test_two_runs_agree_bit_for_bit(backend):
    tensors = inputs((2, 40, 70, 4, 2, 64, 64), torch.bfloat16)
    first, second = (attention(*tensors, causal=True, backend=backend) for _ in range(2))
    assert torch.equal(first, second)


def test_agrees_with_torch():
    q, k, v = inputs((2, 24, 24, 4, 2, 32, 32), torch.float32)
    ours = attention(q, k, v, causal=True)
    theirs = F.scaled_dot_product_attention(
        *(tensor.transpose(1, 2) for tensor in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(ours, theirs.transpose(1, 2))


def test_autocast_computes_in_its_dtype():
    q, k, v = inputs((1, 8, 8, 2, 2, 32, 32), torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert attention(q, k, v).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(2, 3, 8)}, ValueError, r"q: expected 4 dimensions \[B, S, H, D\]"),
        ({"k": torch.ones(1, 5, 3, 8), "v": torch.ones(1, 5, 3, 8)}, ValueError,
         "k: expected a head count that divides q's 4, got 3"),
        ({"k": torch.ones(1, 5, 2, 16)}, ValueError, "k: expected shape"),
        ({"v": torch.ones(1, 6, 2, 8)}, ValueError, "v: expected shape"),
        ({"v": torch.ones(1, 5, 2, 8).half()}, TypeError, "v: expected q's dtype float32, got float16"),
        ({"q": torch.ones(1, 3, 4, 8).long()}, TypeError, "q: expected dtype"),
        ({"k": None}, TypeError, "k: expected a tensor"),
        ({"k": torch.ones(1, 5, 0, 8), "v": torch.ones(1, 5, 0, 8)}, ValueError, "k: expected a head count"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_bad_input_is_named(change, error, message):
    good = {"q": torch.ones(1, 3, 4, 8), "k": torch.ones(1, 5, 2, 8), "v": torch.ones(1, 5, 2, 8)}
    with pytest.raises(error, match=f"attention: {message}"):
        attention(**{**good, **change})


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("cuda", "simt")])
def test_a_backend_that_cannot_serve_lists_its_reasons(backend):
    q = torch.ones(1, 2, 1, 264, device=DEVICE)
    with pytest.raises(
        RuntimeError, match=f"backend '{backend}' cannot serve.*head dims up to 256, got 264"
    ):
        attention(q, q, q, backend=backend)
