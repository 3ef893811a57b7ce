"""mla_absorbed and its gradients on every backend against plain mathematics in float64."""

from __future__ import annotations

import pytest
import torch
from warploom.ops.mla import mla_absorbed

from tests import plain
from tests.backends import DEVICE, every_backend, every_dtype
from tests.numerics import check_against_float64, inside_larger

#: queries, keys that count, heads, d_latent, d_rope
CASES = {
    "small": (5, (7, 4), 4, 32, 16),
    "deepseek-v2": (9, (20, 33), 4, 512, 64),
    "latent-320-256": (3, (17, 9), 2, 320, 256),
    "without-rotary": (6, (10, 6), 3, 64, 0),
    "one-head": (33, (65, 40), 1, 32, 16),
    "more-queries-than-keys": (40, (33, 0, 30, 37), 4, 32, 16),
    "one-query": (1, (7, 2), 16, 32, 16),
    "across-tiles": (20, (70, 64), 5, 48, 32),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def draw(case, dtype):
    """q, and kv with three rows more than count."""
    queries, lengths, heads, d_latent, d_rope = case
    q = torch.randn(len(lengths), queries, heads, d_latent + d_rope, dtype=torch.float64)
    kv = torch.randn(len(lengths), max(lengths) + 3, d_latent + d_rope, dtype=torch.float64)
    return q.to(DEVICE, dtype), kv.to(DEVICE, dtype)


def check(backend, case, q, kv, causal):
    _, lengths, _, d_latent, d_rope = case
    scale = 1.2 * (d_latent + d_rope) ** -0.5
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)

    def ours(q, kv):
        return mla_absorbed(
            q, kv, d_latent=d_latent, softmax_scale=scale, causal=causal, kv_seqlens=seqlens,
            return_lse=True, backend=backend,
        )  # fmt: skip

    def exactly(q, kv):
        out, lse = plain.latent_attention(q, kv, lengths, d_latent, scale, causal)
        return out, lse

    check_against_float64(ours, exactly, [q, kv])


@every_backend
@every_dtype
@every_case
def test_outputs_and_gradients(backend, dtype, case):
    check(backend, case, *draw(case, dtype), causal=True)


@every_backend
def test_without_causality(backend):
    case = CASES["across-tiles"]
    check(backend, case, *draw(case, torch.bfloat16), causal=False)


@every_backend
def test_strided_inputs(backend):
    case = CASES["small"]
    check(backend, case, *map(inside_larger, draw(case, torch.float32)), causal=True)


@every_backend
def test_rows_that_do_not_count_are_not_read(backend):
    """They may be NaN, and their gradient is 0."""
    q, kv = draw((5, (4, 2), 3, 32, 16), torch.float32)
    kv[0, 4:] = kv[1, 2:] = float("nan")
    q.requires_grad_(), kv.requires_grad_()
    lengths = torch.tensor([4, 2], dtype=torch.int32, device=DEVICE)
    out = mla_absorbed(q, kv, d_latent=32, softmax_scale=0.2, kv_seqlens=lengths, backend=backend)
    grad_q, grad_kv = torch.autograd.grad(out.square().sum(), [q, kv])
    assert torch.isfinite(out).all() and torch.isfinite(grad_q).all()
    assert (grad_kv[0, 4:] == 0).all() and (grad_kv[1, 2:] == 0).all()
    assert (grad_kv[0, :4] != 0).any() and torch.isfinite(grad_kv).all()


@every_backend
def test_gradients_agree_to_the_bit_on_two_runs(backend):
    q, kv = draw(CASES["across-tiles"], torch.bfloat16)
    q.requires_grad_(), kv.requires_grad_()

    def gradients():
        out = mla_absorbed(q, kv, d_latent=48, softmax_scale=0.2, backend=backend)
        return torch.autograd.grad(out.float().square().sum(), [q, kv])

    assert all(torch.equal(one, two) for one, two in zip(gradients(), gradients()))


def test_errors_name_op_and_argument():
    q, kv = torch.randn(2, 3, 4, 48), torch.randn(2, 7, 48)
    with pytest.raises(ValueError, match=r"mla_absorbed: kv: expected shape \(2, 7, 48\)"):
        mla_absorbed(q, kv[..., :40], d_latent=32, softmax_scale=0.2)
    with pytest.raises(ValueError, match="mla_absorbed: d_latent: expected 1 to 48"):
        mla_absorbed(q, kv, d_latent=0, softmax_scale=0.2)
    with pytest.raises(TypeError, match="mla_absorbed: kv_seqlens: expected dtype int32"):
        mla_absorbed(q, kv, d_latent=32, softmax_scale=0.2, kv_seqlens=torch.tensor([1, 2]))
