"""merge_attention against plain mathematics in float64, forward and gradients, on every backend."""

from __future__ import annotations

import functools

import pytest
import torch
from warploom.ops.attention import attention, merge_attention

from tests.backends import BACKENDS, DEVICE, SLOW_BACKENDS, every_backend, every_dtype
from tests.numerics import FORWARD, GRADIENT, assert_within

INFINITY = float("inf")
#: batch, length, heads, dim: whole vectors, single elements, more columns than a warp takes at once
SHAPES = {
    "vectors": (2, 5, 3, 64),
    "odd-dim": (1, 3, 2, 7),
    "one-column": (2, 40, 3, 1),
    "wide": (1, 3, 2, 300),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def parts(shape, dtype):
    """out1, lse1, out2, lse2 and upstream gradients of out and lse."""
    batch, length, heads, dim = shape
    out_shape, lse_shape = (batch, length, heads, dim), (batch, heads, length)
    outs = [torch.randn(out_shape).to(DEVICE, dtype) for _ in range(3)]
    lses = [3 * torch.randn(lse_shape, device=DEVICE) for _ in range(3)]
    return outs[0], lses[0], outs[1], lses[1], outs[2], lses[2]


def plain_merge(out1, lse1, out2, lse2):
    """The definition, in the dtype of each tensor; finite lses."""
    lse = torch.logaddexp(lse1, lse2)
    weights = [torch.exp(part - lse).transpose(1, 2).unsqueeze(-1) for part in (lse1, lse2)]
    return weights[0].to(out1.dtype) * out1 + weights[1].to(out1.dtype) * out2, lse


def run(function, tensors, upstream):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = function(*leaves)
    grads = [grad.to(out.dtype) for grad, out in zip(upstream, outputs)]
    return *outputs, *torch.autograd.grad(outputs, leaves, grads)


@every_backend
@every_dtype
@every_shape
def test_values_and_gradients(backend, dtype, shape):
    if backend in SLOW_BACKENDS and dtype == torch.float16:
        dtype = torch.bfloat16
    *tensors, grad_out, grad_lse = parts(shape, dtype)
    upstream = (grad_out, grad_lse)
    exact = run(plain_merge, [tensor.double() for tensor in tensors], upstream)
    rough = run(plain_merge, tensors, upstream)
    actual = run(functools.partial(merge_attention, backend=backend), tensors, upstream)
    names = ("out", "lse", "grad_out1", "grad_lse1", "grad_out2", "grad_lse2")
    for name, got, want, yardstick in zip(names, actual, exact, rough):
        factor = GRADIENT if name.startswith("grad") else FORWARD
        assert_within(got, want.detach(), yardstick, factor=factor, what=name)


@every_backend
@pytest.mark.parametrize("nothing", [-INFINITY, INFINITY], ids=["minus", "plus"])
def test_a_part_without_keys_weighs_nothing(backend, nothing):
    out1, lse1, out2, lse2, grad_out, grad_lse = parts((1, 4, 2, 64), torch.float32)
    lse1[..., 0] = nothing
    out1[:, 0] = float("nan")
    lse2[..., 1] = nothing
    out2[:, 1] = float("nan")
    lse1[..., 2] = lse2[..., 2] = nothing
    out, lse, grad1, grad_lse1, grad2, grad_lse2 = run(
        functools.partial(merge_attention, backend=backend),
        (out1, lse1, out2, lse2),
        (grad_out, grad_lse),
    )
    assert torch.equal(out[:, 0], out2[:, 0]) and torch.equal(lse[..., 0], lse2[..., 0])
    assert torch.equal(out[:, 1], out1[:, 1]) and torch.equal(lse[..., 1], lse1[..., 1])
    assert not out[:, 2].any() and torch.isneginf(lse[..., 2]).all()
    assert not grad1[:, 0].any() and not grad_lse1[..., 0].any()
    assert torch.equal(grad2[:, 0], grad_out[:, 0])
    assert not grad2[:, 1].any() and not grad_lse2[..., 1].any()
    assert torch.equal(grad1[:, 1], grad_out[:, 1])
    for grad in (grad1, grad2):
        assert not grad[:, 2].any()
    for grad in (grad_lse1, grad_lse2):
        assert not grad[..., 2].any()
        assert torch.isfinite(grad[..., 3]).all()


@every_backend
def test_packed_is_a_batch_of_one(backend):
    out1, lse1, out2, lse2, *_ = parts((1, 5, 3, 64), torch.float32)
    out, lse = merge_attention(out1, lse1, out2, lse2, backend=backend)
    packed = [tensor.squeeze(0) for tensor in (out1, lse1, out2, lse2)]
    packed_out, packed_lse = merge_attention(*packed, backend=backend)
    assert torch.equal(packed_out, out[0]) and torch.equal(packed_lse, lse[0])


@every_backend
def test_only_one_output_needs_a_gradient(backend):
    *tensors, grad_out, grad_lse = parts((1, 3, 2, 16), torch.float32)
    merge = functools.partial(merge_attention, backend=backend)
    zero_out, zero_lse = torch.zeros_like(grad_out), torch.zeros_like(grad_lse)
    for place, upstream in enumerate([(grad_out, zero_lse), (zero_out, grad_lse)]):
        expected = run(merge, tensors, upstream)[2:]
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = merge(*leaves)[place]
        grads = torch.autograd.grad(output, leaves, upstream[place])
        for got, want in zip(grads, expected):
            torch.testing.assert_close(got, want)


def test_two_halves_of_the_keys_make_the_whole():
    q, k, v = (torch.randn(2, length, 4, 32, device=DEVICE) for length in (3, 20, 20))
    whole = attention(q, k, v, return_lse=True)
    halves = [
        attention(q, k[:, keys], v[:, keys], return_lse=True)
        for keys in (slice(0, 7), slice(7, 20))
    ]
    merged = merge_attention(*halves[0], *halves[1])
    for got, want in zip(merged, whole):
        torch.testing.assert_close(got, want)


def test_errors_name_the_argument():
    out1, lse1, out2, lse2, *_ = parts((1, 4, 2, 8), torch.float32)
    with pytest.raises(ValueError, match="merge_attention: out2: expected shape"):
        merge_attention(out1, lse1, out2[:, :3], lse2)
    with pytest.raises(ValueError, match="merge_attention: lse2: expected shape"):
        merge_attention(out1, lse1, out2, lse2.transpose(1, 2))
    with pytest.raises(TypeError, match="merge_attention: lse1: expected torch.float32"):
        merge_attention(out1, lse1.double(), out2, lse2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_to_the_bit(backend):
    *tensors, grad_out, grad_lse = parts((2, 3, 2, 40), torch.bfloat16)
    merge = functools.partial(merge_attention, backend=backend)
    first, second = (run(merge, tensors, (grad_out, grad_lse)) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second))
