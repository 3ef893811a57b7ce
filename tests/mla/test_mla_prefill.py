"""mla_prefill: expanded attention, packed, after a cached prefix; and its equality with the absorbed form."""

from __future__ import annotations

import pytest
import torch
from warploom.ops.mla import mla_absorbed, mla_cache_append, mla_prefill

from tests import plain
from tests.backends import DEVICE, every_backend
from tests.numerics import check_against_float64

D_NOPE, D_ROPE, D_VALUE, D_LATENT, HEADS = 16, 8, 12, 32, 3
SCALE = 0.2


def draw(*rows, dtype=torch.float64):
    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)

    q, latent = randn(*rows, HEADS, D_NOPE + D_ROPE), randn(*rows, D_LATENT)
    weight = randn(HEADS * (D_NOPE + D_VALUE), D_LATENT) * D_LATENT**-0.5
    return q, latent, randn(*rows, D_ROPE), weight


def expanded(q, latent, k_rope, weight):
    """Keys and values of every head, written out; causal."""
    kv = (latent @ weight.T).unflatten(-1, (HEADS, D_NOPE + D_VALUE))
    shared = k_rope.unsqueeze(-2).expand(*kv.shape[:-1], D_ROPE)
    k = torch.cat((kv[..., :D_NOPE], shared), dim=-1)
    return plain.attention(q, k, kv[..., D_NOPE:], causal=True, softmax_scale=SCALE)[0]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_outputs_and_gradients(backend, dtype):
    def ours(*tensors):
        return mla_prefill(*tensors, softmax_scale=SCALE, backend=backend)

    check_against_float64(ours, expanded, draw(2, 9, dtype=dtype))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_absorbed_equals_expanded(backend):
    """To 1e-12 in float64, gradients of all four tensors included."""
    tensors = [tensor.cpu().requires_grad_() for tensor in draw(2, 7)]
    q, latent, k_rope, weight = tensors
    first, lse = mla_prefill(*tensors, softmax_scale=SCALE, return_lse=True, backend=backend)
    per_head = weight.view(HEADS, D_NOPE + D_VALUE, D_LATENT)
    absorbed = torch.einsum("bshn,hnl->bshl", q[..., :D_NOPE], per_head[:, :D_NOPE])
    second, absorbed_lse = mla_absorbed(
        torch.cat((absorbed, q[..., D_NOPE:]), -1), torch.cat((latent, k_rope), -1),
        d_latent=D_LATENT, softmax_scale=SCALE, return_lse=True, backend=backend,
    )  # fmt: skip
    second = torch.einsum("bshl,hvl->bshv", second, per_head[:, D_NOPE:])
    upstream = torch.randn_like(first)
    torch.testing.assert_close(second, first, rtol=0, atol=1e-12)
    torch.testing.assert_close(absorbed_lse, lse, rtol=0, atol=1e-12)
    for got, want in zip(
        torch.autograd.grad(second, tensors, upstream),
        torch.autograd.grad(first, tensors, upstream),
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@every_backend
def test_packed_sequences_see_themselves_alone(backend):
    q, latent, k_rope, weight = draw(11, dtype=torch.float32)
    bounds = torch.tensor([0, 4, 4, 11], dtype=torch.int32, device=DEVICE)
    out = mla_prefill(
        q, latent, k_rope, weight, softmax_scale=SCALE, cu_seqlens=bounds, max_seqlen=7,
        backend=backend,
    )  # fmt: skip
    for rows in (slice(0, 4), slice(4, 11)):
        parts = [tensor[rows].unsqueeze(0) for tensor in (q, latent, k_rope)]
        alone = mla_prefill(*parts, weight, softmax_scale=SCALE, backend=backend)
        torch.testing.assert_close(out[rows], alone[0], rtol=1e-5, atol=1e-5)


@every_backend
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "pages"])
def test_a_cached_prefix_and_the_rest_equal_one_shot(backend, packed, paged):
    """Prefixes of 300, 4 and 0 tokens, which are two chunks of 256; what is unused is NaN or garbage."""
    prefixes, rest = (300, 4, 0), 5
    lengths = torch.tensor(prefixes, dtype=torch.int32, device=DEVICE)
    _, _, _, weight = draw(1, dtype=torch.float32)
    sequences = [draw(length + rest, dtype=torch.float32)[:3] for length in prefixes]
    page_size = 64 if paged else 320
    cache = torch.full(
        (15, page_size, D_LATENT + D_ROPE) if paged else (3, page_size, D_LATENT + D_ROPE),
        float("nan"), device=DEVICE,
    )  # fmt: skip
    table = None
    if paged:
        table = torch.full((3, 5), -9, dtype=torch.int32, device=DEVICE)
        table[0], table[1, 0] = torch.tensor([4, 14, 0, 7, 2]), 11
    for row, (_, latent, k_rope) in enumerate(sequences):
        for position in range(prefixes[row]):
            block = row if table is None else table[row, position // page_size]
            cache[block, position % page_size] = torch.cat((latent[position], k_rope[position]))
    last = [[tensor[-rest:] for tensor in one] for one in sequences]
    new = [torch.stack(tensors) for tensors in zip(*last)]
    options = {}
    if packed:
        new = [tensor.flatten(0, 1) for tensor in new]
        bounds = torch.arange(4, dtype=torch.int32, device=DEVICE) * rest
        options = {"cu_seqlens": bounds, "max_seqlen": rest}
    out, lse = mla_prefill(
        *new, weight, softmax_scale=SCALE, kv_cache=cache, cache_seqlens=lengths,
        block_table=table, chunk_size=256, return_lse=True, backend=backend, **options,
    )  # fmt: skip
    if packed:
        out, lse = out.unflatten(0, (3, rest)), lse.unflatten(1, (3, rest)).transpose(0, 1)
    for row, sequence in enumerate(sequences):
        whole, whole_lse = mla_prefill(
            *(tensor.unsqueeze(0) for tensor in sequence), weight, softmax_scale=SCALE,
            return_lse=True, backend="reference",
        )  # fmt: skip
        torch.testing.assert_close(out[row], whole[0, -rest:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[row], whole_lse[0, :, -rest:], rtol=1e-4, atol=1e-5)


def test_a_compressed_prefix():
    """int8 latents: within what 127 steps of the largest magnitude can resolve."""
    prefix, rest = 70, 3
    q, latent, k_rope, weight = (
        tensor.cpu() for tensor in draw(1, prefix + rest, dtype=torch.float32)
    )
    latent = latent / latent.square().mean(-1, keepdim=True).sqrt()  # as an RMSNorm leaves it
    cache = torch.zeros(1, 80, D_LATENT + 4 + 2 * D_ROPE, dtype=torch.int8)
    start = torch.zeros(1, dtype=torch.int32)
    held = torch.cat((latent, k_rope), -1)[:, :prefix]
    mla_cache_append(held, torch.ones(D_LATENT), cache, start, eps=0.0)
    out = mla_prefill(
        q[:, prefix:], latent[:, prefix:], k_rope[:, prefix:], weight, softmax_scale=SCALE,
        kv_cache=cache, cache_seqlens=start + prefix,
    )  # fmt: skip
    whole = mla_prefill(q, latent, k_rope, weight, softmax_scale=SCALE)[:, prefix:]
    assert 0 < (out - whole).abs().max() < 0.02


def test_errors_name_op_and_argument():
    q, latent, k_rope, weight = draw(2, 5)
    with pytest.raises(ValueError, match=r"mla_prefill: k_rope: expected shape \(2, 5, 8\)"):
        mla_prefill(q, latent, k_rope[:1], weight, softmax_scale=SCALE)
    with pytest.raises(ValueError, match="mla_prefill: kv_b_weight: expected 3 heads of more than"):
        mla_prefill(q, latent, k_rope, weight[: 3 * D_NOPE], softmax_scale=SCALE)
    cache = torch.zeros(2, 9, D_LATENT + D_ROPE, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="mla_prefill: cache_seqlens: expected a tensor beside"):
        mla_prefill(q, latent, k_rope, weight, softmax_scale=SCALE, kv_cache=cache)
    with pytest.raises(ValueError, match="mla_prefill: chunk_size: expected a multiple of 256"):
        mla_prefill(
            q, latent, k_rope, weight, softmax_scale=SCALE, kv_cache=cache, chunk_size=100,
            cache_seqlens=torch.zeros(2, dtype=torch.int32, device=DEVICE),
        )  # fmt: skip
