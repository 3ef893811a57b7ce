"""Latent attention whose latent has no norm: the same function with every cache."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from warploom.nn import (
    MultiheadLatentAttention,
    PagedLatentCache,
    RotaryEmbedding,
    StaticLatentCache,
)

HIDDEN, LATENT, ROPE = 48, 32, 16
#: Errors of compressed latents by the size of the output, as in tests/nn/test_latent_attention.py.
COMPRESSED = {torch.float8_e4m3fn: 1 / 16, torch.int8: 4 / 254}


@torch.no_grad()
def make_module(dtype=torch.float32, **options):
    torch.manual_seed(0)
    module = MultiheadLatentAttention(
        HIDDEN,
        4,
        kv_lora_rank=LATENT,
        qk_nope_head_dim=16,
        qk_rope_head_dim=ROPE,
        v_head_dim=24,
        latent_norm=False,
        dtype=dtype,
        **options,
    )
    for parameter in module.parameters():
        parameter.normal_(0.0, 0.2)
    return module


def make_cache(kind, rows, dtype=None):
    if kind == "paged":
        return PagedLatentCache(1, rows, page_size=16, dtype=dtype)
    return StaticLatentCache(1, rows, 64, dtype=dtype)


def make_table(dtype=torch.float32):
    return RotaryEmbedding(ROPE).table(64, "cpu", dtype)


def test_there_is_no_norm_in_the_state():
    assert {*make_module().state_dict()} == {
        f"{name}.weight" for name in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    }


@torch.no_grad()
def test_keys_and_values_are_linear_in_the_input():
    module = make_module(torch.float64)
    x = torch.randn(1, 7, HIDDEN, dtype=torch.float64)
    latent = F.linear(x, module.kv_a_proj_with_mqa.weight)[..., :LATENT]
    value = F.linear(latent, module.kv_b_proj.weight).unflatten(-1, (4, -1))[..., 16:]
    first = F.linear(value[:, 0].flatten(1), module.o_proj.weight)
    torch.testing.assert_close(module(x)[:, 0], first)


@pytest.mark.parametrize("mode", ["expanded", "absorbed"])
@pytest.mark.parametrize("kind", ["paged", "static"])
@torch.no_grad()
def test_steps_equal_whole_sequences(kind, mode):
    module, table = make_module(torch.float64, mode=mode), make_table(torch.float64)
    x = torch.randn(2, 21, HIDDEN, dtype=torch.float64)
    expected, cache, outs = module(x, table), make_cache(kind, 2), []
    for part in x.split([13, 1, 7], dim=1):
        outs.append(module(part, table, cache=cache))
        cache.advance(part.shape[1])
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["paged", "static"])
@torch.no_grad()
def test_packed_rows_continue_their_own(kind):
    module, table = make_module(torch.float64), make_table(torch.float64)
    wholes = [torch.randn(length, HIDDEN, dtype=torch.float64) for length in (9, 14)]
    cache, outs = make_cache(kind, 2), []
    for begin, end in (((0, 0), (5, 11)), ((5, 11), (9, 14))):
        parts = [whole[b:e] for whole, b, e in zip(wholes, begin, end)]
        cu_seqlens, max_seqlen = cache.pack([len(part) for part in parts])
        packed = torch.cat(parts).unsqueeze(0)
        out = module(packed, table, None, cache, 0, cu_seqlens, max_seqlen)[0]
        outs.append(out.split([len(part) for part in parts]))
        cache.advance([len(part) for part in parts])
    for whole, *parts in zip(wholes, *outs):
        expected = module(whole.unsqueeze(0), table)[0]
        torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", COMPRESSED, ids=str)
@torch.no_grad()
def test_compressed_rows(dtype):
    module, table = make_module(), make_table()
    x, cache = torch.randn(1, 20, HIDDEN), make_cache("paged", 1, dtype)
    expected = module(x, table)
    for part in x.split([13, 7], dim=1):
        out = module(part, table, cache=cache)
        cache.advance(part.shape[1])
    error = (out - expected[:, 13:]).norm() / expected[:, 13:].norm()
    assert 0 < error < COMPRESSED[dtype]


def test_a_cache_refuses_gradients():
    module = make_module()
    with pytest.raises(RuntimeError, match="a cache is not differentiable"):
        module(torch.randn(1, 3, HIDDEN), make_table(), cache=make_cache("paged", 1))
